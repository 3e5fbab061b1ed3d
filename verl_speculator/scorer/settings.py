"""Settings of a scorer's training that verl has no keys for, read from where verl leaves room for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from verl_speculator.errors import ConfigError, nearest_name

T = TypeVar("T")

_TYPES: dict[str, tuple[type, ...]] = {
    "float": (int, float),
    "int": (int,),
    "int | None": (int, type(None)),
    "bool": (bool,),
    "str": (str,),
}

ROLLOUT_SECTION = "actor_rollout_ref.rollout.custom"
REWARD_SECTION = "reward.reward_kwargs"
# `reward.custom_reward_function` where the user has no other.
OWN_SCORE = ("pkg://verl_speculator.scorer.spd_scorer_reward", "compute_score")


@dataclass(frozen=True)
class ThresholdSettings:
    """How a mismatch's score becomes a decision outside of training, which draws its decisions by their score.

    Attributes:
        mode: "fixed" is `score_threshold`; "adaptive" moves it until `acceptance_rate` of the mismatches reach it;
            "learned" takes what the head's bias has learned as the threshold (`controllers.learned_threshold`).
        acceptance_rate: Of mismatches, for "adaptive".
        step_size: By how much a step moves it, for each unit by which the rate is off.
    """

    mode: str = "fixed"
    acceptance_rate: float = 0.5
    step_size: float = 0.05

    def __post_init__(self) -> None:
        _require_choice(f"{ROLLOUT_SECTION}.threshold.mode", self.mode, ("fixed", "adaptive", "learned"))
        _require_between(f"{ROLLOUT_SECTION}.threshold.acceptance_rate", self.acceptance_rate, 0, 1)
        _require_between(f"{ROLLOUT_SECTION}.threshold.step_size", self.step_size, 0, 1)


@dataclass(frozen=True)
class CompletionSettings:
    """What finishes an answer after a window's accepted drafts: the target, greedily.

    Attributes:
        backend: "hf", or "vllm" for an engine that all of the run shares.
        batch_size: Answers at a time.
        num_gpus: Of Ray's, for the process that it runs in; 0 is a CPU.
    """

    backend: str = "hf"
    batch_size: int = 32
    num_gpus: float = 0

    def __post_init__(self) -> None:
        _require_choice(f"{ROLLOUT_SECTION}.completion.backend", self.backend, ("hf", "vllm"))
        _require_at_least(f"{ROLLOUT_SECTION}.completion.batch_size", self.batch_size, 1)
        _require_at_least(f"{ROLLOUT_SECTION}.completion.num_gpus", self.num_gpus, 0)


@dataclass(frozen=True)
class RolloutSettings:
    """`actor_rollout_ref.rollout.custom`.

    Attributes:
        target_model_path: The target, a Hugging Face folder.
        draft_model_path: What drafts in closed-loop episodes: a speculator's folder or a causal language model's.
        score_threshold: A mismatch is accepted from this score on, in validation and in what is saved.
        score_momentum: With how much of it a step counts in the running mean and deviation by which scores are
            normalised; 0 leaves them as they are.
        closed_loop: Train on whole answers, which the scorer itself decodes, instead of on single windows.
        num_draft_tokens: Drafts of a round in closed-loop episodes; None is as many as the drafter can make.
        max_new_tokens: Where an answer is cut.
        answer_pattern: A regular expression whose group is an answer; None finds the usual forms.
        threshold: See `ThresholdSettings`.
        completion: See `CompletionSettings`.
    """

    target_model_path: str
    draft_model_path: str | None = None
    score_threshold: float = 0.5
    score_momentum: float = 0.0
    closed_loop: bool = False
    num_draft_tokens: int | None = None
    max_new_tokens: int = 512
    answer_pattern: str | None = None
    threshold: ThresholdSettings = field(default_factory=ThresholdSettings)
    completion: CompletionSettings = field(default_factory=CompletionSettings)

    def __post_init__(self) -> None:
        if self.closed_loop and not self.draft_model_path:
            raise ConfigError("rollout.closed_loop=true needs rollout.draft_model_path, the folder of what drafts")
        _require_between(f"{ROLLOUT_SECTION}.score_threshold", self.score_threshold, 0, 1)
        _require_between(f"{ROLLOUT_SECTION}.score_momentum", self.score_momentum, 0, 1)
        _require_at_least(f"{ROLLOUT_SECTION}.max_new_tokens", self.max_new_tokens, 1)
        if self.num_draft_tokens is not None:
            _require_at_least(f"{ROLLOUT_SECTION}.num_draft_tokens", self.num_draft_tokens, 1)

    @classmethod
    def of(cls, config: Any) -> RolloutSettings:
        """From verl's `actor_rollout_ref` section."""
        values = _plain(config.rollout.custom)
        if not values.get("target_model_path"):
            raise ConfigError("rollout.target_model_path must name the target model's folder")
        for name, kind in (("threshold", ThresholdSettings), ("completion", CompletionSettings)):
            values[name] = _build(kind, values.get(name) or {}, f"{ROLLOUT_SECTION}.{name}")
        return _build(cls, values, ROLLOUT_SECTION)


