"""What both engines keep count of during a step, so that its loss and metrics are those of the whole global batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id

from verl_speculator.adapters import SpeculatorAdapter

SUMS_KEY = "sums"


class StepSums:
    """The losses and metrics of one step's micro-batches.

    Every rank records the same keys at least once, and what all ranks recorded adds up to the global batch.

    Attributes:
        head_counts: [n_predict], trained positions of each head in the global batch.
    """

    def __init__(self, adapter: SpeculatorAdapter, data: TensorDict, data_parallel_group: Any) -> None:
        head_counts = adapter.count_trained_positions(
            data["input_ids"].values(), data["loss_mask"].values(), data["input_ids"].offsets()
        )
        self.head_counts = head_counts.to(get_device_id())
        torch.distributed.all_reduce(self.head_counts, group=data_parallel_group)
        self._rows: list[dict[str, Tensor]] = []

    def record(self, sums: Mapping[str, Tensor], speculator_loss: Tensor, base_loss: Tensor | None) -> None:
        """Keep the sums and losses of a micro-batch.

        Args:
            sums: What the adapter counted.
            speculator_loss: This rank's part of it.
            base_loss: This rank's part of it in joint training, else None.
        """
        losses = {"speculator_loss": speculator_loss}
        if base_loss is not None:
            losses["base_loss"] = base_loss
        self._rows.append({name: value.detach() for name, value in {**sums, **losses}.items()})

    def output(self, data: TensorDict, loss_coeff: float) -> dict[str, Any]:
        """The engine's answer to a step: its loss and its sums, the same on every rank.

        Args:
            data: The step's batch, in which verl has noted its number of trained tokens.
            loss_coeff: The weight of the speculator's loss if the base trains too.
        """
        sums = reduce_sums(self._rows, get_device_id())
        loss = sums["speculator_loss"]
        if "base_loss" in sums:
            loss = sums["base_loss"] + loss_coeff * loss
            sums["base/count"] = float(tu.get_non_tensor_data(data=data, key="batch_num_tokens", default=0))
            sums["base/loss_sum"] = sums["base_loss"] * sums["base/count"]
        return {"model_output": {}, "loss": [loss], "metrics": {SUMS_KEY: sums}}


def reduce_sums(per_micro_batch: Sequence[Mapping[str, Tensor]], device: Any) -> dict[str, float]:
    """Add up metrics that have the same keys in every micro-batch and on every rank, in one collective."""
    names = list(per_micro_batch[0])
    # float64, so that counts of tokens stay exact.
    rows = [torch.stack([sums[name].double() for name in names]) for sums in per_micro_batch]
    total = torch.stack(rows).sum(dim=0).to(device)
    torch.distributed.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))
