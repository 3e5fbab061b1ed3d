"""A whole training step of a frozen base, against the same step with the stacked-logits formula, and where it goes.

    python benchmarks/bench_step.py --json step.json              # one process
    python benchmarks/bench_step.py --nproc 2 --json step2.json   # sharded over two processes
    python benchmarks/bench_step.py --hidden 4096 --layers 32 --intermediate 14336 --width 4096 --vocab 128256
    python benchmarks/bench_step.py --shapes smollm2 --variants ours dense_mask --rounds 3   # 16 rows of uneven lengths

It takes an accelerator where there is one. `key=value` is a setting of the run, such as `engine.strategy=fsdp`.

The engine is the real one (`FSDPEngineWithLMHeadAndSpeculator`, driven by `SpeculatorTrainingWorker.train_batch`), and
the base a randomly initialised Qwen2-style model. Reading and collating data are not part of the step. Variants:

- `ours`: the adapter that users get.
- `stacked`: an adapter whose loss is the stacked formula (`stacked.py`); all else is the same, its own engine included.
- `dense_mask`: as `ours`, but packed sequences attend through transformers' mask of all tokens by all tokens.
- `each`: as `ours`, but the speculator is gathered and its gradient reduced in every micro-batch and not once a step.
- `compiled`: as `ours`, with `model.compile`; the untimed steps compile.
- `cached`: as `ours`, with the base's hidden states from a folder (`data.hidden_states_cache`), into which an untimed
  step wrote them. How long that took beside the step, and how many epochs outweigh it, is given too.

All must report the same loss before they are timed. Each round times each once, in alternating order, and measures
the machine's matmul peak, on all ranks at once. `ratio_to_stacked` is the median over rounds of stacked's time over the
variant's. `matmul_peak_fraction` counts the base's layers once for each token and three vocabulary products for each
trained row; the chain and attention scores count as overhead.

The split comes from further steps of `ours`, in which spans are recorded around calls (`spans.py`). A span's time is
exclusive, so the parts add up to the step:

- `backbone`: the base's forward pass.
- `states`: the speculator's chain, forward and backward, with the embedding's gradient.
- `vocabulary`: `linear_cross_entropy`, and its part of the backward pass.
- `optimizer`: zeroing, clipping (also given alone as `clipping`) and the optimizer's step.
- `communication`: collectives, and FSDP's gathering, scattering and copying of shards around them.
- `rest`: what is left, also given by name in `rest_parts`.

`outside_fraction` is communication and rest over the step: the target is at most 0.10.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from random_base import BaseShape
from spans import SpanRecorder

COLUMNS = (
    *("variant", "ranks", "mask_fraction", "tokens", "heads", "vocab", "seconds_median", "seconds_min", "seconds_max"),
    *("tokens_per_second", "ratio_to_stacked", "peak_extra_mb", "matmul_peak_fraction"),
)
ADAPTERS = {
    "ours": {
        "mlp": "verl_speculator.adapters.MLPSpeculatorAdapter",
        "rnn": "verl_speculator.adapters.LSTMSpeculatorAdapter",
        "lstm": "verl_speculator.adapters.LSTMSpeculatorAdapter",
    },
    "stacked": {"mlp": "stacked.StackedMLPAdapter", "rnn": "stacked.StackedLSTMAdapter"},
}
ADAPTERS["stacked"]["lstm"] = ADAPTERS["stacked"]["rnn"]
VARIANTS = {
    "ours": [],
    "stacked": [],
    "dense_mask": ["model.attend_by_sequence=false"],
    "each": ["model.gather_speculator_once=false"],
    "compiled": ["model.compile=true"],
    "cached": [],
}

# A published small model with its head counts, and the step on it that the field notes of this package are about.
SHAPES = {
    "smollm2": {
        "base": BaseShape(49152, 576, 30, 1536, attention_heads=9, key_value_heads=3, family="llama"),
        "arguments": {"speculator": "lstm", "width": 384, "heads": 3, "tokens": 2704, "sequence_length": 169}
        | {"mask_fraction": 0.62, "uneven": True},
    }
}

PARTS = ("backbone", "states", "vocabulary", "optimizer", "communication", "rest")
LOAD_BEFORE = "BENCH_STEP_LOAD_BEFORE"
COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "broadcast_object_list", "barrier", "gather", "scatter", "all_to_all"),
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object", "all_gather_tensor"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "wait_tensor"),
)
# What FSDP2 does around its collectives; checked on torch 2.13, and on another torch it may be counted elsewhere.
FSDP_CALLS = (
    *("unshard", "wait_for_unshard", "reshard", "pre_forward", "post_forward", "pre_backward", "post_backward"),
    "finalize_backward",
)


class Training:
    """One engine with its worker, as a trainer builds it, and this rank's share of a batch."""

    def __init__(self, variant: str, base: Path, args: argparse.Namespace) -> None:
        from verl.utils.config import omega_conf_to_dataclass
        from verl.utils.device import get_device_name
        from verl.workers.config import TrainingWorkerConfig

        from verl_speculator.checkpoint.hidden_states import StatesCacheSettings
        from verl_speculator.engine.model_config import MODEL_TYPE
        from verl_speculator.trainer.config.compose import load_config
        from verl_speculator.trainer.config.devices import apply_device
        from verl_speculator.trainer.sft_trainer import base_loss
        from verl_speculator.trainer.worker import SpeculatorTrainingWorker

        self.config = load_config(_overrides(variant, base, args))
        apply_device(self.config)
        self.worker = SpeculatorTrainingWorker(
            TrainingWorkerConfig(
                model_type=MODEL_TYPE,
                model_config=omega_conf_to_dataclass(self.config.model),
                engine_config=omega_conf_to_dataclass(self.config.engine),
                optimizer_config=omega_conf_to_dataclass(self.config.optim),
                checkpoint_config=omega_conf_to_dataclass(self.config.checkpoint),
                profiler_config=omega_conf_to_dataclass(self.config.profiler),
            )
        )
        self.worker.set_loss_fn(base_loss)
        if variant == "cached":
            dtype = "float32" if get_device_name() == "cpu" else "bfloat16"
            (base / "states").mkdir(exist_ok=True)
            self.worker.use_states_cache(StatesCacheSettings(str(base / "states"), dtype))
        self.worker.reset()
        self._rows = random_rows(args)[dist.get_rank() :: dist.get_world_size()]

    @property
    def engine(self) -> Any:
        return self.worker.engine

    def batch(self) -> Any:
        """A new one for each step, since a step changes what it gets."""
        from tensordict.tensorclass import NonTensorData
        from verl.utils import tensordict_utils as tu
        from verl.utils.dataset.dataset_utils import SFTTensorCollator

        items = [
            {"input_ids": ids, "loss_mask": mask, "position_ids": torch.arange(ids.numel())} for ids, mask in self._rows
        ]
        data = self.config.data
        settings = {
            "use_remove_padding": self.config.model.use_remove_padding,
            "use_dynamic_bsz": data.use_dynamic_bsz,
            "max_token_len_per_gpu": data.max_token_len_per_gpu,
            "micro_batch_size_per_gpu": data.micro_batch_size_per_gpu,
            "temperature": 1.0,
            "global_batch_size": len(self._rows) * dist.get_world_size(),
            "pad_mode": data.pad_mode,
            "pad_token_id": 0,
            "update_lr_scheduler": True,
            "global_token_num": NonTensorData([ids.numel() for ids, _ in self._rows] * dist.get_world_size()),
        }
        return tu.get_tensordict(tensor_dict=SFTTensorCollator("no_padding")(items), non_tensor_dict=settings)

    def step(self, batch: Any) -> float:
        from verl.utils import tensordict_utils as tu

        return float(tu.get(self.worker.train_batch(data=batch), "metrics")["loss"])

    def seconds(self, device: torch.device) -> float:
        batch = self.batch()
        dist.barrier()
        return seconds(partial(self.step, batch), device)

    def split(self, device: torch.device) -> dict[str, float]:
        """Seconds of one step by span."""
        recorder = SpanRecorder(device)
        batch = self.batch()
        with recorded_calls(recorder, self.worker):
            dist.barrier()
            with recorder.span("other"):
                self.step(batch)
        return dict(recorder.seconds)


