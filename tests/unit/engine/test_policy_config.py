from __future__ import annotations

import pytest

from verl_speculator.adapters.following import KEY, FollowingSpeculator
from verl_speculator.engine.policy_config import PolicyEngineConfig
from verl_speculator.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, f"{KEY}.path must name the folder"),
        ({"path": "s", "every_n_step": 2}, "did you mean every_n_steps?"),
        ({"path": "s", "colour": 2}, "it has path, lr, "),
        ({"path": "s", "every_n_steps": 0}, "every_n_steps must be a whole number of at least 1, not 0"),
        ({"path": "s", "max_tokens_per_step": 1.5}, "max_tokens_per_step must be a whole number of at least 1"),
        ({"path": "s", "lr_warmup_steps": None}, "lr_warmup_steps must be a whole number of at least 0, not None"),
        ({"path": "s", "lr": 0}, "lr must be a number above 0, not 0"),
        ({"path": "s", "lr": "1e-4"}, "lr must be a number above 0, not '1e-4'"),
        ({"path": "s", "weight_decay": -1}, "weight_decay must be a number of at least 0"),
        ({"path": "s", "training": "kl"}, "training must hold settings such as {objective: kl}"),
    ],
)
def test_mistaken_settings_are_refused_by_key(values, words):
    with pytest.raises(ConfigError) as error:
        PolicyEngineConfig(strategy="fsdp2", speculator=values)

    assert words in str(error.value)
    assert str(error.value).startswith(KEY)


def test_what_verl_composes_becomes_the_engines_settings():
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    target = f"{PolicyEngineConfig.__module__}.{PolicyEngineConfig.__qualname__}"
    speculator = {"path": "folder", "max_tokens_per_step": None, "training": {"objective": "kl"}}
    config = omega_conf_to_dataclass(
        OmegaConf.create({"_target_": target, "strategy": "fsdp2", "param_offload": True, "speculator": speculator})
    )

    settings = FollowingSpeculator.of(config.speculator)
    assert (settings.path, settings.max_tokens_per_step, settings.training) == ("folder", None, {"objective": "kl"})
    assert config.param_offload
