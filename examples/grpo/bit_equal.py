"""Whether the policy is what verl's own engine makes of it: both engines on the same rollouts, bit by bit.

python -m examples.grpo.bit_equal POLICY SPECULATOR RESULT.json
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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

from verl_speculator.engine.policy import POLICY_MODEL_TYPE
from verl_speculator.engine.policy_config import PolicyEngineConfig
from verl_speculator.platforms import cpu

NUM_STEPS, NUM_ROLLOUTS, PROMPT, ANSWER = 3, 16, 3, 32
FULL = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def build(policy: str, speculator: str | None) -> TrainingWorker:
    values: dict[str, Any] = {"strategy": "fsdp2", "mixed_precision": FULL, "use_torch_compile": False}
    values |= {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 8}
    engine: Any = FSDPEngineConfig(**values)
    if speculator is not None:
        learning = {"path": speculator, "lr": 1e-2, "extra_steps": 2, "shadow_frozen": True}
        engine = PolicyEngineConfig(**values, speculator=learning)
    attention = {"attn_implementation": "sdpa"}
    torch.manual_seed(0)
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model" if speculator is None else POLICY_MODEL_TYPE,
            model_config=HFModelConfig(path=policy, use_remove_padding=True, override_config=attention),
            engine_config=engine,
            optimizer_config=FSDPOptimizerConfig(lr=1e-3, lr_warmup_steps=0, total_training_steps=NUM_STEPS),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    actor = FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def rollouts(vocab_size: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (NUM_ROLLOUTS, PROMPT + ANSWER), generator=generator)
    ones = torch.ones(NUM_ROLLOUTS, ANSWER, dtype=torch.long)
    columns = {
        "input_ids": ids,
        "position_ids": torch.arange(PROMPT + ANSWER).expand_as(ids),
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "response_mask": ones,
        "loss_mask": ones,
        "old_log_probs": torch.full_like(ones, -3, dtype=torch.float32),
        "advantages": torch.randn(NUM_ROLLOUTS, ANSWER, generator=generator),
    }
    nested = {
        name: torch.nested.as_nested_tensor(list(column), layout=torch.jagged) for name, column in columns.items()
    }
    settings = {
        "temperature": 1.0,
        "calculate_entropy": False,
        "global_batch_size": NUM_ROLLOUTS // 2,
        "mini_batch_size": NUM_ROLLOUTS // 2,
        "epochs": 1,
        "seed": 7,
        "dataloader_kwargs": {"shuffle": False},
    }
    return tu.get_tensordict(nested, non_tensor_dict=settings)


def trained(worker: TrainingWorker, vocab_size: int) -> dict[str, Tensor]:
    for _ in range(NUM_STEPS):
        worker.train_mini_batch(rollouts(vocab_size))
    return {name: tensor.clone() for name, tensor in worker.engine.get_per_tensor_param()[0]}


def main() -> None:
    policy, speculator, result = sys.argv[1:]
    cpu.init_process_group()
    cpu.enable_verl_engines()
    vocab_size = json.loads((Path(policy) / "config.json").read_text())["vocab_size"]
    alone = trained(build(policy, None), vocab_size)
    followed = trained(build(policy, speculator), vocab_size)
    equal = all(torch.equal(tensor, followed[name]) for name, tensor in alone.items())
    Path(result).write_text(json.dumps({"policy_bit_equal": equal, "tensors": len(alone)}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