@dataclass(frozen=True)
class RewardSettings:
    """`reward.reward_kwargs`: the coefficients of `reward.compute_spd_reward`.

    Attributes:
        right_right: When the answer is right, and strict decoding's is too.
        right_wrong: When it is right, and strict decoding's is not.
        wrong_right: When it is wrong, and strict decoding's is right: the scorer did harm.
        wrong_wrong: When both are wrong.
        length_weight: Times the share of drafts that were kept.
        dense_weight: Times the share of drafts kept beyond strict decoding, counted as a loss where they did harm.
        step_weight: Times what `step_reward_path` gives.
        step_reward_path: A Python file with a function of the user's that judges the accepted part of a window.
        step_reward_name: That function.
        cost: λ at the start, the price of a call of the target: times calls, in units of what strict decoding takes.
        cost_step: By how much a step moves λ for each unit by which the accuracy is off its bound; 0 leaves λ alone.
        cost_max: λ's largest value.
        accuracy_loss: How much accuracy may be lost against strict decoding: λ falls while more is lost, else it rises.
    """

    right_right: float = 1.0
    right_wrong: float = 1.0
    wrong_right: float = 0.0
    wrong_wrong: float = 0.0
    length_weight: float = 0.0
    dense_weight: float = 0.0
    step_weight: float = 0.0
    step_reward_path: str | None = None
    step_reward_name: str = "step_reward"
    cost: float = 0.0
    cost_step: float = 0.0
    cost_max: float = 2.0
    accuracy_loss: float = 0.01

    def __post_init__(self) -> None:
        for name in ("cost", "cost_step", "cost_max"):
            _require_at_least(f"{REWARD_SECTION}.{name}", getattr(self, name), 0)
        _require_between(f"{REWARD_SECTION}.accuracy_loss", self.accuracy_loss, 0, 1)
        if self.step_weight and not self.step_reward_path:
            raise ConfigError(f"{REWARD_SECTION}.step_weight needs {REWARD_SECTION}.step_reward_path, a Python file")

    @classmethod
    def of(cls, config: Any) -> RewardSettings:
        """From verl's whole configuration."""
        return _build(cls, _plain(config.reward.reward_kwargs), REWARD_SECTION)


def _build(kind: type[T], values: Mapping[str, Any], section: str) -> T:
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = nearest_name(key, names)
            meant = f"; did you mean {near}?" if near else f"; it has {', '.join(names)}"
            raise ConfigError(f"{section}.{key} is not a configuration key{meant}")
    for one in fields(kind):  # type: ignore[arg-type]
        wanted = _TYPES.get(str(one.type))
        value = values.get(one.name)
        if one.name not in values or wanted is None:
            continue
        # A bool is an int for Python, and no number for us.
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise ConfigError(f"{section}.{one.name}={value!r} must be a {str(one.type).partition(' ')[0]}")
    return kind(**values)


def _plain(section: Any) -> dict[str, Any]:
    """A section of an OmegaConf configuration, which may be missing, as a dictionary."""
    if not section:
        return {}
    if isinstance(section, dict):
        return dict(section)
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(section, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value!r} must be one of {', '.join(choices)}")


def _require_between(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{key}={value} must be between {low} and {high}")


def _require_at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{key}={value} must be at least {least}")
