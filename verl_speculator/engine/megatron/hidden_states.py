"""Getting hidden states, and the vocabulary matrix, out of a Megatron GPT model.

Checked on megatron-core 0.16.1: `GPTModel` hands what its final norm returns, [S, B, H], to `output_layer`, and returns
that layer's output as [B, S, ...]. Under sequence parallelism S is this rank's part of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn
from verl.models.mcore.util import postprocess_bshd_engine, postprocess_thd_engine

from verl_speculator.engine.hidden_states import SeenStates, record_layer_inputs


class StageStates(SeenStates):
    """What was seen in this pipeline stage, and how the micro-batch was laid out in it."""

    def __init__(self, model: Any, layer_ids: Sequence[int], num_layers: int) -> None:
        """Watch the stage's own part of a model.

        Args:
            model: That part.
            layer_ids: Numbers of layers after which the residual stream is asked for.
            num_layers: Of the model as a whole.
        """
        super().__init__()
        self._sequence_parallel = model.config.sequence_parallel
        self._layout: dict[str, Any] = {}
        # Megatron numbers layers from 1, over all stages.
        layers = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        record_layer_inputs(layers, num_layers, layer_ids, self)
        model.decoder.register_forward_pre_hook(self._see_layout, with_kwargs=True)
        self.keys = [i for i in layer_ids if i in layers or (i == num_layers and i - 1 in layers)]

    def _see_layout(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._layout = {name: kwargs[name] for name in ("packed_seq_params", "attention_mask")}

    def take_packed(self, keys: Sequence[int], input_ids: Tensor) -> list[Tensor]:
        """The states of these keys, each [T, H].

        Each tensor-parallel rank may compute another part of a loss from them: their gradients are added up.

        Args:
            keys: Of states that this stage has.
            input_ids: [B, (S)], nested.
        """
        return [self._packed(states, input_ids) for states in self.take(keys)]

    def _packed(self, states: Tensor, input_ids: Tensor) -> Tensor:
        if self._sequence_parallel:
            states = gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=True)
        else:
            states = _SumGradients.apply(states)
        states_BSH = states.transpose(0, 1)
        params = self._layout["packed_seq_params"]
        if params is None:
            return postprocess_bshd_engine(states_BSH, self._layout["attention_mask"]).values()
        return postprocess_thd_engine(states_BSH, params, input_ids, input_ids.shape[0]).values()


class _Tap(nn.Module):
    """Stands where `output_layer` stood: no vocabulary product runs, and the logits come out empty."""

    # A model with tied embeddings asks the last stage for the layer's weight and passes it in again.
    weight: None = None

    def __init__(self, sequence_parallel: bool, seen: SeenStates) -> None:
        super().__init__()
        self._size = mpu.get_tensor_model_parallel_world_size() if sequence_parallel else 1
        self._seen = seen

    def forward(self, hidden_states: Tensor, weight: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        self._seen.put(SeenStates.LAST, hidden_states)
        length, batch_size, _ = hidden_states.shape
        # verl cuts them into sequences, so their lengths must be right.
        return hidden_states.new_empty(length * self._size, batch_size, 0), None


def replace_output_layer(model: Any, seen: SeenStates) -> None:
    """Put a tap where the output layer stands, whose matrix is let go."""
    model.output_layer = _Tap(model.config.sequence_parallel, seen)


def record_output_layer_input(model: Any, seen: SeenStates) -> None:
    """Watch an output layer that goes on running."""
    model.output_layer.register_forward_pre_hook(lambda module, args: seen.put(SeenStates.LAST, args[0]))


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
def full_matrix(
    model: Any, which: Literal["embedding", "output"], shape: tuple[int, int], dtype: torch.dtype, device: Any
) -> Tensor:
    """The embeddings or the vocabulary matrix [V, H] on every rank of a model-parallel group; all must call this.

    Args:
        model: The rank's own part of the model.
        which: Of the first pipeline stage the embeddings, of the last one the matrix of the output layer.
        shape: V and H.
        dtype: Of the result.
        device: Of the result.
    """
    full = torch.empty(shape, dtype=dtype, device=device)
    stage = 0 if which == "embedding" else mpu.get_pipeline_model_parallel_world_size() - 1
    if mpu.get_pipeline_model_parallel_rank() == stage:
        if which == "embedding":
            part = model.embedding.word_embeddings.weight
        elif model.share_embeddings_and_output_weights:
            part = model.shared_embedding_or_output_weight()
        else:
            part = model.output_layer.weight
        group = mpu.get_tensor_model_parallel_group()
        torch.distributed.all_gather_into_tensor(full, part.detach().to(dtype).contiguous(), group=group)
    broadcast_from_stage(full, stage)
    return full


def broadcast_from_stage(tensor: Tensor, stage: int) -> None:
    """Fill a tensor of the other pipeline stages with that of one."""
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        group = mpu.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(tensor, group=group, group_src=stage)
