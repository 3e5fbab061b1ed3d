"""Speed and memory of the training objective: forward and backward of a speculator's chain and loss.

    python benchmarks/bench_loss.py --json loss.json    # the default table: 7 minutes on 2 cores
    python benchmarks/bench_loss.py --device cuda --dtype bfloat16 --vocab 128256 --tokens 8192

How time and memory grow with tokens, heads, vocabulary and ranks: `bench_scaling.py`.

The package must be importable: `pip install -e .`, or `PYTHONPATH=.` in front of the command.

Variants, all with the same MLP speculator, the same tokens and the same loss (checked before anything is timed):

- `stacked`: the logits of all heads at all positions as one tensor, then a cross entropy per head.
- `ours`: `verl_speculator.losses.speculator_loss`.
- `torch_linear_cross_entropy`: the chain on all positions, then torch's chunked function on each head's trained rows.
- `liger`: the same with Liger's fused kernel; CUDA only, and only where `liger_kernel` is installed.

Every round times every variant once, so that a slower minute of the machine hits all of them. `ratio_to_stacked` is
the median over rounds of stacked's time over the variant's. `matmul_peak_fraction` counts the 3 vocabulary products of
the trained rows (2·N·D·V each) against `torch.matmul`'s peak in the same round; the chain counts as overhead.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    MIB,
    add_peak_size,
    describe_machine,
    matmul_peak,
    peak_extra_bytes,
    print_table,
    seconds,
    versions,
)
from stacked import chain_outputs, stacked_loss
from torch import Tensor

from verl_speculator.losses import PackedHiddenStates, head_targets, speculator_loss, trained_positions
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig

COLUMNS = (
    *("variant", "mask_fraction", "tokens", "heads", "vocab", "seconds_median", "seconds_min", "seconds_max"),
    *("ratio_to_stacked", "peak_extra_mb", "matmul_peak_fraction"),
)


@dataclass(frozen=True)
class Case:
    mask_fraction: float
    tokens: int
    sequence_length: int
    heads: int
    vocab: int
    hidden: int
    width: int
    untied: bool
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Workload:
    speculator: MLPSpeculator
    packed: PackedHiddenStates
    trained: Tensor  # [heads, tokens]
    chunk_size: int | None


def build(case: Case, chunk_size: int | None) -> Workload:
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(
        input_hidden_dim=case.hidden,
        inner_dim=case.width,
        vocab_size=case.vocab,
        n_predict=case.heads,
        tie_weights=not case.untied,
    )
    offsets = [*range(0, case.tokens, case.sequence_length), case.tokens]
    position = torch.arange(case.tokens) % case.sequence_length
    packed = PackedHiddenStates(
        hidden_states=torch.randn(case.tokens, case.hidden).to(case.device, case.dtype),
        input_ids=torch.randint(case.vocab, (case.tokens,)).to(case.device),
        # A prompt that is not trained and a response that is.
        loss_mask=(position >= case.sequence_length * (1 - case.mask_fraction)).long().to(case.device),
        cu_seqlens=torch.tensor(offsets).to(case.device),
    )
    trained = trained_positions(packed.loss_mask, packed.cu_seqlens, case.heads)
    return Workload(MLPSpeculator(config).to(case.device, case.dtype), packed, trained, chunk_size)


def plain_loss(work: Workload) -> Tensor:
    return stacked_loss(work.speculator, work.packed)


def our_loss(work: Workload) -> Tensor:
    return speculator_loss(work.speculator, work.packed, chunk_size=work.chunk_size).loss


def per_head_loss(function: Callable[[Tensor, Tensor, Tensor], Tensor], work: Workload) -> Tensor:
    """`function(states [N, D], weight [V, D], targets [N])`, a mean, on each head's trained rows."""
    losses = []
    for i, output in enumerate(chain_outputs(work.speculator, work.packed)):
        rows = work.trained[i].nonzero().squeeze(1)
        targets = head_targets(work.packed.input_ids, rows, i)
        losses.append(function(output.index_select(0, rows), work.speculator.head_weight(i), targets))
    return torch.stack(losses).mean()


