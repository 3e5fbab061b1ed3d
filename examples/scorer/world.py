"""A small world of sums in words, made on the spot, in which some mismatches are harmless and others are not.

    question  x 4 a plus 7 b minus 3 c plus 9 ?
    answer    well stepwise then a 4 plus 7 gives 1 next b 1 minus 3 makes 8 now c 8 plus 9 yields 7 so answer is 7

All is modulo 10, and what is right or wrong is in the data that the two models learn from. What makes it a world for a
scorer:

- **Phrasing.** Most words have synonyms, and which one is liked depends on the number at hand. The target and the draft
  have different likings, so they differ often, without harm. Some likings are strong and others weak: the target may
  think little of a harmless word.
- **Harm that looks harmless.** Some sums are easily got wrong. The target has seen such slips, so they are not
  improbable to it; the draft has made a habit of some. A step may also be `skip`ped, which is nearly always wrong.
- **Mistakes of the target's own**, some of which the draft does not make: there a mismatch does good.
- **Styles.** The draft likes other styles of solution than the target. Told `loosely` it slips less, and both use the
  same casual words; told `formally` it slips most of the time. The target is as right in each, so a style does no harm:
  whether to let it pass shows only in how many of the drafts survive in the rest of the answer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

Speaker = Literal["target", "draft"]

OPERATIONS = ("plus", "minus")
LABELS = "abcde"
SYNONYMS = {
    "opener": ("then", "next", "now", "further", "moving", "onward"),
    "result": ("gives", "makes", "yields", "leaves", "becomes", "reaching"),
    "closing": ("so", "hence", "thus", "finally", "therefore", "overall"),
}
CASUAL = {slot: words[-2:] for slot, words in SYNONYMS.items()}
STYLES = ("stepwise", "formally", "loosely")
# How much words are liked, the favourite first, if strongly or weakly: where the tail is, the draft's words are
# improbable to the target.
LIKINGS = ((0.80, 0.10, 0.05, 0.03, 0.012, 0.008), (0.45, 0.22, 0.14, 0.10, 0.06, 0.03))
# How likely the wrong results of a sum are, among slips.
SLIPS = (0.75, 0.15, 0.10)
PAD, END = "<pad>", "<end>"
VOCABULARY = (
    PAD,
    END,
    *map(str, range(10)),
    *LABELS,
    "x",
    "?",
    *OPERATIONS,
    *STYLES,
    "well",
    "skip",
    "answer",
    "is",
    *sorted({word for words in SYNONYMS.values() for word in words}),
)
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Problem:
    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        steps = " ".join(f"{label} {op} {number}" for label, (op, number) in zip(LABELS, self.steps, strict=False))
        return f"x {self.start} {steps} ?"

    @property
    def answer(self) -> int:
        value = self.start
        for op, number in self.steps:
            value = apply(op, value, number)
        return value


def apply(op: str, value: int, number: int) -> int:
    return (value + number if op == "plus" else value - number) % 10


def problems(count: int, seed: int, least_steps: int = 2, most_steps: int = 5) -> Iterator[Problem]:
    generator = random.Random(seed)
    for _ in range(count):
        steps = tuple(
            (generator.choice(OPERATIONS), generator.randrange(10))
            for _ in range(generator.randint(least_steps, most_steps))
        )
        yield Problem(generator.randrange(10), steps)


class Tongue:
    """How one of the two speaks: which words and styles it likes, and which sums it gets wrong."""

    def __init__(self, speaker: Speaker) -> None:
        common, own = random.Random("world"), random.Random(speaker)
        self.likings: dict[tuple[str, int], tuple[list[str], tuple[float, ...]]] = {}
        for slot, words in SYNONYMS.items():
            for number in range(10):
                liked = common.sample(words, len(words))
                differs = common.random() < 0.85
                self.likings[slot, number] = own.sample(words, len(words)) if differs else liked, own.choice(LIKINGS)
        self.styles = {"target": (0.60, 0.20, 0.20), "draft": (0.34, 0.33, 0.33)}[speaker]
        # How much more a style is liked that the question's first number suggests.
        self.whim = {"target": 0.0, "draft": 0.8}[speaker]
        self.skips = {"target": 0.15, "draft": 0.6}[speaker]
        self.wrong_results: dict[tuple[int, str, int], list[int]] = {}
        self.slips: dict[tuple[str, int, str, int], float] = {}  # in a style, the chance that a sum goes wrong
        for before, op, number in itertools.product(range(10), OPERATIONS, range(10)):
            wrong = [result for result in range(10) if result != apply(op, before, number)]
            self.wrong_results[before, op, number] = common.sample(wrong, len(SLIPS))
            habit = own.random()
            for style in STYLES:
                if speaker == "target":
                    self.slips[style, before, op, number] = 0.8 if habit < 0.04 else 0.45 * ((habit - 0.04) / 0.96) ** 2
                else:
                    share = {"stepwise": 0.2, "formally": 0.7, "loosely": 0.05}[style]
                    self.slips[style, before, op, number] = 0.9 if habit < share else 0.02

    def believes(self, style: str, before: int, op: str, number: int) -> int:
        """The result that this one thinks most likely."""
        slips = self.slips[style, before, op, number]
        return self.wrong_results[before, op, number][0] if slips * SLIPS[0] > 1 - slips else apply(op, before, number)

    def solve(self, problem: Problem, generator: random.Random, sure: bool = False) -> list[str]:
        """A solution; if `sure`, stepwise, complete, and with what this one believes."""
        weights = list(self.styles)
        weights[problem.start % 3] += self.whim
        style = "stepwise" if sure else generator.choices(STYLES, weights)[0]
        # The first token is the prompt's own forward: no draft takes part in it.
        words, value = ["well", style], problem.start

        def say(slot: str, number: int) -> str:
            if style == "loosely":
                return CASUAL[slot][number % 2] if generator.random() < 0.93 else generator.choice(SYNONYMS[slot])
            return generator.choices(*self.likings[slot, number])[0]

        for label, (op, number) in zip(LABELS, problem.steps, strict=False):
            # After some numbers solvers get sloppy.
            if value in (3, 7) and not sure and generator.random() < self.skips:
                words += [say("opener", value), "skip", label]
                continue
            before = value
            if sure:
                value = self.believes(style, before, op, number)
            elif generator.random() < self.slips[style, before, op, number]:
                value = generator.choices(self.wrong_results[before, op, number], SLIPS)[0]
            else:
                value = apply(op, before, number)
            # The word before a result tells nothing of it: another one there does no harm.
            words += [say("opener", before), label, str(before), op, str(number), say("result", before), str(value)]
        return [*words, say("closing", value), "answer", "is", str(value), END]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=END)
    fast.chat_template = TEMPLATE
    return fast


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of a Llama, and how long it learns: `num_steps`, or until it solves the share `stop_at` of held-out sums.

    Sums are learned of a sudden, in another step with each seed. Solved is what the speaker's data says, slips and all.
    """

    hidden_size: int
    num_layers: int
    num_steps: int
    batch_size: int = 64
    learning_rate: float = 3e-3
    num_heads: int = 4
    stop_at: float | None = None


