"""The demo's base model: a Qwen2 small enough for a CPU, trained by verl's own SFT trainer."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from examples.demo.settings import BaseModelSettings, hydra_path
from verl_speculator.errors import CheckpointError

TRAIN_MODULE = "examples.demo.train_base"


def initialise(tokenizer_folder: Path, settings: BaseModelSettings, folder: Path, seed: int = 0) -> int:
    """Write an untrained model and its tokenizer as a Hugging Face folder; returns the number of parameters."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    config = Qwen2Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return model.num_parameters()


def training_overrides(
    settings: BaseModelSettings, model: Path, data: Path, checkpoints: Path, num_processes: int
) -> list[str]:
    """Overrides for verl's `sft_trainer_engine` config: float32 FSDP2 on CPU, one checkpoint at the end."""
    return [
        f"model.path={hydra_path(model)}",
        "+model.override_config.attn_implementation=sdpa",
        "model.use_remove_padding=true",
        # verl's plain loss takes the log-sum-exp of every token in a Python loop on CPU; the fused one does not.
        "model.use_fused_kernels=true",
        "model.enable_gradient_checkpointing=false",
        "engine.strategy=fsdp2",
        "engine.model_dtype=fp32",
        # Without it verl computes in bfloat16, which CPUs emulate at a tenth of the speed.
        "+engine.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
        "engine.use_torch_compile=false",
        # Two processes of one machine talk through sockets: each keeps all weights, and gradients meet once a step.
        "engine.fsdp_size=1",
        "engine.use_no_sync_for_gradient_accumulation=true",
        f"optim.lr={settings.learning_rate}",
        "optim.lr_scheduler_type=cosine",
        "optim.lr_warmup_steps_ratio=0.04",
        "optim.min_lr_ratio=0.05",
        "optim.weight_decay=0.05",
        "optim.betas=[0.9,0.98]",
        f"data.train_files={hydra_path(data / 'train.parquet')}",
        f"data.train_batch_size={settings.batch_size}",
        # Packed rows attend under a dense mask on CPU: short packs waste less than they cost in overhead.
        "data.use_dynamic_bsz=true",
        f"data.max_token_len_per_gpu={settings.max_length}",
        f"data.max_length={settings.max_length}",
        "data.truncation=right",
        "data.num_workers=0",
        "checkpoint.save_contents=[model,hf_model]",
        f"trainer.default_local_dir={hydra_path(checkpoints)}",
        f"trainer.n_gpus_per_node={num_processes}",
        # The step count ends the training, the epochs must only not end it earlier.
        "trainer.total_epochs=1000",
        f"trainer.total_training_steps={settings.num_steps}",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.logger=[console]",
        "trainer.resume_mode=disable",
        f"trainer.device={'cuda' if torch.cuda.is_available() else 'cpu'}",
        f"hydra.run.dir={hydra_path(checkpoints)}",
        "hydra.output_subdir=null",
    ]


def export(checkpoints: Path, num_steps: int, folder: Path) -> None:
    """Move the Hugging Face folder out of verl's last checkpoint to `folder` and drop the sharded rest."""
    trained = checkpoints / f"global_step_{num_steps}" / "huggingface"
    if not (trained / "model.safetensors").is_file():
        raise CheckpointError(f"{trained} holds no model.safetensors: verl's trainer did not finish")
    if folder.exists():
        shutil.rmtree(folder)
    shutil.move(trained, folder)
    shutil.rmtree(checkpoints)


def load(folder: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """The model in float32, where decoding gives the same tokens in one step or in several, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder)
