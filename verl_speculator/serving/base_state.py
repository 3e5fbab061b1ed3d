"""Whether what a base's forward returns is what its `lm_head` reads, and so what a speculator was trained on."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.serving.compatibility import UnsupportedEngineError

logger = logging.getLogger("vllm.verl_speculator")


class _ReachedError(Exception):
    """Carries what a base's `compute_logits` hands to its `lm_head`."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def find_state(target_model: nn.Module, hidden_size: int, dtype: torch.dtype, device: torch.device) -> nn.Module | None:
    """The layer that leads from what the base's forward returns to what its `lm_head` reads; None if they are the same.

    Tried out with random states: what `compute_logits` makes of them is looked at where it reaches the `lm_head`, so
    no logits are computed and neither scaling of logits, quantisation, LoRA nor tensor parallelism matters. Some bases
    apply their final norm there (MiMo, Step 3.5); then the norm is returned.

    Raises:
        UnsupportedEngineError: They differ by something else; a speculator would draft from states that it never saw.
    """
    name = type(target_model).__name__
    if hasattr(target_model, "get_mtp_target_hidden_states"):
        raise _refusal(name, "vLLM hands the drafter of this base a state from before its last layers")
    probe = torch.randn(3, hidden_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    reached = _reaches_lm_head(target_model, probe)
    if reached is None:
        logger.warning(
            "%s has no logits processor of vLLM, so it could not be checked that the speculator gets the state that "
            "its lm_head reads.",
            name,
        )
        return None
    if _same(reached, probe):
        return None
    for layer_name, layer in target_model.named_modules():
        if layer_name.split(".")[-1] in ("norm", "final_layernorm", "ln_f") and _same(reached, _output(layer, probe)):
            return layer
    raise _refusal(name, "its compute_logits changes the last hidden states before they reach its lm_head")


def _reaches_lm_head(target_model: nn.Module, probe: Tensor) -> Tensor | None:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _ReachedError(args[1] if len(args) > 1 else kwargs["hidden_states"])

    processors = [
        module
        for module in target_model.modules()
        # With LoRA it is wrapped.
        if isinstance(module, LogitsProcessor) or isinstance(getattr(module, "base_layer", None), LogitsProcessor)
    ]
    handles = [module.register_forward_pre_hook(stop, with_kwargs=True) for module in processors]
    try:
        with torch.inference_mode():
            base: Any = target_model
            base.compute_logits(probe.clone())
    except _ReachedError as reached:
        return reached.states
    finally:
        for handle in handles:
            handle.remove()
    return None


@torch.inference_mode()
def _output(layer: nn.Module, probe: Tensor) -> Tensor | None:
    output = layer(probe.clone())
    return output if isinstance(output, Tensor) else None


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-2)


def _refusal(base: str, why: str) -> UnsupportedEngineError:
    return UnsupportedEngineError(f"{base} cannot be served with this speculator: {why}.")
