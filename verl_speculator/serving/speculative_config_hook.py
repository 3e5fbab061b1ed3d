"""Hook 1: vLLM's `SpeculativeConfig` recognises a speculator folder. Checked on vLLM 0.28.0 and 0.32.0.

`SpeculativeConfig(model=..., num_speculative_tokens=...)` works out the method in `__post_init__`. Before it does, a
speculator of this package is turned into vLLM's `custom_class` with our proposer; anything else passes through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from verl_speculator.errors import ConfigError
from verl_speculator.serving.compatibility import check_version, moved, wrap_method

PROPOSER = "verl_speculator.serving.proposer.SpeculatorProposer"
# Where the configuration carries the speculator to the workers.
ATTRIBUTE = "verl_speculator"
METHOD = "custom_class"
# What a user may have set next to a speculator; with any other method the name is not looked at.
METHODS = (None, "mlp_speculator", "draft_model")
# Settings that would have no effect, with the only values under which that does not matter.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "draft_tensor_parallel_size": (None, 1),
    "draft_sample_method": ("greedy",),
    "max_model_len": (None,),
    "parallel_drafting": (False,),
    "quantization": (None,),
    "use_heterogeneous_vocab": (False,),
}


def install() -> None:
    from vllm.config.speculative import SpeculativeConfig

    wrap_method(SpeculativeConfig, "__post_init__", _recognise_first)


def _recognise_first(original: Callable[..., None]) -> Callable[..., None]:
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        use_speculator(self)
        original(self, *args, **kwargs)

    return post_init


def use_speculator(config: Any) -> None:
    """Turn a `SpeculativeConfig` that names a speculator of this package into one that drafts with our proposer.

    Raises:
        ConfigError: the speculator does not fit the base model, or a setting cannot work with it.
        UnsupportedEngineError: this vLLM is too old or has no `custom_class` method any more.
    """
    if config.model is None or config.model == PROPOSER or config.method not in METHODS:
        return
    from verl_speculator.serving.recognition import find_speculator, number_of_drafts

    speculator = find_speculator(config.model, config.revision)
    if speculator is None:
        return
    _check_engine()
    for name, values in WITHOUT_EFFECT.items():
        if getattr(config, name, values[0]) not in values:
            raise ConfigError(
                f"{name} has no effect on the speculator {config.model} and must be left out of the speculative config."
            )
    if config.target_parallel_config.pipeline_parallel_size > 1:
        raise ConfigError(
            "pipeline_parallel_size must be 1 with a speculator of verl_speculator; use tensor_parallel_size instead."
        )
    target = config.target_model_config
    speculator.config.check_fits_base(target.get_hidden_size(), target.get_vocab_size())
    config.num_speculative_tokens = number_of_drafts(speculator.config, config.num_speculative_tokens)
    setattr(config, ATTRIBUTE, speculator)
    config.model, config.method = PROPOSER, METHOD


def _check_engine() -> None:
    import vllm
    from vllm.config import speculative
    from vllm.logger import init_logger

    warning = check_version(vllm.__version__)
    if warning:
        init_logger("vllm.verl_speculator").warning_once(warning)
    methods = getattr(speculative, "SpeculativeMethod", None)
    if METHOD not in _literals(methods):
        raise moved(f"its SpeculativeConfig has no method {METHOD!r} any more")


def _literals(annotation: Any) -> set[Any]:
    found = get_args(annotation)
    return set().union(*(_literals(part) for part in found)) if found else {annotation}
