"""What the demo does in its two budgets. Every number that decides a stage's result is here, and keys its marker."""

import re
from dataclasses import dataclass, field
from pathlib import Path

MAX_NEW_TOKENS = 96


@dataclass(frozen=True)
class DataSettings:
    max_functions: int | None = None
    vocab_size: int = 2048


@dataclass(frozen=True)
class BaseModelSettings:
    """Sizes for minutes of training on two cores: many small steps teach more here than a larger model."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 3
    num_heads: int = 2
    num_steps: int = 420
    batch_size: int = 16
    max_length: int = 512
    learning_rate: float = 4e-3


@dataclass(frozen=True)
class AnswerSettings:
    num_prompts: int = 2000
    num_val_prompts: int = 64
    batch_size: int = 100
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True)
class SpeculatorSettings:
    n_predict: int = 3
    width: int = 256
    num_steps: int = 280
    test_freq: int = 40
    batch_size: int = 16
    max_length: int = 512
    learning_rate: float = 1e-2


@dataclass(frozen=True)
class DecodingSettings:
    num_prompts: int = 32
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True)
class DemoSettings:
    data: DataSettings = field(default_factory=DataSettings)
    base: BaseModelSettings = field(default_factory=BaseModelSettings)
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    speculator: SpeculatorSettings = field(default_factory=SpeculatorSettings)
    decoding: DecodingSettings = field(default_factory=DecodingSettings)


BUDGETS = {
    "full": DemoSettings(),
    "small": DemoSettings(
        data=DataSettings(max_functions=600, vocab_size=512),
        base=BaseModelSettings(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_steps=10),
        answers=AnswerSettings(num_prompts=64, num_val_prompts=8, batch_size=64, max_new_tokens=32),
        speculator=SpeculatorSettings(width=64, num_steps=10, test_freq=5),
        decoding=DecodingSettings(num_prompts=4, max_new_tokens=32),
    ),
}


def hydra_path(path: Path) -> str:
    """A path as the value of a Hydra override, whatever characters its folders have."""
    # Hydra reads a backslash as one, except before a quote or at the end of the value.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", str(path)).replace("'", "\\'")
    return f"'{escaped}'"