def random_rows(args: argparse.Namespace) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sequences of random tokens: a prompt that is not trained and a response that is."""
    generator = torch.Generator().manual_seed(1)
    length = min(args.sequence_length, args.tokens)
    lengths = [length] * (args.tokens // length)
    if args.uneven:
        # From a third to five thirds of the length, evenly spread: the sum is the same.
        spread = torch.linspace(-2 / 3, 2 / 3, len(lengths)) * length
        lengths = [length + int(extra) for extra in spread[torch.randperm(len(lengths), generator=generator)]]
    rows = []
    for own in lengths:
        mask = (torch.arange(own) >= own * (1 - args.mask_fraction)).long()
        mask[0] = 0
        rows.append((torch.randint(args.vocab, (own,), generator=generator), mask))
    return rows


def _overrides(variant: str, base: Path, args: argparse.Namespace) -> list[str]:
    width = args.width
    speculator = [f"model.speculator.inner_dim={width}"]
    if args.speculator != "mlp":
        speculator += [f"model.speculator.emb_dim={width}", f"model.speculator.proj_dim={width}"]
        speculator += [f"model.speculator.method=sum_{args.speculator}"]
    return [
        f"model.path={base}",
        f"model.speculator_adapter={ADAPTERS.get(variant, ADAPTERS['ours'])[args.speculator]}",
        f"model.speculator.n_predict={args.heads}",
        *speculator,
        "data.train_files=unused.parquet",
        "data.use_dynamic_bsz=true",
        f"data.max_token_len_per_gpu={args.micro_batch_tokens or args.tokens // args.nproc}",
        "optim.total_training_steps=1000",
        *VARIANTS[variant],
        *args.overrides,
    ]


@contextmanager
def recorded_calls(recorder: SpanRecorder, worker: Any) -> Iterator[None]:
    """Record the calls of a step; none of the package's code knows of it."""
    import verl.workers.engine.fsdp.transformer_impl as verl_engine
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    from verl_speculator.engine import step_sums
    from verl_speculator.losses import objective

    engine = worker.engine
    speculator = engine.speculator_unit.speculator
    recorder.wrap(type(engine.module), "__call__", "backbone")
    recorder.wrap(type(engine.speculator_unit), "__call__", "objective")
    recorder.wrap(speculator, "begin", "states")
    recorder.wrap(speculator, "embed", "states")
    recorder.wrap(speculator, "step", "states")
    recorder.wrap(torch.Tensor, "backward", "states")
    recorder.replace(objective, "linear_cross_entropy", _with_backward(recorder, objective.linear_cross_entropy))
    recorder.wrap(engine, "optimizer_step", "clipping")
    recorder.wrap(engine.optimizer, "step", "optimizer")
    recorder.wrap(engine.optimizer, "zero_grad", "optimizer")
    recorder.wrap(engine, "lr_scheduler_step", "optimizer")
    recorder.wrap(engine, "prepare_model_inputs", "batch")
    recorder.wrap(verl_engine, "prepare_micro_batches", "batch")
    recorder.wrap(step_sums, "reduce_sums", "metrics")
    recorder.wrap(worker, "_postprocess_output", "metrics")
    for module in (dist, dist._functional_collectives):
        for name in COLLECTIVES:
            recorder.wrap(module, name, "communication")
    recorder.wrap(dist.Work, "wait", "communication")
    for name in FSDP_CALLS:
        recorder.wrap(FSDPParamGroup, name, "communication")
    try:
        yield
    finally:
        recorder.restore()


