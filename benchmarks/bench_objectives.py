"""What learning the target's own distribution costs beside hard labels, at the shapes of `bench_loss.py`.

    python benchmarks/bench_objectives.py --json objectives.json    # 8 minutes on 2 cores
    python benchmarks/bench_objectives.py --device cuda --dtype bfloat16 --vocab 128256 --tokens 8192 --hidden 4096

Forward and backward of the same speculator on the same tokens with each objective. Every round times every objective
once; `ratio_to_ce` is the median over rounds of an objective's time over that of `ce`. The target's vocabulary product
is one more for each position, of width `--hidden`, beside the three of width `--width` of each head.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from functools import partial
from typing import Any

import torch
from bench_loss import Workload, argument_parser, base_case, build, step
from common import MIB, describe_machine, peak_extra_bytes, print_table, seconds, versions
from torch import Tensor

from verl_speculator.losses import Objective, speculator_loss

OBJECTIVES = ("ce", "kl", "rkl", "tv", "lk")
COLUMNS = (
    *("objective", "weights", "mask_fraction", "tokens", "heads", "vocab", "hidden", "seconds_median"),
    *("ratio_to_ce", "ratio_min", "ratio_max", "peak_extra_mb"),
)


def loss_of(name: str, head_loss_weights: str | None, work: Workload) -> Tensor:
    return speculator_loss(
        work.speculator,
        work.packed,
        objective=Objective({name: 1.0}),
        head_loss_weights=head_loss_weights,
        chunk_size=work.chunk_size,
    ).loss


def measure(work: Workload, case: Any, rounds: int) -> list[dict[str, Any]]:
    variants: list[tuple[str, str | None]] = [*((name, None) for name in OBJECTIVES), ("lk", "adaptive")]
    losses = [partial(loss_of, *variant) for variant in variants]
    peaks = [peak_extra_bytes(partial(step, loss, work), case.device) for loss in losses]
    times = [[seconds(partial(step, loss, work), case.device) for loss in losses] for _ in range(rounds)]
    rows = []
    for i, (name, weights) in enumerate(variants):
        ratios = [one_round[i] / one_round[0] for one_round in times]
        rows.append(
            {
                "objective": name,
                "weights": weights or "alike",
                **{key: str(value) if key in ("dtype", "device") else value for key, value in vars(case).items()},
                "seconds_median": statistics.median(one_round[i] for one_round in times),
                "ratio_to_ce": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "peak_extra_mb": peaks[i] / MIB,
            }
        )
    return rows


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    machine = describe_machine(torch.device(args.device))
    rows: list[dict[str, Any]] = []
    for fraction in args.mask_fractions:
        case = dataclasses.replace(base_case(args), mask_fraction=fraction)
        work = build(case, args.chunk_size)
        work.packed.lm_head_weight = (torch.randn(case.vocab, case.hidden) / case.hidden**0.5).to(
            case.device, case.dtype
        )
        rows += measure(work, case, args.rounds)
        print_table(rows[-len(OBJECTIVES) - 1 :], COLUMNS)
        sys.stdout.flush()
    print(f"\n{machine['device']}, {machine['cores']} cores, load average before {machine['load_average']}")
    if args.json:
        report = {"machine": machine, "versions": versions("torch"), "rounds": args.rounds, "rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
