"""What an evaluation is asked to do. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from verl_speculator.base_model.settings import LoadSettings, flag, require_choice
from verl_speculator.errors import ConfigError

DRAFT_SAMPLING = ("greedy", "random")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(LoadSettings):
    """How to load the base and how to decode; each field is the flag of the same name of `verl-speculator eval`.

    Attributes:
        num_prompts: The first so many rows of the data; None takes all. Its flag is `--limit`.
        num_draft_tokens: Drafted per round; with several, each speculator is measured with each of them. Empty takes
            its `n_predict`.
        accept: Acceptance rules, such as "top-k:2" or "scorer:FOLDER": each speculator is also measured with each of
            them. Such decoding is lossy.
        answers: The column of the data with the right answers; None measures no accuracy.

    Raises:
        ConfigError: A value that cannot work; the message names its flag.
    """

    num_prompts: int | None = 64
    max_new_tokens: int = 128
    num_draft_tokens: tuple[int, ...] = ()
    batch_size: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    draft_sampling: str = "greedy"
    messages_key: str = "messages"
    accept: tuple[str, ...] = ()
    answers: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "batch_size", "num_prompts", "num_draft_tokens"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number < 1:
                    shown = "--limit" if name == "num_prompts" else flag(name)
                    raise ConfigError(f"{shown} must be at least 1, got {number}")
        if len(set(self.num_draft_tokens)) < len(self.num_draft_tokens):
            raise ConfigError(f"--num-draft-tokens names the same number twice: {self.num_draft_tokens}")
        if len(set(self.accept)) < len(self.accept):
            raise ConfigError(f"--accept names the same rule twice: {', '.join(self.accept)}")
        if not self.temperature >= 0:
            raise ConfigError(f"--temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"--top-k must be 0 (off) or more, got {self.top_k}")
        require_choice("draft_sampling", self.draft_sampling, DRAFT_SAMPLING)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def memory_advice(self) -> str:
        """What to lower where decoding runs out of memory."""
        if self.batch_size > 1:
            return f"lower --batch-size={self.batch_size}, then --max-new-tokens={self.max_new_tokens}"
        return f"lower --max-new-tokens={self.max_new_tokens}, or use --dtype bfloat16"


@dataclass(frozen=True)
class EvaluationInput:
    """What is evaluated on what: folders or names on the hub, and chat files in parquet."""

    base: str
    speculators: tuple[str, ...]
    data: tuple[str, ...]
    chat_template: Path | None = None


def label_paths(paths: tuple[str, ...]) -> list[str]:
    """Short names that tell the folders apart, such as `run step 500`, with as many folders above as that takes."""
    parts = [_named_parts(path) for path in paths]
    labels = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = 1
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        labels.append("/".join(own[-length:]))
    return [
        f"{label} ({labels[: index + 1].count(label)})" if labels.count(label) > 1 else label
        for index, label in enumerate(labels)
    ]


def _named_parts(path: str) -> tuple[str, ...]:
    """The folders of a path, the last ones joined where a name alone says little."""
    if not Path(path).is_absolute() and not Path(path).exists():
        return (path,)  # a name on the hub
    parts = Path(path).resolve().parts
    if parts[-1] == "speculator" and len(parts) > 3 and parts[-2].startswith("global_step_"):
        parts = parts[:-1]
    if len(parts) < 3:
        return parts
    *above, folder, last = parts
    if last.startswith("global_step_"):
        return (*above, f"{folder} step {last.removeprefix('global_step_')}")
    return (*above, f"{folder}/{last}") if last == "speculator" else (*above, folder, last)
