"""Which requests an acceptance rule decides on in vLLM, and what cannot be asked for beside one.

Checked on vLLM 0.28.0 and 0.32.0, whose `SamplingParams._validate_spec_decode` sees every request before it is queued.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl_speculator.serving.compatibility import require_parameters, wrap

# The attribute of a speculative configuration that names the rule, for the processes that get the configuration.
RULE = "verl_speculator_accept"
# What a request says to be answered losslessly: `extra_args={"lossy": False}`, over HTTP `vllm_xargs`.
OPT_OUT = "lossy"
# Parameters that tell of the logits, or change them after the rule has decided, with the values that do neither.
WITHOUT_RULE_ONLY: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "logprobs": (None,),
    "logprob_token_ids": (None, []),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "min_tokens": (0,),
    "thinking_token_budget": (None,),
    # On vLLM 0.28 a text broke its grammar under a rule; why is not known yet.
    "structured_outputs": (None,),
}


def install() -> None:
    from vllm.sampling_params import SamplingParams

    wrap(SamplingParams, "_validate_spec_decode", _check_first)


def _check_first(original: Callable[..., None]) -> Callable[..., None]:
    require_parameters(original, ["speculative_config"])

    def validate(self: Any, speculative_config: Any) -> None:
        if getattr(speculative_config, RULE, None) is not None:
            check_request(self)
        original(self, speculative_config)

    return validate


def is_lossy(params: Any) -> bool:
    """Whether vLLM's `SamplingParams` leave the rule in force."""
    wanted = (params.extra_args or {}).get(OPT_OUT, True)
    # HTTP has no truth values there: false arrives as 0.
    return wanted not in (False, 0, "false")


def check_request(params: Any) -> None:
    """Raise vLLM's own error for a bad request, which its server answers with 400, where a lossy answer cannot be."""
    if not is_lossy(params):
        return
    from vllm.exceptions import VLLMValidationError

    for name, values in WITHOUT_RULE_ONLY.items():
        value = getattr(params, name, values[0])
        if value not in values:
            raise VLLMValidationError(
                f"{name}={value!r} cannot be had with this server's acceptance rule, which is lossy: set it to "
                f'{values[0]}, or ask for a lossless answer, {{"{OPT_OUT}": false}} in extra_args (HTTP: vllm_xargs).',
                parameter=name,
            )


def stop_tokens(params: Any) -> list[int]:
    """The tokens that end this request."""
    end = params.eos_token_id
    return [*(params.stop_token_ids or ()), *([] if end is None else [end])]
