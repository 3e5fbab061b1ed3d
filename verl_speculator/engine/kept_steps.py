"""Hidden states of rollouts, kept for further steps of the speculator alone."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from verl_speculator.engine.sequence_parallel import only_sequences
from verl_speculator.losses import PackedHiddenStates

# The micro-batches of an optimizer step on this rank.
Step: TypeAlias = list[PackedHiddenStates]


class KeptSteps:
    """The optimizer steps of the present trainer step and of some before it, in host memory.

    A step is drawn as a whole: its micro-batches of all ranks are what its counts divide by.

    Args:
        num_before: Trainer steps that are kept beside the present one.
    """

    def __init__(self, num_before: int) -> None:
        self._trainer_steps: deque[list[Step]] = deque([[]], maxlen=num_before + 1)

    def begin_trainer_step(self) -> None:
        # One in which nothing was learnt takes no place.
        if self._trainer_steps[-1]:
            self._trainer_steps.append([])

    def begin_step(self) -> None:
        self._trainer_steps[-1].append([])

    def keep(self, packed: PackedHiddenStates) -> None:
        """A micro-batch of the step that has begun, without the sequences that train nothing."""
        starts_B, ends_B = packed.cu_seqlens[:-1], packed.cu_seqlens[1:]
        seen_T = torch.nn.functional.pad((packed.loss_mask == 1).cumsum(dim=0), (1, 0)).to(starts_B.device)
        self._trainer_steps[-1][-1].append(_moved(only_sequences(packed, seen_T[ends_B] > seen_T[starts_B]), "cpu"))

    def draw(self, count: int, seed: str, device: Any) -> Iterator[Step]:
        """`count` of those that are kept; the same ones on every rank, where the seed is the same."""
        steps = [step for trainer_step in self._trainer_steps for step in trainer_step]
        choice = random.Random(f"{seed} {len(steps)}")
        for _ in range(count):
            yield [_moved(packed, device) for packed in choice.choice(steps)]


def _moved(packed: PackedHiddenStates, device: Any) -> PackedHiddenStates:
    tensors: dict[str, Any] = {
        field.name: value.to(device)
        for field in dataclasses.fields(packed)
        if isinstance(value := getattr(packed, field.name), Tensor)
    }
    return dataclasses.replace(packed, **tensors)