def _with_backward(recorder: SpanRecorder, function: Any) -> Any:
    """`linear_cross_entropy` and its node of the backward pass as one span's name."""

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with recorder.span("vocabulary"):
            output = function(*args, **kwargs)
        if output.loss.grad_fn is not None:
            output.loss.grad_fn.register_prehook(lambda _: recorder.enter("vocabulary"))
            output.loss.grad_fn.register_hook(lambda *_: recorder.leave())
        return output

    return recorded


def measure(base: Path, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    trainings = {variant: Training(variant, base, args) for variant in args.variants}
    losses = {variant: training.step(training.batch()) for variant, training in trainings.items()}
    reference = losses[args.variants[0]]
    if any(abs(loss - reference) > 2e-2 * abs(reference) for loss in losses.values()):
        raise RuntimeError(f"The variants do not compute the same loss: {losses}.")
    # What the first step saw goes to the disk, and from here on comes from there.
    writing = seconds(trainings["cached"].worker.share_states, device) if "cached" in trainings else None
    peaks = {
        variant: peak_extra_bytes(partial(training.step, training.batch()), device)
        for variant, training in trainings.items()
    }

    times: dict[str, list[float]] = {variant: [] for variant in trainings}
    flops = []
    for round_index in range(args.rounds):
        flops.append(machine_peak(device, args))
        for variant in list(trainings)[:: 1 if round_index % 2 == 0 else -1]:
            times[variant].append(trainings[variant].seconds(device))
    useful = useful_flops(args)
    rows = [summarise(variant, times, peaks[variant], flops, useful, args) for variant in trainings]
    splits = [trainings["ours"].split(device) for _ in range(args.rounds)] if "ours" in trainings else []
    measured = {"rows": rows, "split": summarise_split(splits) if splits else None, "losses": losses}
    if writing is not None and "ours" in trainings:
        bytes_per_token = trainings["cached"].engine.cached_states.bytes_per_token
        measured["states_cache"] = summarise_cache(times, writing, bytes_per_token)
    return measured


def summarise_cache(times: dict[str, list[float]], writing: float, bytes_per_token: int) -> dict[str, float]:
    """From how many epochs on writing, once, costs less than the base's forward passes that reading saves."""
    saved = statistics.median(ours - cached for ours, cached in zip(times["ours"], times["cached"], strict=True))
    return {
        "bytes_per_token": bytes_per_token,
        "write_seconds": writing,
        "saved_seconds": saved,
        "saved_fraction": saved / statistics.median(times["ours"]),
        "break_even_epochs": 1 + writing / saved if saved > 0 else float("inf"),
    }


def machine_peak(device: torch.device, args: argparse.Namespace) -> float:
    """Of all ranks together, each at the same time as the others."""
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, args.peak_dtype)
    dist.barrier()
    peak = torch.tensor(matmul_peak(dtype, device, args.peak_size), dtype=torch.float64, device=device)
    dist.all_reduce(peak)
    return peak.item()


