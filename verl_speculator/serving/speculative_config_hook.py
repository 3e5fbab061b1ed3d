"""vLLM's `SpeculativeConfig` recognises a speculator folder. Checked on vLLM 0.28.0 and 0.32.0.

`SpeculativeConfig(model=..., num_speculative_tokens=...)` works out the method in `__post_init__`. Before it does, a
speculator of this package is given a method that vLLM knows; anything else passes through. On Model Runner V2 that is
`ngram_gpu`, the one that needs no model, no cache and no aux states of vLLM's, and with which it schedules
asynchronously: what drafts is then made by `v2/hook.py`. On the first runner it is `custom_class` with our proposer.

Beside the speculator two more keys are taken, `accept` and `lossy`: an acceptance rule, and that it is meant.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

from verl_speculator.errors import ConfigError, naming
from verl_speculator.serving import lossy_requests
from verl_speculator.serving.compatibility import V2_FROM, check_version, moved, parse, wrap

# Where the configuration carries the speculator to the workers.
ATTRIBUTE = "verl_speculator"
V2_METHOD = "ngram_gpu"
V1_METHOD = "custom_class"
PROPOSER = "verl_speculator.serving.v1.proposer.SpeculatorProposer"
# What a user may have set next to a speculator; with any other method the name is not looked at.
METHODS = (None, "mlp_speculator", "draft_model")
# Settings that would have no effect, with the only values under which that does not matter.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "draft_tensor_parallel_size": (None, 1),
    "enable_adaptive_verification": (False,),
    "max_model_len": (None,),
    "parallel_drafting": (False,),
    "quantization": (None,),
    "use_heterogeneous_vocab": (False,),
    "use_local_argmax_reduction": (False,),
}
WITHOUT_EFFECT_ON_V1 = {"draft_sample_method": ("greedy",)}


def install() -> None:
    from vllm.config.speculative import SpeculativeConfig

    wrap(SpeculativeConfig, "__post_init__", _recognise_first)
    wrap(SpeculativeConfig, "__init__", _take_rule)
    lossy_requests.install()


def _take_rule(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *args: Any, accept: str | None = None, lossy: bool = False, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if accept is not None or lossy:
            use_rule(self, accept, lossy)

    return init


def _recognise_first(original: Callable[..., None]) -> Callable[..., None]:
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        use_speculator(self)
        original(self, *args, **kwargs)
        if getattr(self, ATTRIBUTE, None) is not None:
            finish(self)

    return post_init


def use_speculator(config: Any) -> None:
    """Turn a `SpeculativeConfig` that names a speculator of this package into one that drafts with it.

    Raises:
        ConfigError: the speculator does not fit the base model, or a setting cannot work with it.
        UnsupportedEngineError: this vLLM is too old or does not have the method any more.
    """
    if config.model is None or config.model == PROPOSER or config.method not in METHODS:
        return
    from verl_speculator.serving.recognition import find_speculator, number_of_drafts

    speculator = find_speculator(config.model, config.revision)
    if speculator is None:
        return
    method = V2_METHOD if _drafts_on_v2(config) else V1_METHOD
    _check_engine(method)
    for name, values in (WITHOUT_EFFECT | (WITHOUT_EFFECT_ON_V1 if method == V1_METHOD else {})).items():
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
    config.model, config.method = V2_METHOD if method == V2_METHOD else PROPOSER, method


def use_rule(config: Any, accept: str | None, lossy: bool) -> None:
    """Have drafts verified with the acceptance rule `accept`, which is lossy.

    Raises:
        SpeculatorError: There is no such rule, it cannot be served, or nobody has said that lossy is meant.
    """
    if getattr(config, ATTRIBUTE, None) is None:
        raise ConfigError(
            "accept and lossy need a speculator of verl_speculator as the model of the speculative config."
        )
    if accept is None:
        raise ConfigError('lossy needs accept beside it, an acceptance rule such as "scorer:FOLDER".')
    if lossy is not True:
        raise ConfigError(f'accept={accept!r} changes what the base model says: set "lossy": true beside it.')
    target, parallel = config.target_model_config, config.target_parallel_config
    from verl_speculator.serving.lossy_rows import check_served_rule

    with naming("accept"):
        check_served_rule(accept, target.get_hidden_size())
    if config.rejection_sample_method != "standard":
        raise ConfigError(f"rejection_sample_method={config.rejection_sample_method!r} must be left out with accept.")
    if getattr(target, "logits_processors", None):
        raise ConfigError(
            "logits_processors change logits after the acceptance rule has decided: leave them or accept out."
        )
    if getattr(parallel, "enable_batch_sharded_sampling", None):
        raise ConfigError("enable_batch_sharded_sampling must be left out with accept: the rule needs whole batches.")
    if hasattr(parallel, "enable_batch_sharded_sampling"):
        parallel.enable_batch_sharded_sampling = False  # else vLLM may choose it
    setattr(config, lossy_requests.RULE, None if accept == "strict" else accept)


def finish(config: Any) -> None:
    """What vLLM has set for a method that is not quite ours."""
    target = config.target_model_config
    if config.method == V2_METHOD:
        # Without these, vLLM's own speculator of this name fails should it ever be made in place of ours.
        config.prompt_lookup_min = config.prompt_lookup_max = None
        if target.enable_sleep_mode:
            # Else sleep at level 2 would discard the speculator, and nobody would bring it back.
            kept = getattr(target, "sleep_preserve_parameter_names", None)
            if kept is None:
                raise moved("its ModelConfig has no sleep_preserve_parameter_names any more")
            target.sleep_preserve_parameter_names = list(dict.fromkeys([*kept, "draft.*"]))
    else:
        # A drafter that reads positions must stop before its longest text, and vLLM then stops it for all requests of a
        # step at once. Ours reads none.
        config.draft_model_config = copy.copy(target)
        config.draft_model_config.max_model_len += config.num_speculative_tokens + 1
        if target.enable_sleep_mode:
            from vllm.logger import init_logger

            init_logger("vllm.verl_speculator").warning_once(
                "Sleep at level 2 discards the speculator on vLLM's first model runner: load its weights again after "
                "waking up, or use Model Runner V2 of vLLM 0.32 or later."
            )


def has_v2() -> bool:
    """Whether this vLLM's Model Runner V2 is one that we draft on."""
    import vllm

    version = parse(vllm.__version__)
    return version is None or version >= V2_FROM


def _drafts_on_v2(config: Any) -> bool:
    """Whether vLLM will use Model Runner V2, as its `VllmConfig.use_v2_model_runner` decides for such a method."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    if not has_v2() or config.target_parallel_config.use_ubatching:
        return False
    forced = envs.VLLM_USE_V2_MODEL_RUNNER
    return bool(HAS_TRITON if forced is None else forced)


def _check_engine(method: str) -> None:
    import vllm
    from vllm.config import speculative
    from vllm.logger import init_logger

    warning = check_version(vllm.__version__)
    if warning:
        init_logger("vllm.verl_speculator").warning_once(warning)
    methods = getattr(speculative, "SpeculativeMethod", None)
    if method not in _literals(methods):
        raise moved(f"its SpeculativeConfig has no method {method!r} any more")


def _literals(annotation: Any) -> set[Any]:
    found = get_args(annotation)
    return set().union(*(_literals(part) for part in found)) if found else {annotation}
