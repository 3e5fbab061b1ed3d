"""How a tensor-parallel group can share the speculator's vocabulary product and loss: by rows or by vocabulary.

    python benchmarks/bench_tensor_parallel.py --json tp.json                      # 2 processes: 3 minutes on 2 cores
    python benchmarks/bench_tensor_parallel.py --device cuda --dtype bfloat16 --nproc 8 --width 4096 --vocab 128256

The package must be importable: `pip install -e .`, or `PYTHONPATH=.` in front of the command.

Every rank has the speculator's output states of all trained rows of all heads, which are tied. Timed are loss and
gradients of states and weight, from a sharded weight to its sharded gradient:

- `rows`: what the engines do. FSDP2 gathers the weight, each rank computes its share of the rows with
  `verl_speculator.losses.linear_cross_entropy`, and FSDP2 reduce-scatters the weight's gradient.
- `vocabulary`: each rank keeps its part of the weight and computes all rows with it (`vocab_parallel.py`).
- `whole`: one process, with the whole weight, computes all rows while the others wait.

Before anything is timed, the three are compared with torch's cross entropy in float64 on small tensors, and their
losses with one another at the measured size. Every round times each variant once, in alternating order; a time is that
of the slowest rank. `ratio_to_rows` and `ratio_to_whole` are medians over rounds of the other's time over the
variant's. `matmul_peak_fraction` counts the 3 vocabulary products (2·N·D·V each) against `torch.matmul`'s peak in the
same round, measured on as many ranks at once as the variant uses and added up. `peak_extra_mb` is that of the largest
rank, in torch's allocator: the gathered weight is in it, buffers of the communication library are not.

A step has one or more micro-batches, whose gradients add up: `rows` then gathers the weight and reduces its gradient
once a step, as the engine does, while `vocabulary` communicates in every micro-batch.

`sent_mb` is computed: what a rank sends in a step where collectives run as rings, which is the least they can send. It
does not depend on the number of rows for `rows`, nor on the vocabulary for `vocabulary`. The chain
before the product is not in here: shared rows share it too, with a shared vocabulary each rank runs it on all rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import (
    MIB,
    add_peak_size,
    describe_machine,
    load_average,
    matmul_peak,
    peak_extra_bytes,
    print_table,
    seconds,
    versions,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from vocab_parallel import vocab_parallel_cross_entropy

from verl_speculator.losses import linear_cross_entropy

COLUMNS = (
    *(
        "variant",
        "micro_batches",
        "ranks",
        "trained_rows",
        "vocab",
        "width",
        "seconds_median",
        "seconds_min",
        "seconds_max",
    ),
    *("ratio_to_rows", "ratio_to_whole", "peak_extra_mb", "sent_mb", "matmul_peak_fraction"),
)
VARIANTS = ("rows", "vocabulary", "whole")


@dataclass(frozen=True)
class Case:
    rows: int  # N, of all heads together, in a micro-batch
    width: int
    vocab: int
    dtype: torch.dtype  # of the products; weights are float32, or float64 with it
    device: torch.device
    chunk_size: int | None = None
    micro_batches: int = 1

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


@dataclass(frozen=True)
class Inputs:
    """The same on every rank."""

    states: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    row_weights: Tensor  # [N]


def random_inputs(case: Case, logit_scale: float = 1.0) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(case.rows, case.width, generator=generator) * logit_scale
    weight = torch.randn(case.vocab, case.width, generator=generator, dtype=case.weight_dtype) / case.width**0.5
    targets = torch.randint(case.vocab, (case.rows,), generator=generator)
    return Inputs(
        states.to(case.device, case.dtype),
        weight.to(case.device),
        targets.to(case.device),
        torch.full((case.rows,), 1 / case.rows, dtype=case.weight_dtype, device=case.device),
    )


class Head(nn.Module):
    """A vocabulary matrix whose forward is the loss, so that FSDP gathers it around the loss."""

    def __init__(self, weight: Tensor, chunk_size: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self._chunk_size = chunk_size

    def forward(self, states: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
        weight = self.weight.to(states.dtype)
        return linear_cross_entropy(states, weight, targets, row_weights, chunk_size=self._chunk_size).loss


class Variant(ABC):
    """A way to compute loss and gradients, with its own copies of states and weight, or of the rank's part of them."""

    states: Tensor
    head: nn.Module  # its parameter is `weight`
    micro_batches: int

    def step(self) -> Tensor:
        """The loss, where other ranks have other parts of it the rank's own part. Leaves gradients behind."""
        self.forget_gradients()
        losses = [self.run(is_last=index == self.micro_batches - 1) for index in range(self.micro_batches)]
        return torch.stack(losses).sum()

    def forget_gradients(self) -> None:
        self.states.grad = self.head.weight.grad = None

    @abstractmethod
    def run(self, is_last: bool) -> Tensor:
        """A micro-batch, which adds to the gradients."""

    @abstractmethod
    def gradients(self) -> tuple[Tensor, Tensor]:
        """Those of all states and of the whole weight, on every rank."""


