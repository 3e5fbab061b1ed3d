"""What the demo does in its two budgets. Every number that decides a stage's result is here, and keys its marker."""

import re
from dataclasses import dataclass, field
from pathlib import Path

MAX_NEW_TOKENS = 192  # of the answers to train on


@dataclass(frozen=True)
class AnswerSettings:
    """Of the answers that the repository ships, how many are used, and how many are written anew to compare."""

    num_prompts: int | None = None
    num_written_anew: int = 3


@dataclass(frozen=True)
class SpeculatorSettings:
    """Found on answers to other prompts than those measured; docs/experiments.md says what was tried."""

    n_predict: int = 3
    width: int = 256
    draft_vocab_size: int = 8000
    num_epochs: int = 8
    batch_size: int = 16
    max_length: int = 512
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    objective: str = "kl"


@dataclass(frozen=True)
class DecodingSettings:
    """Acceptance is measured on many prompts at once, speed on a few, one at a time."""

    num_prompts: int = 40
    batch_size: int = 16
    num_speed_prompts: int = 4
    max_new_tokens: int = 64


@dataclass(frozen=True)
class DemoSettings:
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    speculator: SpeculatorSettings = field(default_factory=SpeculatorSettings)
    decoding: DecodingSettings = field(default_factory=DecodingSettings)


BUDGETS = {
    "full": DemoSettings(),
    "small": DemoSettings(
        answers=AnswerSettings(num_prompts=16, num_written_anew=1),
        speculator=SpeculatorSettings(width=64, draft_vocab_size=500, num_epochs=2),
        decoding=DecodingSettings(num_prompts=2, num_speed_prompts=1, batch_size=2, max_new_tokens=16),
    ),
}


def hydra_path(path: Path) -> str:
    """A path as the value of a Hydra override, whatever characters its folders have."""
    # Hydra reads a backslash as one, except before a quote or at the end of the value.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", str(path)).replace("'", "\\'")
    return f"'{escaped}'"
