"""Run under torchrun: verl's own engine of a policy and the one with a speculator on the same rollouts.

usage: torchrun --nproc_per_node=N policy_cases.py WORLD_FOLDER OUTPUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

from verl_speculator.checkpoint.training_state import full_state_dict
from verl_speculator.engine.policy import POLICY_MODEL_TYPE, FSDPPolicyEngine
from verl_speculator.engine.policy_config import PolicyEngineConfig
from verl_speculator.errors import SpeculatorError
from verl_speculator.models import Speculator
from verl_speculator.platforms import cpu

MINI_BATCH = 4
PLAIN = "language_model"
FULL = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"use_remove_padding": False, "micro_batch_size_per_gpu": 1},
    "packed": {"use_remove_padding": True, "micro_batch_size_per_gpu": 2},
    "dynamic": {"use_remove_padding": True, "use_dynamic_bsz": True, "max_token_len_per_gpu": 48},
}


def build_worker(
    model_type: str, base: Path, speculator: dict[str, Any] | None, *, use_remove_padding: bool = True, **values: Any
) -> TrainingWorker:
    fused = values.pop("use_fused_kernels", False)
    engine: dict[str, Any] = {"strategy": "fsdp2", "mixed_precision": FULL, "use_torch_compile": False}
    engine |= {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2, **values}
    config: Any = FSDPEngineConfig(**engine)
    if speculator is not None:
        config = PolicyEngineConfig(**engine, speculator=speculator)
    model = HFModelConfig(
        path=str(base),
        use_remove_padding=use_remove_padding,
        use_fused_kernels=fused,
        override_config={"attn_implementation": "sdpa"},
    )
    optimizer = FSDPOptimizerConfig(lr=1e-2, lr_warmup_steps=0, total_training_steps=10, clip_grad=0.5)
    torch.manual_seed(0)
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type=model_type,
            model_config=model,
            engine_config=config,
            optimizer_config=optimizer,
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    actor = FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, entropy_coeff=0.01)
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def rollouts(rows: list[tuple[torch.Tensor, torch.Tensor]], *, shuffle: bool) -> Any:
    """This rank's rows, as verl's trainer hands them to an actor."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    fields: dict[str, list[torch.Tensor]] = {}
    for ids, mask in rows:
        start = len(ids) // 3 + 1
        response = mask[start:]
        noise = torch.randn(2, len(response), generator=generator)
        row = {
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "prompts": ids[:start],
            "responses": ids[start:],
            "response_mask": response,
            "loss_mask": response,
            "old_log_probs": noise[0] * 0.1 - 5,
            "advantages": noise[1],
        }
        for name, value in row.items():
            fields.setdefault(name, []).append(value)
    return tu.get_tensordict(
        {
            name: torch.nested.as_nested_tensor(column[rank::size], layout=torch.jagged)
            for name, column in fields.items()
        },
        non_tensor_dict={
            "temperature": 1.0,
            "calculate_entropy": True,
            "global_batch_size": MINI_BATCH,
            "mini_batch_size": MINI_BATCH,
            "epochs": 2,
            "seed": 7,
            "dataloader_kwargs": {"shuffle": shuffle},
        },
    )


def update(worker: TrainingWorker, rows: Any, *, shuffle: bool = False) -> dict[str, list[float]]:
    """A trainer's step: two epochs of two mini-batches."""
    return tu.get(worker.train_mini_batch(rollouts(rows, shuffle=shuffle)), "metrics")


def own_parts(worker: TrainingWorker) -> dict[str, torch.Tensor]:
    """What this rank has of the policy and of its optimizer."""
    named = dict(worker.engine.module.named_parameters())
    state = {name: _local(value) for name, value in named.items()}
    for name, parameter in named.items():
        for key, value in worker.engine.optimizer.state[parameter].items():
            state[f"{name}/{key}"] = _local(value)
    return {name: value.clone() for name, value in state.items()}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same_everywhere(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    answer = torch.tensor([int(same)])
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer.item())


def weights(worker: TrainingWorker) -> dict[str, torch.Tensor]:
    """The speculator's, on rank 0."""
    return {name: tensor.clone() for name, tensor in full_state_dict(worker.engine.speculator_unit).items()}


def run_layouts(world: Path, rows: Any, output: Path) -> dict[str, Any]:
    """Both engines over two steps: a layout a case, another speculator or objective, or dropout, a cap and a pause."""
    found = {}
    learning = {"path": str(world / "rnn"), "lr": 1e-2}
    capped = {**learning, "max_tokens_per_step": 9, "every_n_steps": 2}
    if dist.get_world_size() == 1:
        watched = {**learning, "extra_steps": 2, "replay_steps": 1, "shadow_frozen": True}
        cases = [
            ("padded", "padded", "qwen2", learning),
            ("packed", "packed", "qwen2", learning),
            ("watched", "packed", "qwen2", watched),
        ]
    else:
        cases = [
            ("dynamic", "dynamic", "qwen2", {**learning, "shadow_frozen": True}),
            ("kl", "packed", "qwen2", {**learning, "training": {"objective": "kl"}}),
            ("eagle3", "packed", "qwen2", {**learning, "path": str(world / "eagle3")}),
            ("capped", "packed", "dropout", capped),
        ]
    for name, layout, base, settings in cases:
        shuffle = name == "capped"
        alone = build_worker(PLAIN, world / base, None, **LAYOUTS[layout])
        metrics_alone = [update(alone, rows, shuffle=shuffle) for _ in range(2)]
        followed = build_worker(POLICY_MODEL_TYPE, world / base, settings, **LAYOUTS[layout])
        before = own_parts(followed)
        metrics, speculators = [], []
        for _ in range(2):
            metrics.append(update(followed, rows, shuffle=shuffle))
            speculators.append(weights(followed))
        found[name] = {
            "bit_equal": same_everywhere(own_parts(alone), own_parts(followed)),
            "moved": not same_everywhere(before, own_parts(followed)),
            "verls_metrics_equal": all(
                there[key] == one[key]
                for one, there in zip(metrics_alone, metrics, strict=True)
                for key in ("actor/pg_loss", "actor/entropy_loss", "grad_norm", "loss")
            ),
            "speculator": [{k: v for k, v in one.items() if k.startswith("speculator/")} for one in metrics],
            "speculator_stood_still": all(
                torch.equal(speculators[0][key], speculators[1][key]) for key in speculators[0]
            ),
        }
        if dist.get_rank() == 0:
            save_file(speculators[-1], output / f"{name}.safetensors")
    return found


