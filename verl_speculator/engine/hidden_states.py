"""Getting hidden states out of a causal language model, whatever its class, without keeping those of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.errors import ConfigError


class SeenStates:
    """The states that hooks saw in one forward pass, until they are taken.

    Hooks record while `recording` lasts only. Activation checkpointing runs layers again in the backward pass, and what
    hooks see then must neither be taken for the next batch's nor stay in memory.
    """

    LAST = -1

    def __init__(self) -> None:
        self._states: dict[int, Tensor] = {}
        self._is_recording = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def put(self, key: int, states: Tensor) -> None:
        """Keep the residual stream after `key` layers, or with `LAST` what goes into the vocabulary product."""
        if self._is_recording:
            self._states[key] = states

    def take(self, keys: Sequence[int]) -> list[Tensor]:
        """The states of these keys, in this order; nothing is kept."""
        states, self._states = self._states, {}
        for key in keys:
            if key not in states:
                what = "its output embeddings" if key == self.LAST else f"what follows decoder layer {key}"
                raise RuntimeError(f"the base model's forward pass did not call {what}")
        return [states[key] for key in keys]


class _Tap(nn.Module):
    """Stands where `lm_head` stood; the logits come out empty.

    Models differ in what they do around the head (scaling, soft caps), but all call it on the states after the final
    norm, so this needs nothing of the model's own code and the vocabulary matmul never runs.
    """

    def __init__(self, seen: SeenStates) -> None:
        super().__init__()
        self._seen = seen

    def forward(self, hidden_states: Tensor) -> Tensor:
        self._seen.put(SeenStates.LAST, hidden_states)
        return hidden_states[..., :0]


def replace_lm_head(model: Any, seen: SeenStates) -> None:
    """Put a tap where the head stands; its weights are freed unless the input embeddings are tied to them."""
    model.set_output_embeddings(_Tap(seen))


def record_lm_head_input(model: Any, seen: SeenStates) -> None:
    """Watch a head that goes on running, for joint training."""
    output_embeddings(model).register_forward_pre_hook(lambda module, args: seen.put(SeenStates.LAST, args[0]))


def output_embeddings(model: Any) -> Any:
    """The head of a Hugging Face model.

    Raises:
        ConfigError: it has none.
    """
    lm_head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if lm_head is None:
        raise ConfigError(f"model.path: a {type(model).__name__} has no lm_head; a causal language model is needed")
    return lm_head


def record_layers(model: Any, layer_ids: Sequence[int], seen: SeenStates) -> None:
    """Watch the residual stream of a Hugging Face model after each of the given numbers of layers.

    Args:
        model: Not yet wrapped by FSDP.
        layer_ids: Between 0, the embeddings as the first layer gets them, and the number of layers.
        seen: Where the states go.

    Raises:
        ConfigError: the model's decoder layers were not found.
    """
    if not layer_ids:
        return
    layers = decoder_layers(
        model, f"model.speculator_adapter asks for the states of layers {', '.join(map(str, layer_ids))}"
    )
    record_layer_inputs(dict(enumerate(layers)), len(layers), layer_ids, seen)


def decoder_layers(model: Any, why: str) -> nn.ModuleList:
    """The decoder layers of a Hugging Face model.

    Args:
        model: Not yet wrapped by FSDP.
        why: What they are wanted for.

    Raises:
        ConfigError: they were not found.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    # The outermost list of that length: modules() gives a parent before what is in it.
    lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    layers = next((module for module in lists if len(module) == num_layers), None)
    if layers is None:
        raise ConfigError(
            f"model.path: the {num_layers} decoder layers of a {type(model).__name__} were not found, and {why}"
        )
    return layers


def record_layer_inputs(
    layers: dict[int, nn.Module], num_layers: int, layer_ids: Sequence[int], seen: SeenStates
) -> None:
    """Hook those of the layers, numbered from 0, that see the residual stream after one of `layer_ids` layers.

    It is what goes into the next layer: so the embeddings come with whatever the model does to them first. After the
    last one it is what comes out.
    """
    for layer_id in layer_ids:
        if layer_id in layers:
            layers[layer_id].register_forward_pre_hook(_input_hook(layer_id, seen), with_kwargs=True)
        elif layer_id == num_layers and layer_id - 1 in layers:
            layers[layer_id - 1].register_forward_hook(_output_hook(layer_id, seen))


def _input_hook(layer_id: int, seen: SeenStates) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.put(layer_id, args[0] if args else kwargs["hidden_states"])

    return hook


def _output_hook(layer_id: int, seen: SeenStates) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.put(layer_id, output[0] if isinstance(output, tuple) else output)

    return hook


def drop_padding(hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T, H] from right-padded [B, S, H]."""
    lengths = cu_seqlens.diff().to(hidden_states.device)
    kept = torch.arange(hidden_states.shape[1], device=hidden_states.device) < lengths.unsqueeze(1)
    return hidden_states[kept]
