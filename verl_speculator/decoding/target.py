"""The target model of decoding: its forward passes and its KV cache, one contiguous run of slots per row.

The cache of every row ends at the same slot, like left-padded prompts do. Tokens that were rejected leave the cache, so
padding on the left is the only thing that is ever masked: attention sees the layout it sees in plain generation, which
is what sliding windows and models without position ids rely on.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from verl_speculator.decoding.few_rows import fast_few_rows
from verl_speculator.errors import ConfigError


class Target:
    """A Hugging Face causal model with a cache, as a context manager around one generation.

    Logits are those of the model's own forward pass, with whatever scaling or soft-capping it does after `lm_head`.
    """

    def __init__(self, model: Any, aux_layer_ids: Sequence[int] = ()) -> None:
        """With `aux_layer_ids` it also notes the residual stream after so many layers, for `take_aux`."""
        self._num_layers = _check_supported(model)
        self._model = model
        self._arguments = set(inspect.signature(model.forward).parameters)
        # A plain cache also for sliding-window layers: theirs forgets slots, and could not give back rejected ones.
        self._cache = DynamicCache()
        self._hidden: list[Tensor] = []
        self._aux_layer_ids = tuple(aux_layer_ids)
        self._aux: dict[int, Tensor] = {}
        self._stack = ExitStack()
        self.num_forwards = 0

    def __enter__(self) -> Target:
        with ExitStack() as stack:
            stack.enter_context(fast_few_rows(self._model))
            head = self._model.get_output_embeddings()
            stack.callback(head.register_forward_pre_hook(lambda module, args: self._hidden.append(args[0])).remove)
            layers: Sequence[nn.Module] = _decoder_layers(self._model) if self._aux_layer_ids else []
            for layer_id in self._aux_layer_ids:
                if not 0 <= layer_id <= len(layers):
                    raise ConfigError(
                        f"the speculator reads the states after layer {layer_id}, and the base model has {len(layers)} "
                        "layers: give the base model that it was trained on"
                    )
                # What goes into a layer; after the last one what comes out.
                if layer_id < len(layers):
                    note = _note_input(self._aux, layer_id)
                    hook = layers[layer_id].register_forward_pre_hook(note, with_kwargs=True)
                else:
                    hook = layers[-1].register_forward_hook(_note_output(self._aux, layer_id))
                stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def take_aux(self) -> Tensor:
        """The states of the layers asked for, of every position of the last forward pass: [B, Q, A * H]."""
        if not self._aux_layer_ids:
            return torch.empty(0)
        return torch.cat([self._aux[layer_id] for layer_id in self._aux_layer_ids], dim=-1)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden state `[B, H]` and logits `[B, V]` after the prompts `[B, S]`, padded on the left.

        Raises:
            ConfigError: the model remembers its past otherwise than in a key-value cache of one slot per token.
        """
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        hidden, logits = self._forward(input_ids, attention_mask, positions, logits_to_keep=1)
        shapes = {(layer.keys.size(0), layer.keys.size(-2)) for layer in self._cache.layers if layer.is_initialized}
        if len(self._cache.layers) != self._num_layers or shapes != {tuple(input_ids.shape)}:
            raise _unsupported(self._model, "it does not keep every layer's past in the cache it is given")
        return hidden[:, -1], logits[:, -1]

    def forward(self, input_ids: Tensor, lengths: Tensor, max_position: int) -> tuple[Tensor, Tensor]:
        """Hidden states `[B, Q, H]` and logits `[B, Q, V]` of new tokens `[B, Q]` after `lengths [B]` cached ones.

        Positions past `max_position` are not used: drafts beyond the end of the context are never kept.
        """
        slots = torch.arange(self.width + input_ids.size(1), device=input_ids.device)
        attention_mask = (slots >= (self.width - lengths)[:, None]).long()
        positions = lengths[:, None] + torch.arange(input_ids.size(1), device=input_ids.device)
        return self._forward(input_ids, attention_mask, positions.clamp(max=max_position))

    @property
    def width(self) -> int:
        """Slots of the cache."""
        return int(self._cache.get_seq_length())

    def keep(self, rows: list[int], ends: list[int], width: int) -> None:
        """Keep `rows`, and of each the `width` slots before its slot `ends[i]`."""
        for layer in self._cache.layers:
            layer.keys = keep_slots(layer.keys, rows, ends, width, dim=-2)
            layer.values = keep_slots(layer.values, rows, ends, width, dim=-2)

    def _forward(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, logits_to_keep: int = 0
    ) -> tuple[Tensor, Tensor]:
        optional = {"position_ids": positions, "logits_to_keep": logits_to_keep}
        self._hidden.clear()
        output = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._arguments},
        )
        self.num_forwards += 1
        if len(self._hidden) != 1:
            raise _unsupported(self._model, "it does not call its lm_head once per forward pass")
        # Where layers are spread over several devices, logits come back to the input's, but not what lm_head was given.
        return self._hidden.pop().to(output.logits.device), output.logits


def keep_slots(values: Tensor, rows: list[int], ends: list[int], width: int, dim: int) -> Tensor:
    """From each of `rows` (dimension 0) the `width` slots before `ends[i]` in `dim`.

    A row with fewer slots is filled up on the left with copies of its first, which nobody looks at.
    """
    if len(rows) < values.size(0):
        values = values[torch.tensor(rows, device=values.device)]
    starts = [end - width for end in ends]
    if starts.count(starts[0]) == len(starts) and starts[0] >= 0:
        return values.narrow(dim, starts[0], width)
    offsets = torch.arange(width, device=values.device)
    slots = (torch.tensor(starts, device=values.device)[:, None] + offsets).clamp(min=0)
    first = torch.arange(len(rows), device=values.device)[:, None]
    return values.movedim(dim, 1)[first, slots].movedim(1, dim)


def _decoder_layers(model: Any) -> list[nn.Module]:
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    # The outermost list of that length: modules() gives a parent before what is in it.
    lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    layers = next((module for module in lists if len(module) == count), None)
    if layers is None:
        raise _unsupported(model, f"its {count} decoder layers were not found, whose states the speculator reads")
    return list(layers)


def _note_input(aux: dict[int, Tensor], layer_id: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        aux[layer_id] = args[0] if args else kwargs["hidden_states"]

    return hook


def _note_output(aux: dict[int, Tensor], layer_id: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        aux[layer_id] = output[0] if isinstance(output, tuple) else output

    return hook


def _check_supported(model: Any) -> int:
    """The number of layers whose past the cache will hold."""
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise ConfigError(f"a {type(model).__name__} has no lm_head; decoding needs a causal language model.")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise _unsupported(model, "it is an encoder-decoder model")
    if getattr(model, "_is_stateful", False) or set(getattr(config, "layers_block_type", ())) - {"attention"}:
        raise _unsupported(model, "the state of recurrent layers cannot take back a rejected token")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise _unsupported(model, "its forward takes no past_key_values")
    if getattr(config, "index_topk", None):
        raise _unsupported(model, "its sparse attention keeps an index that cannot take back a rejected token")
    layers = DynamicCache(config=model.config).layers
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise _unsupported(model, f"its {type(layer).__name__} cannot take back a rejected token")
    return len(layers) or config.num_hidden_layers


def _unsupported(model: Any, reason: str) -> ConfigError:
    return ConfigError(
        f"a {type(model).__name__} cannot be decoded here: {reason}; "
        "models with a key-value cache of attention layers can."
    )