def useful_flops(args: argparse.Namespace) -> float:
    from verl_speculator.losses import trained_positions

    rows = random_rows(args)
    tokens = sum(ids.numel() for ids, _ in rows)
    trained = sum(int(trained_positions(mask, torch.tensor([0, mask.numel()]), args.heads).sum()) for _, mask in rows)
    return 2 * tokens * args.base.layer_parameters + 6 * trained * args.width * args.vocab


def summarise(
    variant: str,
    times: dict[str, list[float]],
    peak: int,
    flops: list[float],
    useful: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    mine = times[variant]
    ratios = [other / own for other, own in zip(times["stacked"], mine, strict=True)] if "stacked" in times else None
    return {
        "variant": variant,
        "ranks": args.nproc,
        "speculator": args.speculator,
        "mask_fraction": args.mask_fraction,
        "tokens": args.tokens,
        "tokens_per_second": args.tokens / statistics.median(mine),
        "sequence_length": args.sequence_length,
        "heads": args.heads,
        "vocab": args.vocab,
        "hidden": args.hidden,
        "layers": args.layers,
        "intermediate": args.intermediate,
        "width": args.width,
        "seconds_median": statistics.median(mine),
        "seconds_min": min(mine),
        "seconds_max": max(mine),
        "ratio_to_stacked": statistics.median(ratios) if ratios else None,
        "ratio_min": min(ratios) if ratios else None,
        "ratio_max": max(ratios) if ratios else None,
        "peak_extra_mb": peak / MIB,
        "matmul_peak_fraction": statistics.median(useful / (own * f) for own, f in zip(mine, flops, strict=True)),
        "matmul_peak_gflops": statistics.median(flops) / 1e9,
    }


def summarise_split(splits: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the recorded steps; each step's fractions are of its own time."""
    known = ("backbone", "states", "vocabulary", "communication")
    steps = []
    for split in splits:
        step = {name: split.get(name, 0.0) for name in known}
        step["optimizer"] = split.get("optimizer", 0.0) + split.get("clipping", 0.0)
        step["rest"] = sum(split.values()) - sum(step.values())
        steps.append(step)
    totals = [sum(step.values()) for step in steps]
    rest_parts: dict[str, list[float]] = defaultdict(list)
    for split in splits:
        for name in ("objective", "batch", "metrics", "other"):
            rest_parts[name].append(split.get(name, 0.0))
    outside = [(step["communication"] + step["rest"]) / total for step, total in zip(steps, totals, strict=True)]
    return {
        "parts": [
            {
                "part": part,
                "seconds_median": statistics.median(step[part] for step in steps),
                "fraction": statistics.median(step[part] / total for step, total in zip(steps, totals, strict=True)),
            }
            for part in PARTS
        ],
        "clipping_seconds_median": statistics.median(split.get("clipping", 0.0) for split in splits),
        "rest_parts": {name: statistics.median(values) for name, values in rest_parts.items()},
        "step_seconds_median": statistics.median(totals),
        "outside_fraction": statistics.median(outside),
        "outside_fraction_min": min(outside),
        "outside_fraction_max": max(outside),
        "steps": splits,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write rows, split, machine and versions to this file")
    parser.add_argument("--nproc", type=int, default=1, help="processes, over which the batch and the model are cut")
    parser.add_argument("--tokens", type=int, default=2048, help="of the global batch")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--uneven", action="store_true", help="sequences of a third to five thirds of that length")
    parser.add_argument("--shapes", choices=list(SHAPES), help="a published model's, and a step on it; wins over sizes")
    parser.add_argument("--micro-batch-tokens", type=int, help="default: one micro-batch for each process")
    parser.add_argument("--mask-fraction", type=float, default=0.5, help="share of each sequence that is trained")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=3, help="of the speculator: n_predict")
    parser.add_argument("--width", type=int, default=1024, help="of the speculator: inner_dim")
    parser.add_argument("--speculator", choices=["mlp", "rnn", "lstm"], default="mlp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["ours", "stacked"])
    add_peak_size(parser)
    parser.add_argument("--peak-dtype", default="bfloat16", help="of the matmul peak on an accelerator")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further settings of the engine")
    args = parser.parse_intermixed_args()
    args.base = BaseShape(args.vocab, args.hidden, args.layers, args.intermediate)
    if args.shapes:
        chosen = SHAPES[args.shapes]
        base, settings = chosen["base"], chosen["arguments"]
        sizes = {name: getattr(base, name) for name in ("vocab", "hidden", "layers", "intermediate")}
        vars(args).update(settings, base=base, **sizes)
    return args


def relaunch(nproc: int) -> None:
    """Become torchrun, with the cores shared between the processes as `verl-speculator train` does it."""
    environment = dict(os.environ, **{LOAD_BEFORE: json.dumps(load_average())})
    environment.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // nproc, 1)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    # torchrun would take some of this script's options for its own, were it not for the two dashes.
    os.execve(sys.executable, [*command, "--", str(Path(__file__).resolve()), *sys.argv[1:]], environment)


def main() -> None:
    args = parse_arguments()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        relaunch(args.nproc)

    from verl.utils.device import get_device_name
    from verl.utils.distributed import initialize_global_process_group

    from verl_speculator.platforms import cpu

    if cpu.is_active():
        cpu.init_process_group()
    else:
        initialize_global_process_group()
    device = torch.device(get_device_name())
    is_first = dist.get_rank() == 0
    folder: list[Any] = [tempfile.mkdtemp() if is_first else None]
    try:
        if is_first:
            args.base.write(Path(folder[0]), max_length=max(2 * args.sequence_length, 64))
        dist.broadcast_object_list(folder)
        measured = measure(Path(folder[0]), args, device)
    finally:
        if is_first:
            shutil.rmtree(folder[0])
    if is_first:
        # Now it would be that of this run.
        machine = describe_machine(device) | {"load_average": json.loads(os.environ[LOAD_BEFORE])}
        report(measured, machine, args)
    dist.barrier()
    dist.destroy_process_group()


def report(measured: dict[str, Any], machine: dict[str, Any], args: argparse.Namespace) -> None:
    print_table(measured["rows"], COLUMNS)
    if measured["split"]:
        print()
        print_table(measured["split"]["parts"], ("part", "seconds_median", "fraction"))
        print(f"outside backbone, states, vocabulary and optimizer: {measured['split']['outside_fraction']:.3f}")
        print(f"of the rest: {measured['split']['rest_parts']}")
    if "states_cache" in measured:
        print(f"hidden states on disk: {measured['states_cache']}")
    print(f"\n{machine['device']}, {machine['cores']} cores, load average before {machine['load_average']}")
    if args.json:
        whole = {
            "machine": machine,
            "versions": versions("torch", "verl", "transformers"),
            "rounds": args.rounds,
            **measured,
        }
        args.json.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
