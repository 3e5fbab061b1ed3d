"""Getting the last hidden states, and the vocabulary matrix, out of a Megatron GPT model.

Checked on megatron-core 0.16.1: ``GPTModel`` hands what its final norm returns, ``[S, B, H]``, to ``output_layer``, and
returns that layer's output as ``[B, S, ...]``. Under sequence parallelism S is this rank's part of the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from verl_speculator.engine.hidden_states import LastHiddenStates


class _Tap(nn.Module):
    """Stands where ``output_layer`` stood and hands the hidden states through, whole: no vocabulary product runs."""

    # A model with tied embeddings asks the last stage for the layer's weight and passes it in again.
    weight: None = None

    def __init__(self, sequence_parallel: bool) -> None:
        super().__init__()
        self._sequence_parallel = sequence_parallel

    def forward(self, hidden_states: Tensor, weight: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        if self._sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states)
        return hidden_states, None


def replace_output_layer(model: Any) -> None:
    """From now on the model returns hidden states ``[B, S, H]`` in the place of logits; its matrix is let go."""
    model.output_layer = _Tap(model.config.sequence_parallel)


def record_output_layer_input(model: Any) -> LastHiddenStates:
    """Watch an output layer that goes on running. What :func:`whole_hidden_states` makes of it has a gradient."""
    last = LastHiddenStates()
    model.output_layer.register_forward_pre_hook(lambda module, args: last.put(args[0]))
    return last


def whole_hidden_states(hidden_states: Tensor, sequence_parallel: bool) -> Tensor:
    """``[B, S, H]`` from what went into the output layer.

    Each tensor-parallel rank may compute another part of a loss from it: their gradients are added up.
    """
    if sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
    else:
        hidden_states = _SumGradients.apply(hidden_states)
    return hidden_states.transpose(0, 1)


class _SumGradients(torch.autograd.Function):
    """Megatron's own function for this leaves out gradients that are not contiguous, as transposed ones are."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=mpu.get_tensor_model_parallel_group())
        return grad


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def scale_gradient(tensor: Tensor, scale: float) -> Tensor:
    return _ScaleGradient.apply(tensor, scale)


@torch.no_grad()
def whole_output_weight(model: Any, shape: tuple[int, int], dtype: torch.dtype, device: Any) -> Tensor:
    """The vocabulary matrix ``[V, H]`` on every rank of a model-parallel group; all of them must call this.

    :param model: the rank's own part of the model
    """
    whole = torch.empty(shape, dtype=dtype, device=device)
    if mpu.is_pipeline_last_stage():
        part = model.shared_embedding_or_output_weight() if _is_tied(model) else model.output_layer.weight
        group = mpu.get_tensor_model_parallel_group()
        torch.distributed.all_gather_into_tensor(whole, part.detach().to(dtype).contiguous(), group=group)
    broadcast_from_last_stage(whole)
    return whole


def broadcast_from_last_stage(tensor: Tensor) -> None:
    """Fill a tensor of the earlier pipeline stages with the last one's."""
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        source = mpu.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(tensor, src=source, group=mpu.get_pipeline_model_parallel_group())


def _is_tied(model: Any) -> bool:
    return bool(model.share_embeddings_and_output_weights)
