"""Small things that stand for real ones: a base model folder with a tokenizer, and chat data."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
WORDS = [f"w{index}" for index in range(50)]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 384


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as the Qwen2 tokenizer class that transformers picks for a Qwen2 folder expects."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "user assistant system"] * 10, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token=None
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_base_model(
    folder: Path,
    *,
    family: str = "qwen2",
    tie: bool = True,
    seed: int = 0,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    stop_tokens: list[int] | None = None,
    **changes: float,
) -> Path:
    """A randomly initialised model of two layers, large enough in scale that its hidden states differ."""
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        initializer_range=0.3,
        **changes,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    model.generation_config.eos_token_id = stop_tokens
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_chats(file: Path, rows: int, seed: int = 0, max_words: int = 20) -> Path:
    """Chats whose answers follow a rule that a speculator can learn: each word is the one before it plus three."""
    generator = random.Random(seed)
    chats = []
    for _ in range(rows):
        start, length = generator.randrange(len(WORDS)), generator.randrange(3, max_words)
        answer = [WORDS[(start + 3 * step) % len(WORDS)] for step in range(length)]
        question = [generator.choice(WORDS) for _ in range(generator.randrange(2, 8))]
        chats.append(
            [
                {"role": "user", "content": " ".join([*question, WORDS[start]])},
                {"role": "assistant", "content": " ".join(answer)},
            ]
        )
    pq.write_table(pa.table({"messages": chats}), file)
    return file
