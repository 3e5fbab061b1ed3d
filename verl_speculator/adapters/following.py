"""What is set of a speculator that follows a policy: `actor_rollout_ref.actor.fsdp_config.speculator`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from verl_speculator.errors import ConfigError, nearest_name

KEY = "actor_rollout_ref.actor.fsdp_config.speculator"

_WHOLE_NUMBERS = {
    "every_n_steps": 1,
    "max_tokens_per_step": 1,
    "lr_warmup_steps": 0,
    "extra_steps": 0,
    "replay_steps": 0,
}


@dataclass(frozen=True)
class FollowingSpeculator:
    """A trained speculator and how it goes on learning.

    Attributes:
        path: The folder of the speculator that rollout starts with.
        lr: Of Adam, constant after the warm-up.
        lr_warmup_steps: Trainer steps over which it grows from 0.
        weight_decay: Of AdamW.
        clip_grad: The largest norm of its gradient; the policy's has its own.
        every_n_steps: It learns in every n-th trainer step, beginning with the first.
        max_tokens_per_step: Of all ranks' response tokens in an optimizer step, at most so many train it: whole
            responses drawn at random, the last one cut. None for all.
        extra_steps: After each of its steps beside the policy it makes so many alone, each on the hidden states of one
            step that is kept.
        replay_steps: Of so many earlier trainer steps hidden states are kept beside those of the present one.
        shadow_frozen: Measure what the speculator in `path` would still accept beside the one that learns.
        adaptive: Learn only while that makes a difference, with a step now and then to find out.
        training: Its training settings, such as `objective: kl` or `head_loss_weights`.
    """

    path: str = ""
    lr: float = 1e-4
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    every_n_steps: int = 1
    max_tokens_per_step: int | None = None
    extra_steps: int = 0
    replay_steps: int = 0
    shadow_frozen: bool = False
    adaptive: bool = False
    training: dict[str, Any] = field(default_factory=dict)

    # What `SpeculatorEngine` asks beside; a policy leaves no choice.
    freeze_base_model: ClassVar[bool] = False
    detach_hidden_states: ClassVar[bool] = True
    compile: ClassVar[bool] = False
    measure_sampled_acceptance: ClassVar[bool] = False
    gather_speculator_once: ClassVar[bool] = True
    speculator_shard_size: ClassVar[int | None] = None

    @property
    def speculator_path(self) -> str:
        return self.path

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> FollowingSpeculator:
        """Check what a configuration holds.

        Raises:
            ConfigError: A key is unknown, or its value cannot work.
        """
        values = dict(values or {})
        known = [one.name for one in fields(cls)]
        for key in values:
            if key not in known:
                near = nearest_name(key, known)
                hint = f"did you mean {near}?" if near else f"it has {', '.join(known)}"
                raise ConfigError(f"{KEY}.{key} is not a setting of a speculator that follows a policy; {hint}")
        for key, least in _WHOLE_NUMBERS.items():
            value = values.get(key, least)
            is_all = key == "max_tokens_per_step" and value is None
            if not is_all and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{KEY}.{key} must be a whole number of at least {least}, not {value!r}")
        for key in ("lr", "weight_decay", "clip_grad"):
            value = values.get(key, 1.0)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < 0 or (value == 0 and key != "weight_decay"):
                above = "of at least 0" if key == "weight_decay" else "above 0"
                raise ConfigError(f"{KEY}.{key} must be a number {above}, not {value!r}")
        for key in ("shadow_frozen", "adaptive"):
            if not isinstance(values.get(key, False), bool):
                raise ConfigError(f"{KEY}.{key} must be true or false, not {values[key]!r}")
        if values.get("adaptive") and not values.get("shadow_frozen"):
            raise ConfigError(f"{KEY}.adaptive=true compares with the frozen speculator: set {KEY}.shadow_frozen=true")
        if values.get("replay_steps") and not values.get("extra_steps"):
            raise ConfigError(f"{KEY}.replay_steps={values['replay_steps']} is read by extra_steps: set that too")
        if not isinstance(values.get("training", {}), Mapping):
            raise ConfigError(
                f"{KEY}.training must hold settings such as {{objective: kl}}, not {values['training']!r}"
            )
        if not isinstance(values.get("path"), str) or not values["path"]:
            raise ConfigError(
                f"{KEY}.path must name the folder of a trained speculator: the one that rollout drafts with"
            )
        return cls(**values)