def torch_function(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(states, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def liger_function(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, states, targets)


def available_variants(device: torch.device) -> dict[str, Callable[[Workload], Tensor]]:
    variants: dict[str, Callable[[Workload], Tensor]] = {"stacked": plain_loss, "ours": our_loss}
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        variants["torch_linear_cross_entropy"] = partial(per_head_loss, torch_function)
    else:
        print(f"torch_linear_cross_entropy is left out: torch {torch.__version__} lacks it; 2.13 has it.")
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        variants["liger"] = partial(per_head_loss, liger_function)
    else:
        print("liger is left out: it needs CUDA and an installed liger_kernel.")
    return variants


def chosen_variants(args: argparse.Namespace) -> dict[str, Callable[[Workload], Tensor]]:
    variants = available_variants(torch.device(args.device))
    wanted = {*args.variants, "ours"} if args.variants else set(variants)
    return {name: variant for name, variant in variants.items() if name in wanted}


def step(variant: Callable[[Workload], Tensor], work: Workload) -> Tensor:
    work.speculator.zero_grad(set_to_none=True)
    loss = variant(work)
    loss.backward()
    return loss.detach()


def measure(case: Case, variants: dict[str, Callable[[Workload], Tensor]], args: argparse.Namespace) -> list[dict]:
    work = build(case, args.chunk_size)
    losses: dict[str, float] = {}
    peaks = {}
    for name, variant in variants.items():
        work.speculator.zero_grad(set_to_none=True)

        def warm_up(name: str = name, variant: Callable[[Workload], Tensor] = variant) -> None:
            losses[name] = step(variant, work).item()

        peaks[name] = peak_extra_bytes(warm_up, case.device)
    tolerance = 1e-4 if case.dtype == torch.float32 else 2e-2
    wrong = {name: loss for name, loss in losses.items() if abs(loss - losses["ours"]) > tolerance * losses["ours"]}
    if wrong:
        raise RuntimeError(f"The variants do not compute the same loss: {losses}.")

    times: dict[str, list[float]] = {name: [] for name in variants}
    flops = []
    for _ in range(args.rounds):
        flops.append(matmul_peak(case.dtype, case.device, args.peak_size))
        for name, variant in variants.items():
            times[name].append(seconds(partial(step, variant, work), case.device))
    products = 3 * 2 * int(work.trained.sum()) * case.width * case.vocab
    return [summarise(case, name, times, flops, products, peaks[name]) for name in variants]


def summarise(
    case: Case, name: str, times: dict[str, list[float]], flops: list[float], products: int, peak: int
) -> dict[str, Any]:
    mine = times[name]
    shape = {key: str(value) if key in ("dtype", "device") else value for key, value in vars(case).items()}
    ratios = [other / own for other, own in zip(times.get("stacked", mine), mine, strict=True)]
    return {
        "variant": name,
        **shape,
        "seconds_median": statistics.median(mine),
        "seconds_min": min(mine),
        "seconds_max": max(mine),
        "ratio_to_stacked": statistics.median(ratios) if "stacked" in times else None,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_extra_mb": peak / MIB,
        "matmul_peak_fraction": statistics.median(
            products / (own * peak_flops) for own, peak_flops in zip(mine, flops, strict=True)
        ),
        "matmul_peak_gflops": statistics.median(flops) / 1e9,
    }


def base_case(args: argparse.Namespace) -> Case:
    """The case of the arguments, with the first of the mask fractions."""
    return Case(
        mask_fraction=args.mask_fractions[0],
        tokens=args.tokens,
        sequence_length=min(args.sequence_length, args.tokens),
        heads=args.heads,
        vocab=args.vocab,
        hidden=args.hidden,
        width=args.width,
        untied=args.untied,
        dtype=getattr(torch, args.dtype),
        device=torch.device(args.device),
    )


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write rows, machine and versions to this file")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--mask-fractions", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    add_peak_size(parser)
    parser.add_argument("--untied", action="store_true", help="a vocabulary matrix of its own for every head")
    parser.add_argument("--chunk-size", type=int, help="rows of logits at a time in `ours`; chosen when left out")
    parser.add_argument("--variants", nargs="+", help="only these")
    return parser


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    machine = describe_machine(torch.device(args.device))
    variants = chosen_variants(args)
    rows: list[dict[str, Any]] = []
    for fraction in args.mask_fractions:
        rows += measure(dataclasses.replace(base_case(args), mask_fraction=fraction), variants, args)
        print_table(rows[-len(variants) :], COLUMNS)
        sys.stdout.flush()
    print(f"\n{machine['device']}, {machine['cores']} cores, load average before {machine['load_average']}")
    if args.json:
        report = {
            "machine": machine,
            "versions": versions("torch", "liger_kernel"),
            "rounds": args.rounds,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
