"""The one hook on vLLM's Model Runner V2: where it makes its speculator. Checked on vLLM 0.32.0."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from verl_speculator.serving.compatibility import moved, require_parameters, wrap

PACKAGE = "vllm.v1.worker.gpu.spec_decode"
RUNNER = "vllm.v1.worker.gpu.model_runner"

# What `ChainDrafter` is given, reads of a batch, and uses of its base class.
PROPOSE_PARAMETERS = (
    *("input_batch", "last_hidden_states", "num_sampled", "num_rejected", "last_sampled", "temperature", "seeds"),
    *("dummy_run", "num_speculative_tokens"),
)
BATCH_FIELDS = ("num_reqs", "idx_mapping", "query_start_loc", "positions", "num_draft_tokens_per_req")
METHODS = (
    *("load_draft_model", "load_model", "set_attn", "sample_draft", "compute_draft_logits", "_copy_request_inputs"),
    *("init_cudagraph_manager", "capture"),
)


def install() -> None:
    """Have the runner draft with our speculator where the configuration carries one.

    The runner imports the function by name, and only in a worker that uses it; a runner that is loaded already is
    given the wrapped one.

    Raises:
        UnsupportedEngineError: There is no such function any more.
    """
    package = importlib.import_module(PACKAGE)
    wrap(package, "init_speculator", _ours_first)
    if RUNNER in sys.modules:
        setattr(sys.modules[RUNNER], "init_speculator", package.init_speculator)  # noqa: B010 - a module of vLLM's


def _ours_first(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_speculator(vllm_config: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        from verl_speculator.serving.speculative_config_hook import ATTRIBUTE

        if getattr(vllm_config.speculative_config, ATTRIBUTE, None) is None:
            return original(vllm_config, device, *args, **kwargs)
        return check_interface()(vllm_config, device)

    return init_speculator


def check_interface() -> type[Any]:
    """`ChainDrafter`; raises `UnsupportedEngineError` for the first thing that is not as it needs it."""
    try:
        from vllm.v1.worker.gpu.input_batch import InputBatch
        from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

        from verl_speculator.serving.v2.speculator import ChainDrafter
    except ImportError as error:
        raise moved(f"Model Runner V2 is not where it was ({error})") from error
    for name in METHODS:
        if not hasattr(DraftModelSpeculator, name):
            raise moved(f"{DraftModelSpeculator.__name__} has no {name} any more")
    for name in BATCH_FIELDS:
        if name not in InputBatch.__dataclass_fields__:
            raise moved(f"{InputBatch.__name__} has no {name} any more")
    require_parameters(DraftModelSpeculator.propose, PROPOSE_PARAMETERS)
    return ChainDrafter
