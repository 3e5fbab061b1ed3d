"""Run under torchrun: one engine per case on the same batch; writes each case's loss, metrics and gradients.

One of a ``fresh`` speculator writes its weights only. A case with ``steps`` then
trains, a step on each batch of that file, and writes every step's loss and metrics too.

usage: torchrun --nproc_per_node=N engine_cases.py CASES.json OUTPUT_FOLDER
"""

from __future__ import annotations

import json
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.workers.config import TrainingWorkerConfig

from tests.integration.megatron_layout import forget_megatron_layout
from verl_speculator.checkpoint.training_state import full_state_dict
from verl_speculator.engine.model_config import MODEL_TYPE
from verl_speculator.engine.sequence_parallel import gather_sequence, share_of_targets
from verl_speculator.engine.step_sums import SUMS_KEY
from verl_speculator.errors import ConfigError
from verl_speculator.platforms import cpu, megatron_cpu
from verl_speculator.trainer.config.compose import load_config
from verl_speculator.trainer.config.devices import apply_device
from verl_speculator.trainer.sft_trainer import base_loss
from verl_speculator.trainer.worker import SpeculatorTrainingWorker


def build_worker(overrides: list[str]) -> tuple[SpeculatorTrainingWorker, object]:
    unused = ["data.train_files=unused.parquet", "data.val_files=unused.parquet", "optim.total_training_steps=10"]
    config = load_config([*unused, *overrides])
    apply_device(config)
    worker = SpeculatorTrainingWorker(
        TrainingWorkerConfig(
            model_type=MODEL_TYPE,
            model_config=omega_conf_to_dataclass(config.model),
            engine_config=omega_conf_to_dataclass(config.engine),
            optimizer_config=omega_conf_to_dataclass(config.optim),
            checkpoint_config=omega_conf_to_dataclass(config.checkpoint),
            profiler_config=omega_conf_to_dataclass(config.profiler),
        )
    )
    worker.set_loss_fn(base_loss)
    worker.reset()
    return worker, config


def rank_batch(rows: list, config, engine) -> object:
    """This rank's share of the sequences, as the trainer's data loader would give it."""
    num_ranks = engine.get_data_parallel_size()
    rows = rows[engine.get_data_parallel_rank() :: num_ranks]
    items = [{"input_ids": ids, "loss_mask": mask, "position_ids": torch.arange(ids.numel())} for ids, mask in rows]
    settings = {
        "use_remove_padding": config.model.use_remove_padding,
        "use_dynamic_bsz": config.data.use_dynamic_bsz,
        "max_token_len_per_gpu": config.data.max_token_len_per_gpu,
        "micro_batch_size_per_gpu": config.data.micro_batch_size_per_gpu,
        "temperature": 1.0,
        "global_batch_size": len(rows) * num_ranks,
        "pad_mode": "no_padding",
        "pad_token_id": 0,
    }
    return tu.get_tensordict(tensor_dict=SFTTensorCollator("no_padding")(items), non_tensor_dict=settings)


def gradients(engine) -> dict[str, torch.Tensor]:
    named = engine.speculator_unit.named_parameters()
    grads = {name: whole_gradient(name, parameter) for name, parameter in named if parameter.requires_grad}
    if not engine.is_base_frozen:
        grads |= {f"base.{name}": grad for name, grad in base_gradients(engine)}
    return grads