class WholeHead(Variant):
    """One rank computes all rows."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.head = Head(inputs.weight, case.chunk_size)
        self._inputs = inputs
        self.micro_batches = case.micro_batches
        self.states = inputs.states.clone().requires_grad_()

    def run(self, is_last: bool) -> Tensor:
        loss = self.head(self.states, self._inputs.targets, self._inputs.row_weights)
        loss.backward()
        return loss.detach()

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.states.grad, self.head.weight.grad


class SharedRows(Variant):
    """Each rank computes its share of the rows; the weight is sharded by FSDP2 as the engines shard theirs."""

    def __init__(self, case: Case, inputs: Inputs, mesh: DeviceMesh) -> None:
        self._ranks, rank = mesh.size(), mesh.get_local_rank()
        self._share = slice(case.rows * rank // self._ranks, case.rows * (rank + 1) // self._ranks)
        self._targets = inputs.targets[self._share]
        # FSDP takes the mean over ranks, of which the sum is wanted.
        self._row_weights = inputs.row_weights[self._share] * self._ranks
        self.states = inputs.states[self._share].clone().requires_grad_()
        self.head = Head(inputs.weight, case.chunk_size)
        policy = MixedPrecisionPolicy(param_dtype=case.dtype, reduce_dtype=case.weight_dtype)
        fully_shard(self.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self._num_rows, self.micro_batches = case.rows, case.micro_batches

    def run(self, is_last: bool) -> Tensor:
        self.head.set_requires_gradient_sync(is_last)
        self.head.set_reshard_after_backward(is_last)
        loss = self.head(self.states, self._targets, self._row_weights)
        loss.backward()
        return loss.detach() / self._ranks

    def gradients(self) -> tuple[Tensor, Tensor]:
        grad_states = self.states.new_zeros(self._num_rows, self.states.shape[1])
        grad_states[self._share] = self.states.grad / self._ranks
        dist.all_reduce(grad_states)
        return grad_states, self.head.weight.grad.full_tensor()


class SharedVocabulary(Variant):
    """Each rank computes all rows with its part of the weight."""

    def __init__(self, case: Case, inputs: Inputs, mesh: DeviceMesh) -> None:
        self._group = mesh.get_group()
        self._inputs = inputs
        self._chunk_size, self.micro_batches = case.chunk_size, case.micro_batches
        self.head = nn.Module()
        self.head.weight = nn.Parameter(inputs.weight.chunk(mesh.size())[mesh.get_local_rank()].clone())
        self.states = inputs.states.clone().requires_grad_()
        self._share_of_loss = 1 / mesh.size()

    def run(self, is_last: bool) -> Tensor:
        loss, self.correct = vocab_parallel_cross_entropy(
            self.states,
            self.head.weight.to(self.states.dtype),
            self._inputs.targets,
            self._inputs.row_weights,
            self._group,
            chunk_size=self._chunk_size,
        )
        loss.backward()
        return loss.detach() * self._share_of_loss

    def gradients(self) -> tuple[Tensor, Tensor]:
        parts = [torch.empty_like(self.head.weight) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self.head.weight.grad)
        return self.states.grad, torch.cat(parts)


def build(case: Case, inputs: Inputs, mesh: DeviceMesh) -> dict[str, Variant]:
    return {
        "rows": SharedRows(case, inputs, mesh),
        "vocabulary": SharedVocabulary(case, inputs, mesh),
        "whole": WholeHead(case, inputs),
    }


def check_in_float64(mesh: DeviceMesh, device: torch.device) -> dict[str, float]:
    """The largest difference of each variant's loss and gradients from those of torch's cross entropy.

    The rows do not fill their chunks, and logits reach into the hundreds, where one rank's part of a row is nothing
    next to another's.
    """
    case = Case(rows=37, width=24, vocab=12 * mesh.size(), dtype=torch.float64, device=device, chunk_size=8)
    differences = dict.fromkeys(VARIANTS, 0.0)
    for logit_scale in (1.0, 100.0):
        inputs = random_inputs(case, logit_scale)
        states, weight = (tensor.clone().requires_grad_() for tensor in (inputs.states, inputs.weight))
        logits = states @ weight.t()
        # Some rows are right.
        inputs.targets[::2] = logits.argmax(dim=1)[::2]
        expected_loss = F.cross_entropy(logits, inputs.targets)
        expected_loss.backward()
        for name, variant in build(case, inputs, mesh).items():
            computed = (whole_loss(name, variant), *variant.gradients())
            for value, expected in zip(computed, (expected_loss.detach(), states.grad, weight.grad), strict=True):
                difference = (value - expected).abs().max() / expected.abs().max()
                differences[name] = max(differences[name], difference.item())
            if isinstance(variant, SharedVocabulary) and not variant.correct.equal(logits.argmax(1) == inputs.targets):
                raise RuntimeError("The shared vocabulary finds other rows right than argmax.")
    if max(differences.values()) > 1e-10:
        raise RuntimeError(f"The variants do not compute what torch's cross entropy does: {differences}.")
    return differences


def whole_loss(name: str, variant: Variant) -> float:
    """The sum of the ranks' parts; `whole` is computed on every rank here, and only the first one's counts."""
    loss = variant.step()
    if name == "whole":
        loss = loss * (dist.get_rank() == 0)
    dist.all_reduce(loss)
    return loss.item()


def over_ranks(value: float, device: torch.device, operation: Any) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=operation)
    return tensor.item()


def slowest(run: Callable[[], object], device: torch.device, takes_part: bool) -> float:
    """Seconds of the slowest rank; those that take no part wait."""
    dist.barrier()
    own = seconds(run, device) if takes_part else 0.0
    return over_ranks(own, device, dist.ReduceOp.MAX)


def peak_of_ranks(case: Case, size: int | None, takes_part: bool) -> float:
    """Matmul peak of the ranks that take part, at the same time."""
    dist.barrier()
    own = matmul_peak(case.dtype, case.device, size) if takes_part else 0.0
    return over_ranks(own, case.device, dist.ReduceOp.SUM)


def measure(case: Case, mesh: DeviceMesh, rounds: int, peak_size: int | None) -> list[dict[str, Any]]:
    is_first = dist.get_rank() == 0
    variants = build(case, random_inputs(case), mesh)
    takes_part = {name: is_first or name != "whole" for name in variants}
    losses = {name: whole_loss(name, variant) for name, variant in variants.items()}
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-4
    if any(abs(loss - losses["whole"]) > tolerance * losses["whole"] for loss in losses.values()):
        raise RuntimeError(f"The variants do not compute the same loss: {losses}.")

    peaks, times = {}, {name: [] for name in variants}
    flops: dict[str, list[float]] = {name: [] for name in variants}
    for name, variant in variants.items():
        variant.forget_gradients()
        dist.barrier()
        own = peak_extra_bytes(variant.step, case.device) if takes_part[name] else 0
        peaks[name] = over_ranks(own, case.device, dist.ReduceOp.MAX)
    for round_index in range(rounds):
        of_all, of_one = (peak_of_ranks(case, peak_size, part) for part in (True, is_first))
        for name in reversed(variants) if round_index % 2 else variants:
            times[name].append(slowest(variants[name].step, case.device, takes_part[name]))
            flops[name].append(of_one if name == "whole" else of_all)
    return [
        {**summarise(case, times, flops, name), "peak_extra_mb": peaks[name] / MIB, "loss": losses[name]}
        for name in variants
    ]


def summarise(case: Case, times: dict[str, list[float]], flops: dict[str, list[float]], name: str) -> dict[str, Any]:
    mine = times[name]
    ratios = {
        other: [theirs / own for theirs, own in zip(times[other], mine, strict=True)] for other in ("rows", "whole")
    }
    products = 3 * 2 * case.rows * case.width * case.vocab * case.micro_batches
    fractions = [products / (own * peak) for own, peak in zip(mine, flops[name], strict=True)]
    return {
        "variant": name,
        "micro_batches": case.micro_batches,
        "ranks": 1 if name == "whole" else dist.get_world_size(),
        "trained_rows": case.rows,
        "vocab": case.vocab,
        "width": case.width,
        "dtype": str(case.dtype),
        "device": str(case.device.type),
        "seconds_median": statistics.median(mine),
        "seconds_min": min(mine),
        "seconds_max": max(mine),
        "seconds": mine,
        **{
            f"ratio_{kind}to_{other}": function(values)
            for other, values in ratios.items()
            for kind, function in (("", statistics.median), ("min_", min), ("max_", max))
        },
        "sent_mb": sent_bytes(case, name) / MIB,
        "matmul_peak_fraction": statistics.median(fractions),
        "matmul_peak_gflops": statistics.median(flops[name]) / 1e9,
    }


def sent_bytes(case: Case, name: str) -> float:
    """What one rank sends to others in a step, if collectives are rings."""
    ranks = dist.get_world_size()
    if name == "whole":
        return 0
    others = (ranks - 1) / ranks
    if name == "rows":
        return others * case.vocab * case.width * (case.dtype.itemsize + case.weight_dtype.itemsize)
    # An all-reduce is a reduce-scatter and an all-gather. Each row's three numbers go to every other rank.
    numbers = (ranks - 1) * 3 * case.rows * case.weight_dtype.itemsize
    return case.micro_batches * (2 * others * case.rows * case.width * case.dtype.itemsize + numbers)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write rows, machine and versions to this file")
    parser.add_argument("--nproc", type=int, default=2, help="ranks of the group")
    parser.add_argument("--tokens", type=int, default=2048, help="in a micro-batch")
    parser.add_argument("--mask-fraction", type=float, default=0.5, help="share of the tokens that is trained")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4], help="numbers of them in a step")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each process on a CPU, the only one of `whole` too")
    parser.add_argument("--rounds", type=int, default=5)
    add_peak_size(parser)
    parser.add_argument("--chunk-size", type=int, help="rows of logits at a time; chosen when left out")
    args = parser.parse_args()
    if args.nproc < 2:
        parser.error("--nproc must be at least 2: one process has nothing to share.")
    if args.vocab % args.nproc:
        parser.error(f"--vocab must be a multiple of --nproc; got {args.vocab} and {args.nproc}.")
    if args.device == "cuda" and torch.cuda.device_count() < args.nproc:
        parser.error(f"--nproc {args.nproc} needs as many GPUs; there are {torch.cuda.device_count()}.")
    return args


def run_rank(rank: int, args: argparse.Namespace, load: list[float], rendezvous: str) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    store = dist.FileStore(rendezvous, args.nproc)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", store=store, rank=rank, world_size=args.nproc)
    mesh = init_device_mesh(args.device, (args.nproc,))
    case = Case(
        rows=args.heads * round(args.tokens * args.mask_fraction),
        width=args.width,
        vocab=args.vocab,
        dtype=getattr(torch, args.dtype),
        device=device,
        chunk_size=args.chunk_size,
    )
    differences = check_in_float64(mesh, device)
    rows = []
    for number in args.micro_batches:
        rows += measure(replace(case, micro_batches=number), mesh, args.rounds, args.peak_size)
    if rank == 0:
        # Now the load average would be that of this run.
        report(rows, differences, args, describe_machine(device) | {"load_average": load})
    dist.barrier()
    dist.destroy_process_group()


def report(
    rows: list[dict[str, Any]], differences: dict[str, float], args: argparse.Namespace, machine: dict[str, Any]
) -> None:
    print_table(rows, COLUMNS)
    print(f"\n{machine['device']}, {machine['cores']} cores, load average before {machine['load_average']}")
    if args.json:
        whole = {
            "machine": machine,
            "versions": versions("torch"),
            "rounds": args.rounds,
            "float64_difference": differences,
            "rows": [{"tokens": args.tokens, "heads": args.heads, **row} for row in rows],
        }
        args.json.write_text(json.dumps(whole, indent=2) + "\n")


def main() -> None:
    args = parse_arguments()
    # A copy of this process has torch loaded, but may not use CUDA.
    start_method = "spawn" if args.device == "cuda" else "fork"
    with tempfile.TemporaryDirectory() as folder:
        arguments = (args, load_average(), str(Path(folder, "rendezvous")))
        torch.multiprocessing.start_processes(run_rank, arguments, args.nproc, start_method=start_method)


if __name__ == "__main__":
    main()