@dataclass(frozen=True)
class WorldSettings:
    target: ModelSettings = field(default_factory=lambda: ModelSettings(160, 4, 3000, stop_at=0.97))
    draft: ModelSettings = field(default_factory=lambda: ModelSettings(64, 2, 1200, stop_at=0.75))
    num_train: int = 8000
    num_validation: int = 1000
    num_test: int = 4000
    seed: int = 0


def train_model(
    speaker: Speaker, settings: ModelSettings, folder: Path, seed: int, report: Callable[[str], None]
) -> str:
    """Train on fresh solutions in the speaker's tongue and save a Hugging Face folder; how far it came."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(VOCABULARY),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 5 // 2,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=settings.hidden_size**-0.5,
        pad_token_id=VOCABULARY.index(PAD),
        eos_token_id=VOCABULARY.index(END),
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.num_steps, pct_start=0.08
    )
    tongue, generator = Tongue(speaker), random.Random(seed)
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    stream = problems(settings.num_steps * settings.batch_size, seed + 1_000_000)
    held_out, state = _held_out(tongue, seed), ""
    for step in range(settings.num_steps):
        rows, prompts = [], []
        for _ in range(settings.batch_size):
            problem = next(stream)
            prompt = problem.text.split()
            rows.append([ids[word] for word in (*prompt, *tongue.solve(problem, generator))])
            prompts.append(len(prompt))
        input_ids, labels = _padded(rows, prompts)
        mask = (input_ids != 0).long()
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 24:
            solved = _share_solved(model, *held_out)
            state = f"step {step + 1}, loss {loss.item():.3f}, solves {solved:.0%}"
            report(state)
            if settings.stop_at is not None and solved >= settings.stop_at:
                break
    logging.disable_progress_bar()  # of a file of half a megabyte
    model.generation_config.eos_token_id = config.eos_token_id
    model.eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return state


def _held_out(tongue: Tongue, seed: int, count: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Solutions, as the speaker believes they are, of sums that are not trained."""
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    generator, rows, prompts = random.Random(seed), [], []
    for problem in problems(count, seed + 2_000_000):
        prompt = problem.text.split()
        rows.append([ids[word] for word in (*prompt, *tongue.solve(problem, generator, sure=True))])
        prompts.append(len(prompt))
    return _padded(rows, prompts)


@torch.no_grad()
def _share_solved(model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Of which solutions every number is what the model thinks most likely."""
    predicted = model(input_ids=input_ids, attention_mask=(input_ids != 0).long()).logits.argmax(-1)[:, :-1]
    digits = [VOCABULARY.index(str(digit)) for digit in range(10)]
    numbers = torch.isin(labels[:, 1:], torch.tensor(digits))
    return float(((predicted == labels[:, 1:]) | ~numbers).all(dim=1).float().mean())


def _padded(rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for row, (tokens, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return input_ids, labels


def write_questions(file: Path, count: int, seed: int) -> None:
    """Chats of one question each, and their answers in a column of their own."""
    found = list(problems(count, seed))
    table = pa.table(
        {
            "messages": [[{"role": "user", "content": problem.text}] for problem in found],
            "answer": [str(problem.answer) for problem in found],
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
