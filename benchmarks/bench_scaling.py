"""How time and memory grow with tokens, heads, vocabulary and ranks: one of them is varied at a time.

    python benchmarks/bench_scaling.py --json scaling.json                     # all axes
    python benchmarks/bench_scaling.py --axes tokens vocab --variants stacked  # only these axes; `ours` is always there

Tokens, heads and vocabulary are those of the loss (`bench_loss.py`: its shapes, variants and columns, and a quarter of
its tokens where they are not what varies). Ranks are those of a whole step (`bench_step.py`) over the same global
batch, so 1.0 in `seconds_growth` at more ranks means that they bring nothing; on a CPU they share its cores.

`value_growth`, `seconds_growth` and `memory_growth` are over the first row of the same axis and variant: memory that
depends on the chunk alone keeps its growth near 1 when tokens or heads double. The memory of `ours` is the gradients
and one chunk of logits, so it grows with the vocabulary until chunks get fewer rows, and the gradients always do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_loss import Case, argument_parser, base_case, chosen_variants, measure
from common import describe_machine, print_table, versions

AXES = ("tokens", "heads", "vocab", "ranks")
COLUMNS = (
    *("axis", "value", "variant", "seconds_median", "ratio_to_stacked", "peak_extra_mb", "matmul_peak_fraction"),
    *("value_growth", "seconds_growth", "memory_growth"),
)


def cases(axis: str, args: argparse.Namespace) -> list[Case]:
    # A quarter of the tokens keeps this to minutes on a CPU; the shape of the curves is what it is for.
    base = base_case(args)
    base = dataclasses.replace(base, tokens=max(args.tokens // 4, base.sequence_length))
    values = {
        "tokens": [base.tokens, 2 * base.tokens, 4 * base.tokens],
        "heads": [1, base.heads, 2 * base.heads],
        "vocab": [base.vocab // 4, base.vocab, 4 * base.vocab],
    }[axis]
    return [dataclasses.replace(base, **{axis: value}) for value in values]


def rows_of_loss(axis: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    variants = chosen_variants(args)
    rows = []
    for case in cases(axis, args):
        rows += [{"axis": axis, "value": getattr(case, axis), **row} for row in measure(case, variants, args)]
    return rows


def rows_of_ranks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps of `ours` in processes of their own."""
    if args.device == "cpu":
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    else:
        available = torch.cuda.device_count()
    rows = []
    for ranks in (2**power for power in range(available.bit_length())):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "step.json")
            command = [sys.executable, str(Path(__file__).with_name("bench_step.py")), f"--json={report}"]
            command += [f"--nproc={ranks}", "--variants", "ours", f"--rounds={args.rounds}"]
            if args.peak_size:
                command.append(f"--peak-size={args.peak_size}")
            for name in ("tokens", "sequence_length", "vocab", "hidden", "heads", "width"):
                command.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
            command.append(f"--mask-fraction={args.mask_fractions[0]}")
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
            step = json.loads(report.read_text())["rows"][0]
            rows.append({"axis": "ranks", "value": ranks, **step, "variant": "ours: whole step"})
    return rows


def with_growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        start = first.setdefault(row["variant"], row)
        row["value_growth"] = row["value"] / start["value"]
        row["seconds_growth"] = row["seconds_median"] / start["seconds_median"]
        row["memory_growth"] = row["peak_extra_mb"] / start["peak_extra_mb"]
    return rows


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.set_defaults(rounds=2, variants=["stacked"])
    args = parser.parse_args()
    machine = describe_machine(torch.device(args.device))
    rows: list[dict[str, Any]] = []
    for axis in args.axes:
        new = with_growth(rows_of_ranks(args) if axis == "ranks" else rows_of_loss(axis, args))
        print_table(new, COLUMNS)
        sys.stdout.flush()
        rows += new
    print(f"\n{machine['device']}, {machine['cores']} cores, load average before {machine['load_average']}")
    if args.json:
        report = {
            "machine": machine,
            "versions": versions("torch", "verl", "transformers"),
            "rounds": args.rounds,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
