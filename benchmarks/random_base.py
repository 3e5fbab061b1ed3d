"""A base model with random weights and chats of random words: a training to time that needs no download."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

_WORDS = [f"w{index}" for index in range(200)]
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@dataclass(frozen=True)
class BaseShape:
    """A Qwen2- or Llama-style model.

    Attributes:
        attention_heads: None for heads of 64 where the width allows it.
        key_value_heads: None where four of the heads share keys and values, if they can be divided so.
    """

    vocab: int
    hidden: int
    layers: int
    intermediate: int
    attention_heads: int | None = None
    key_value_heads: int | None = None
    family: str = "qwen2"

    @property
    def layer_parameters(self) -> int:
        """Weights of the layers' linear maps, which every token passes once."""
        key_value = self.hidden * self._key_value_heads // self._attention_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * key_value
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def _attention_heads(self) -> int:
        return self.attention_heads or max(self.hidden // 64, 1)

    @property
    def _key_value_heads(self) -> int:
        if self.key_value_heads is not None:
            return self.key_value_heads
        return self._attention_heads // 4 if self._attention_heads % 4 == 0 else self._attention_heads

    def write(self, folder: Path, *, max_length: int) -> Path:
        """Write a Hugging Face folder with weights of seed 0 and a tokenizer of bytes (needs a vocabulary of 300)."""
        # Here, because a script that becomes torchrun would load it for nothing.
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            self.family,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self._attention_heads,
            num_key_value_heads=self._key_value_heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        _write_byte_tokenizer(folder)
        return folder


def write_chats(file: Path, rows: int, answer_words: int) -> Path:
    generator = random.Random(0)
    chats = [
        [
            {"role": "user", "content": " ".join(generator.choices(_WORDS, k=8))},
            {"role": "assistant", "content": " ".join(generator.choices(_WORDS, k=answer_words))},
        ]
        for _ in range(rows)
    ]
    pq.write_table(pa.table({"messages": chats}), file)
    return file


def _write_byte_tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    # Byte-level like Qwen2's own: transformers loads a Qwen2 folder with that tokenizer's class.
    tokens = [*_SPECIAL, *pre_tokenizers.ByteLevel.alphabet()]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_SPECIAL[0], eos_token=_SPECIAL[2])
    fast.add_special_tokens({"additional_special_tokens": [_SPECIAL[1]]})
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)
