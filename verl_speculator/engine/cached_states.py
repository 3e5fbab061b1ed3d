"""A step's hidden states from the folder of `data.hidden_states_cache`, or from the base and into that folder.

All ranks do the one or the other: the layers of a sharded base are gathered by all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from transformers.utils import logging
from verl.utils.device import get_device_id

from verl_speculator.checkpoint.hidden_states import KEY, StatesCache, StatesCacheSettings, row_key
from verl_speculator.errors import CheckpointError, ConfigError

PREFIX = "states_cache"


class CachedStates:
    """One rank's part in it.

    Args:
        settings: The run's folder.
        layers: What is kept of each token, as `SpeculatorEngine._state_keys`.
        hf_config: The base's configuration.
        num_writers: Ranks that write; 0 on one that leaves it to another that has the same rows.

    Attributes:
        bytes_per_token: What a token takes in the folder.
        reads_step: Whether the step at hand is read.
        sums: The seconds that the last micro-batch saved and waited, to be added up over micro-batches and ranks.
    """

    def __init__(self, settings: StatesCacheSettings, layers: list[int], hf_config: Any, num_writers: int) -> None:
        self.cache = StatesCache(settings, layers, max(num_writers, 1))
        self.bytes_per_token = len(layers) * hf_config.get_text_config().hidden_size * self.cache.dtype.itemsize
        self._writes = num_writers > 0
        self.reads_step = False
        self.sums: dict[str, Tensor] = {}

    def begin_step(self, data: TensorDict) -> None:
        """Settle with all other ranks whether this batch is read.

        Raises:
            ConfigError: the rows are not text alone.
            CheckpointError: rows are missing, and the base has no layers to compute them.
        """
        if "multi_modal_inputs" in data.keys():  # noqa: SIM118 - a TensorDict iterates over its rows
            raise ConfigError(f"{KEY}: the hidden states of rows with images are not kept: leave it out")
        keys = _keys_of(data)
        missing = torch.tensor([not self.cache.has(keys)], dtype=torch.int32, device=get_device_id())
        torch.distributed.all_reduce(missing)
        self.reads_step = not missing.item()
        if self.reads_step:
            self.cache.prefetch(keys)
            return
        self.cache.forget_prefetched()
        if self.cache.is_complete:
            raise CheckpointError(
                f"{KEY}: {str(self.cache.folder)!r} lacks rows of these data although it is marked as complete: write "
                "them with verl-speculator data hidden-states"
            )

    def prefetch(self, input_ids: Tensor) -> None:
        """Begin to read the rows of a batch that is to come; nested, [B, lengths]."""
        self.cache.prefetch([row_key(row) for row in input_ids.unbind()])

    def states(self, micro_batch: TensorDict, run_base: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The states of a micro-batch, each [T, H], on this rank's device.

        Args:
            micro_batch: Rows of the step's batch.
            run_base: Computes them; called on all ranks or on none.
        """
        keys = _keys_of(micro_batch)
        start = _now()
        if self.reads_step:
            states = [state.to(get_device_id()) for state in self.cache.read(keys)]
            self._count(wait_seconds=_now() - start, saved_seconds=self.cache.seconds_saved(keys))
            return states
        states = run_base()
        if self._writes:
            lengths = micro_batch["input_ids"].offsets().diff().tolist()
            self.cache.write(keys, states, lengths, _now() - start)
        self._count(wait_seconds=0, saved_seconds=0)
        # What later epochs read is what this one learns from.
        return [state.to(self.cache.dtype) for state in states]

    def share(self) -> None:
        """Write what is in memory, and see what all ranks have written; every rank calls this."""
        self.cache.flush()
        torch.distributed.barrier()
        self.cache.find_new_shards()

    def _count(self, **counts: float) -> None:
        # Added up over the ranks, it is their mean.
        size = torch.distributed.get_world_size()
        self.sums = {f"{PREFIX}/{name}": torch.tensor(value / size) for name, value in counts.items()}


@contextmanager
def without_layers(hf_config: Any) -> Iterator[None]:
    """What is loaded meanwhile has embeddings, norm, `lm_head` and the first layer: verl shards nothing without one."""
    config = hf_config.get_text_config()
    kept = {name: getattr(config, name) for name in ("num_hidden_layers", "layer_types") if hasattr(config, name)}
    verbosity = logging.get_verbosity()
    # It would list the weights of every layer as unexpected.
    logging.set_verbosity_error()
    try:
        config.num_hidden_layers = 1
        if kept.get("layer_types"):
            config.layer_types = kept["layer_types"][:1]
        yield
    finally:
        logging.set_verbosity(verbosity)
        for name, value in kept.items():
            setattr(config, name, value)


def _keys_of(data: TensorDict) -> list[str]:
    return [row_key(row) for row in data["input_ids"].unbind()]


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
