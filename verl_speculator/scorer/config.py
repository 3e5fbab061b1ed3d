"""What a scorer is made of, as it stands in its folder's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from verl_speculator.errors import ConfigError, nearest_name

if TYPE_CHECKING:
    from torch import Tensor

# What is known of a mismatch beside the target's states; `features.py` has the formulas.
SCALARS = (
    "draft_logprob",
    "target_logprob",
    "margin",
    "entropy",
    "rank",
    "position",
    "following_matches",
    "following_drafts",
)
# The drafter's own distribution must be at hand for these.
DRAFT_SCALARS = ("kl", "draft_confidence")


@dataclass(frozen=True)
class ScoringModelConfig:
    """Sizes and options of a `ScoringActor`.

    Attributes:
        hidden_size: Of the target, whose states are read.
        lora_rank: 0 reads the frozen target's own states, which verification has computed: scoring is then free of
            forwards. Above 0 the scorer is a second model, the target with LoRA of this rank, and each round in which
            it is asked costs one forward more.
        lora_alpha: LoRA's scale is `lora_alpha / lora_rank`.
        target_modules: Which linear layers get LoRA: "all-linear", or a list of names.
        target_model_path: Where the target is; weights of the target are never part of a scorer's folder.
        inner_dim: Width of the head's hidden layers.
        num_layers: Hidden layers of the head.
        use_states: Read states and the target token's embedding; false leaves the scalars, for small data.
        scalars: Of `SCALARS` and `DRAFT_SCALARS`.
        lookahead: A mismatch is judged with this many next drafts in view: the states after reading them, and whether
            they match. They are computed in the same forward, so this costs nothing.
        accept_bias: The log odds of accepting that a fresh head starts with.
        temperature: Scores are `sigmoid((z - score_mean) / (score_scale * temperature))`, with z the log odds of
            accepting: see `normalise`.
        score_mean: What training has found as the mean of z over mismatches, where scores are to be normalised.
        score_scale: And as its standard deviation.
        threshold: A mismatch is accepted from this score on.
        thresholds_by_position: Pairs (place in the answer, threshold): another threshold from that place on. An early
            error has more time to do harm.
    """

    hidden_size: int
    lora_rank: int = 0
    lora_alpha: int = 32
    target_modules: str | tuple[str, ...] = "all-linear"
    target_model_path: str | None = None
    inner_dim: int = 128
    num_layers: int = 1
    use_states: bool = True
    scalars: tuple[str, ...] = SCALARS
    lookahead: int = 0
    accept_bias: float = 0.0
    temperature: float = 1.0
    score_mean: float = 0.0
    score_scale: float = 1.0
    threshold: float = 0.5
    thresholds_by_position: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("scalars", "target_modules"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        for name, least in (
            ("hidden_size", 1),
            ("lora_rank", 0),
            ("inner_dim", 1),
            ("num_layers", 0),
            ("lookahead", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r} of a scorer must be an integer from {least} on")
        for name in ("lora_alpha", "temperature", "score_scale"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} of a scorer must be above 0")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold} of a scorer must be between 0 and 1")
        known = (*SCALARS, *DRAFT_SCALARS)
        pairs = tuple((int(place), float(threshold)) for place, threshold in self.thresholds_by_position)
        object.__setattr__(self, "thresholds_by_position", pairs)
        if list(pairs) != sorted(set(pairs)) or any(place < 0 or not 0 <= value <= 1 for place, value in pairs):
            raise ConfigError(
                f"thresholds_by_position={list(pairs)} must be pairs (place, threshold from 0 to 1) in ascending order"
            )
        for name in self.scalars:
            if name not in known:
                raise ConfigError(f"scalars: {name!r} is none of {', '.join(known)}")
        if not self.use_states and not self.scalars:
            raise ConfigError("a scorer needs scalars or use_states=true: it would have nothing to look at")

    @property
    def needs_draft_logits(self) -> bool:
        return any(name in DRAFT_SCALARS for name in self.scalars)

    @property
    def num_features(self) -> int:
        """What the head reads of a mismatch: see `features.head_features`."""
        states = (3 + self.lookahead) * self.hidden_size if self.use_states else 0
        return states + 2 * self.lookahead + len(self.scalars)

    def normalise(self, log_odds: Tensor) -> Tensor:
        """What a score is the sigmoid of, from the log odds of accepting."""
        return (log_odds - self.score_mean) / (self.score_scale * self.temperature)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScoringModelConfig:
        """Raises ConfigError for a key that it does not know, with the nearest that it does."""
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                near = nearest_name(key, names)
                raise ConfigError(f"a scorer has no {key!r}" + (f"; {near!r} is meant?" if near else ""))
        return cls(**values)