def run_resume(world: Path, rows: Any, folder: Path) -> dict[str, Any]:
    settings = {"path": str(world / "rnn"), "lr": 1e-2, "lr_warmup_steps": 3}
    settings |= {"extra_steps": 2, "shadow_frozen": True, "adaptive": True}
    worker = build_worker(POLICY_MODEL_TYPE, world / "dropout", settings)
    update(worker, rows)
    worker.save_checkpoint(str(folder / "global_step_1" / "actor"))
    sent = {name: tensor.clone() for name, tensor in worker.engine.get_per_tensor_param()[0]}
    update(worker, rows)
    went_on, policy = weights(worker), own_parts(worker)

    again = build_worker(POLICY_MODEL_TYPE, world / "dropout", settings)
    again.load_checkpoint(str(folder / "global_step_1" / "actor"))
    update(again, rows)
    own = {name.removeprefix("speculator."): value for name, value in sent.items() if name.startswith("speculator.")}
    saved = load_file(folder / "global_step_1" / "actor" / "speculator" / "model.safetensors")
    served = Speculator.from_pretrained(folder / "global_step_1" / "actor")
    alone = build_worker(PLAIN, world / "dropout", None)
    return {
        "policy_resumed": same_everywhere(policy, own_parts(again)),
        "speculator_resumed": same_everywhere(went_on, weights(again)),
        "adaptation_resumed": worker.engine._adaptation.state_dict() == again.engine._adaptation.state_dict(),
        "sent_is_saved": same_everywhere(own, {name: saved[name] for name in own}),
        "served_is_sent": same_everywhere(own, served.file_views(served.state_dict())),
        "sent_before": [name for name in sent if not name.startswith("speculator.")],
        "sent_by_verl": [name for name, _ in alone.engine.get_per_tensor_param()[0]],
        "order": list(sent)[-len(own) :] == [name for name in sent if name.startswith("speculator.")],
    }


def refusals(world: Path, folder: Path) -> dict[str, str]:
    settings = {"path": str(world / "rnn")}
    half = {**FULL, "param_dtype": "fp16"}
    calls = {
        "fused": lambda: build_worker(POLICY_MODEL_TYPE, world / "qwen2", settings, use_fused_kernels=True),
        "fp16": lambda: build_worker(POLICY_MODEL_TYPE, world / "qwen2", settings, mixed_precision=half),
        "no_settings": lambda: build_worker(POLICY_MODEL_TYPE, world / "qwen2", None),
        "other_base": lambda: build_worker(POLICY_MODEL_TYPE, world / "qwen2", {"path": str(world / "foreign")}),
        "training": lambda: build_worker(
            POLICY_MODEL_TYPE, world / "qwen2", {**settings, "training": {"objective": "klx"}}
        ),
    }

    def without_speculator() -> None:
        build_worker(PLAIN, world / "qwen2", None).save_checkpoint(str(folder / "plain"))
        build_worker(POLICY_MODEL_TYPE, world / "qwen2", settings).load_checkpoint(str(folder / "plain"))

    def delta() -> None:
        build_worker(POLICY_MODEL_TYPE, world / "qwen2", settings).engine.prime_delta_snapshots()

    found = {}
    for name, call in {**calls, "checkpoint": without_speculator, "delta": delta}.items():
        try:
            call()
            found[name] = "accepted"
        except SpeculatorError as error:
            found[name] = str(error)
    return found


def reference_engine(world: Path) -> str:
    """The class of what `forward_only` gives."""
    model = HFModelConfig(path=str(world / "qwen2"), model_type=POLICY_MODEL_TYPE)
    config = FSDPEngineConfig(strategy="fsdp2", forward_only=True, use_torch_compile=False)
    engine = FSDPPolicyEngine(model, config, None, CheckpointConfig())
    return type(engine).__name__


def main() -> None:
    cpu.init_process_group()
    cpu.enable_verl_engines()
    world, output = Path(sys.argv[1]), Path(sys.argv[2])
    rows = torch.load(world / "rollouts.pt", weights_only=True)
    found: dict[str, Any] = {"layouts": run_layouts(world, rows, output)}
    if dist.get_world_size() == 1:
        found |= {"refused": refusals(world, output), "reference": reference_engine(world)}
    else:
        found["resume"] = run_resume(world, rows, output)
    if dist.get_rank() == 0:
        (output / "found.json").write_text(json.dumps(found, default=float))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
