"""A policy made on the spot, which chains words in two ways, and the prompts that it goes on from.

prompt    topic t2 w17
answer    w3 w30 w8 ...    mostly along the topic's usual chain, sometimes along its rare one, seldom anything
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from examples.grpo.reward import NUM_TOPICS, WORDS, chains

PAD, END = "<pad>", "<end>"
VOCABULARY = (PAD, END, "topic", *(f"t{topic}" for topic in range(NUM_TOPICS)), *WORDS)
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
USUAL, RARE = 0.86, 0.09  # the rest is any word


@dataclass(frozen=True)
class WorldSettings:
    hidden_size: int = 64
    num_layers: int = 2
    num_steps: int = 400
    batch_size: int = 64
    answer_length: int = 32
    learning_rate: float = 3e-3
    num_chats: int = 1024
    num_prompts: int = 256
    seed: int = 0


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=END)
    fast.chat_template = TEMPLATE
    return fast


def prompt(generator: random.Random) -> tuple[int, str]:
    """A topic, and a prompt about it."""
    topic = generator.randrange(NUM_TOPICS)
    return topic, f"topic t{topic} {generator.choice(WORDS)}"


def speak(topic: int, first: str, length: int, generator: random.Random) -> list[str]:
    usual, rare = chains(topic)
    words = [first]
    for _ in range(length):
        draw = generator.random()
        any_word = generator.choice(WORDS)
        words.append(usual[words[-1]] if draw < USUAL else rare[words[-1]] if draw < USUAL + RARE else any_word)
    return words[1:]


def train_policy(settings: WorldSettings, folder: Path, report: Callable[[str], None]) -> float:
    """Train on fresh answers and save a Hugging Face folder; the last loss."""
    torch.manual_seed(settings.seed)
    size = settings.hidden_size
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(VOCABULARY),
        hidden_size=size,
        intermediate_size=size * 5 // 2,
        num_hidden_layers=settings.num_layers,
        head_dim=32,  # the least that vLLM's attention on CPU takes
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=size**-0.5,
        pad_token_id=VOCABULARY.index(PAD),
        eos_token_id=VOCABULARY.index(END),
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.num_steps, pct_start=0.1
    )
    generator, ids = random.Random(settings.seed), {word: index for index, word in enumerate(VOCABULARY)}
    loss = torch.tensor(0.0)
    for step in range(settings.num_steps):
        rows = []
        for _ in range(settings.batch_size):
            topic, text = prompt(generator)
            words = text.split()
            answer = speak(topic, words[-1], settings.answer_length, generator)
            rows.append([ids[word] for word in (*words, *answer)])
        input_ids = torch.tensor(rows)
        labels = input_ids.clone()
        labels[:, :3] = -100
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            report(f"step {step}, loss {loss.item():.3f}")
    model.generation_config.eos_token_id = config.eos_token_id
    model.eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return loss.item()


def write_chats(file: Path, count: int, seed: int) -> None:
    """Questions for the policy to answer itself: what a speculator learns from."""
    generator = random.Random(f"chats {seed}")
    chats = [[{"role": "user", "content": prompt(generator)[1]}] for _ in range(count)]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"messages": chats}), file)


def write_prompts(file: Path, count: int, seed: int, data_source: str) -> None:
    """In verl's form; `data_source` chooses the reward."""
    generator = random.Random(f"prompts {seed}")
    rows = []
    for index in range(count):
        topic, text = prompt(generator)
        rows.append(
            {
                "data_source": data_source,
                "prompt": [{"role": "user", "content": text}],
                "reward_model": {"style": "rule", "ground_truth": str(topic)},
                "extra_info": {"index": index},
            }
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