def whole_gradient(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    grad = parameter.grad
    assert grad is not None, f"{name} has no gradient"
    return (grad.full_tensor() if isinstance(grad, DTensor) else grad).contiguous()


def base_gradients(engine) -> Iterator[tuple[str, torch.Tensor]]:
    if not isinstance(engine.module, list):
        for name, parameter in engine.module.named_parameters():
            yield name, whole_gradient(name, parameter)
        return
    # What brings Megatron's weights into Hugging Face's layout brings gradients there too, put in their place.
    parameters = [parameter for module in engine.module for parameter in module.parameters()]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.to(parameter.dtype)
    with megatron_cpu.emulated_device():
        yield from ((name, grad.clone()) for name, grad in engine.bridge.export_weights(engine.module))
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight


class Collectives(TorchDispatchMode):
    """How often each collective was called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def modules(engine) -> list[torch.nn.Module]:
    return engine.module if isinstance(engine.module, list) else [engine.module]


def speculator_optimizer(engine) -> torch.optim.Optimizer:
    return getattr(engine, "speculator_optimizer", engine.optimizer)


def run_case(case: dict, output: Path) -> None:
    try:
        worker, config = build_worker(case["overrides"])
    except ConfigError as error:
        if dist.get_rank() == 0:
            (output / f"{case['name']}.json").write_text(json.dumps({"refused": str(error)}))
        forget_megatron_layout()
        return
    engine = worker.engine
    if case["fresh"]:
        weights = full_state_dict(engine.speculator_unit)
        if dist.get_rank() == 0:
            save_file(weights, output / f"{case['name']}.safetensors")
        forget_megatron_layout()
        return
    rows = torch.load(case["batch"], weights_only=True)
    batch = rank_batch(rows, config, engine)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        with Collectives() as collectives:
            out = engine.forward_backward_batch(batch, base_loss)
        grads = gradients(engine)
        named = [named for module in modules(engine) for named in module.named_parameters()]
        state = {
            "loss": out["loss"][0],
            "ranks": dist.get_world_size(),
            "collectives": collectives.counts,
            "sums": out["metrics"][SUMS_KEY],
            "training": any(module.training for module in modules(engine)),
            "base_grads": [name for name, parameter in named if parameter.grad is not None],
            "base_has_optimizer": getattr(engine, "speculator_optimizer", None) is not None and bool(engine.optimizer),
            "optimizer_params": sum(len(group["params"]) for group in speculator_optimizer(engine).param_groups),
            "speculator_params": sum(parameter.requires_grad for parameter in engine.speculator_unit.parameters()),
            "base_modules": [name for module in modules(engine) for name, _ in module.named_modules()],
        }
    with engine.eval_mode(), torch.no_grad():
        batch = rank_batch(rows, config, engine)
        out = engine.forward_backward_batch(batch, base_loss, forward_only=True)
        state["eval_loss"], state["eval_sums"] = out["loss"][0], out["metrics"][SUMS_KEY]
    if not engine.is_base_frozen:
        state["moved"] = largest_updates(engine, rank_batch(rows, config, engine))
    if "steps" in case:
        state["steps"] = [train_step(engine, config, rows) for rows in torch.load(case["steps"], weights_only=True)]
    if dist.get_rank() == 0:
        save_file(grads, output / f"{case['name']}.safetensors")
        (output / f"{case['name']}.json").write_text(json.dumps(state))
    forget_megatron_layout()


def train_step(engine, config, rows: list) -> dict[str, float]:
    with engine.train_mode():
        out = engine.train_batch(rank_batch(rows, config, engine), base_loss)
        engine.lr_scheduler_step()
    return out["metrics"][SUMS_KEY]


def largest_updates(engine, batch) -> dict[str, float]:
    """How far a step moves any weight: Adam's first step is the learning rate, whatever the gradient."""
    parts = {"base": modules(engine), "speculator": [engine.speculator_unit]}
    parameters = {name: [p for module in part for p in module.parameters()] for name, part in parts.items()}
    before = {name: [local(p).detach().clone() for p in own] for name, own in parameters.items()}
    with engine.train_mode():
        engine.train_batch(batch, base_loss)
    moved = {}
    for name, own in parameters.items():
        differences = [local(p).detach() - old for p, old in zip(own, before[name], strict=True)]
        largest = torch.stack([part.abs().max() for part in differences if part.numel()]).max()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        moved[name] = largest.item()
    return moved


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def check_sequence_parallel_layout(output: Path) -> None:
    """Slices of a packed sequence, gathered; each rank then has the loss of its own share of the positions."""
    rank, size, pad = dist.get_rank(), dist.get_world_size(), 1
    whole = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([whole, whole.new_zeros(pad, 4)])
    shard = padded.chunk(size)[rank].clone().requires_grad_()
    gathered = gather_sequence(shard, None, pad)
    mask = torch.ones(11)
    loss = (gathered.pow(3).sum(-1) * share_of_targets(mask, rank, size)).sum()
    loss.backward()
    expected = torch.cat([3 * whole.pow(2), whole.new_zeros(pad, 4)]).chunk(size)[rank]
    total = loss.detach().clone()
    dist.all_reduce(total)
    shares = torch.stack([share_of_targets(mask, other, size) for other in range(size)])
    torch.testing.assert_close(gathered, whole)
    torch.testing.assert_close(shard.grad, expected)
    torch.testing.assert_close(total, whole.pow(3).sum())
    torch.testing.assert_close(shares.sum(0), mask)
    if rank == 0:
        (output / "sequence_parallel.json").write_text(json.dumps({"ranks": size}))


def page_faults_of_large_buffers() -> int:
    """Of ten of 64 MiB, each freed before the next; new memory is 16,384 pages every time."""
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main() -> None:
    cpu.init_process_group()
    output = Path(sys.argv[2])
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(case, output)
    check_sequence_parallel_layout(output)
    if dist.get_rank() == 0:
        (output / "memory.json").write_text(json.dumps({"page_faults": page_faults_of_large_buffers()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
