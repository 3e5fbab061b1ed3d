"""The target's own answers as training data for its speculator.

A speculator drafts what the target will say, not what a person wrote: for that, the target's own greedy text is the
better teacher, and acceptance rises by half.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from verl_speculator.decoding import greedy_generate


def load_base(folder: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """The target in float32, where greedy decoding in one step or in several gives the same tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder, padding_side="left")


def read_requests(parquet: Path, limit: int) -> list[str]:
    """The user's side of the first `limit` conversations."""
    return [messages[0]["content"] for messages in pd.read_parquet(parquet)["messages"].iloc[:limit]]


def encode_prompts(tokenizer: PreTrainedTokenizerFast, requests: list[str]) -> Any:
    """Left-padded `input_ids` and `attention_mask` of one-turn conversations, up to where the answer begins."""
    conversations = [[{"role": "user", "content": request}] for request in requests]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)


def write_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    requests: list[str],
    parquet: Path,
    *,
    batch_size: int,
    max_new_tokens: int,
    report: Callable[[int], None],
) -> int:
    """Write conversations of `requests` and the target's greedy answers; returns the number of answered tokens."""
    rows, num_tokens = [], 0
    for batch in _batches(sorted(requests, key=len), batch_size):  # similar lengths together: little padding
        prompts = encode_prompts(tokenizer, batch)
        result = greedy_generate(
            model,
            prompts["input_ids"],
            prompts["attention_mask"],
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
        )
        for request, tokens in zip(batch, result.tokens, strict=True):
            answer = tokenizer.decode(tokens, skip_special_tokens=True)
            num_tokens += len(tokens)
            messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
            rows.append({"messages": messages})
        report(len(rows))
    parquet.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(parquet)
    return num_tokens


def _batches(requests: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]
