"""What a rank of many sends in one step, counted on one process under torch's fake process group.

The engine runs as ever; collectives give back what was in their output's memory. Written is, for each case, how often
each collective was called and the bytes of its full tensors.

usage: traffic.py RANKS CASES.json OUTPUT.json       CASES.json: {name: [overrides]}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.integration.engine_cases import build_worker, rank_batch
from verl_speculator.trainer.sft_trainer import base_loss

# Which argument holds the tensor of all ranks together.
WHOLE = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "allreduce_": 0}


class Traffic(TorchDispatchMode):
    """Calls and bytes of each collective, those of up to 1 KiB apart: counts and losses."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, dict[str, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            whole = args[WHOLE[name]]
            size = sum(tensor.nbytes for tensor in (whole if isinstance(whole, list) else [whole]))
            entry = self.seen.setdefault(name if size > 1024 else "small", {"calls": 0, "bytes": 0})
            entry["calls"] += 1
            entry["bytes"] += size
        return func(*args, **(kwargs or {}))


def main() -> None:
    ranks, cases, output = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    os.environ |= {"WORLD_SIZE": str(ranks), "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "none", "MASTER_PORT": "0"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    report = {}
    for name, overrides in cases.items():
        worker, config = build_worker(overrides)
        rows = [(torch.arange(3, 35), torch.ones(32, dtype=torch.int64))] * 2 * ranks
        engine = worker.engine
        for _ in range(2):
            # The second step is one of many: what is gathered at first may stay so.
            with engine.train_mode(), Traffic() as traffic:
                engine.train_batch(rank_batch(rows, config, engine), base_loss)
        report[name] = {"traffic": traffic.seen}
    output.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
