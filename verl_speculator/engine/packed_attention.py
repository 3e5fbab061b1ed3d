"""Attention on packed sequences for transformers' models where flash attention is not installed.

transformers' `sdpa` keeps packed sequences apart by a dense [T, T] mask: most of its work is for tokens that do not see
each other, and time and memory grow with the square of the batch. Here every sequence attends to itself, so they grow
with the sum of the squares of the sequences. Checked on transformers 5.10.4, torch 2.13.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "verl_speculator_packed"


class PackedMask:
    """Stands for the dense mask of a packed batch; transformers hands it from the model to every layer.

    Attributes:
        lengths: Of the sequences, in tokens.
        window: How many tokens back a token sees, itself included; None for all.
    """

    def __init__(self, lengths: list[int], window: int | None, device: Any) -> None:
        self.lengths = lengths
        self.window = window
        self._device = device
        self._dense: dict[int, Tensor] = {}

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        lengths = torch.tensor([0, *self.lengths], dtype=torch.int32)
        return lengths.cumsum(dim=0, dtype=torch.int32).to(self._device)

    def dense(self, length: int) -> Tensor | None:
        """The [L, L] mask of one sequence; None where plain causal attention is the same."""
        if self.window is None or length <= self.window:
            return None
        if length not in self._dense:
            position = torch.arange(length, device=self._device)
            distance = position[:, None] - position[None, :]
            self._dense[length] = (distance >= 0) & (distance < self.window)
        return self._dense[length]


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = ...,  # type: ignore[assignment]
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> PackedMask | Tensor | None:
    """What transformers asks for once a forward pass and kind of layer; `sdpa`'s own mask where nothing is packed.

    transformers tells where sequences meet only through `mask_function(batch, head, query, key)`, which says whether a
    query's token sees a key's.
    """
    is_plain = batch_size == 1 and q_length == kv_length > 1 and q_offset == kv_offset == 0
    # A skip is allowed where there is one sequence; a mask that is not made of indices (`use_vmap`) is a model's own.
    if is_plain and attention_mask is None and not allow_is_causal_skip and not use_vmap:
        position = torch.arange(q_length, device=device)
        zero = torch.zeros_like(position[1:])
        sees_last = mask_function(zero, zero, position[1:], position[:-1])
        sees_next = mask_function(zero, zero, position[:-1], position[1:])
        starts, sees_ahead = torch.stack([~sees_last, sees_next]).cpu()
        # Blocks that see ahead, as those of an image's tokens, are not causal.
        if not sees_ahead.any():
            edges = [0, *(starts.nonzero().squeeze(1) + 1).tolist(), q_length]
            lengths = [stop - start for start, stop in itertools.pairwise(edges)]
            # Chunks are blocks of at most that size and so sequences of their own; what is longer slides.
            window = local_size if local_size is not None and max(lengths) > local_size else None
            return PackedMask(lengths, window, device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of n query heads on g groups of keys and values; `sdpa`'s own where nothing is packed.

    Args:
        module: The layer that attends.
        query: [1, n, T, d].
        key: [1, g, T, d].
        value: [1, g, T, d].
        attention_mask: What `packed_mask` returned.
        dropout: Of attention weights, in training.
        scaling: Of the scores; None for `1/√d`.
        kwargs: What `sdpa` does not use either.

    Returns:
        [1, T, n, d].
    """
    if not isinstance(attention_mask, PackedMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if _has_varlen_kernel(query, dropout):
        return _varlen(query, key, value, attention_mask, scaling), None
    lengths = attention_mask.lengths
    outputs = []
    for query_L, key_L, value_L in zip(
        query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
    ):
        mask = attention_mask.dense(query_L.shape[2])
        outputs.append(
            F.scaled_dot_product_attention(
                query_L, key_L, value_L, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
            ).transpose(1, 2)
        )
    return torch.cat(outputs, dim=1), None


def _has_varlen_kernel(query: Tensor, dropout: float) -> bool:
    """torch 2.10 has one that takes all sequences at once, for flash attention's types and devices."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or dropout:
        return False
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _varlen(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(mask.lengths)
    # The kernel counts a window without the token itself.
    window = (-1 if mask.window is None else mask.window - 1, 0)
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    starts = mask.cu_seqlens
    is_grouped = key.shape[1] != query.shape[1]
    output: Any = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=scaling, window_size=window, enable_gqa=is_grouped
    )
    return output.unsqueeze(0)


def attend_by_sequence(model: Any) -> str:
    """Choose this attention for a model that packed batches will run through, if it can.

    Returns:
        A sentence for the log that says what packed sequences attend with.
    """
    chosen = model.config._attn_implementation
    name = type(model).__name__
    if chosen != "sdpa":
        return f"Packed sequences: {name} attends with {chosen}."
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return (
            f"WARN: packed sequences: {name} caps attention scores, which {chosen} leaves out: "
            "+model.override_config.attn_implementation=eager computes them as the model was trained."
        )
    if getattr(config, "attention_chunk_size", None) is not None:
        return (
            f"WARN: packed sequences: {name} attends in chunks, which transformers counts from the start of the batch "
            "and not of each sequence: model.use_remove_padding=false computes them as the model was trained."
        )
    if not getattr(model, "_supports_attention_backend", False):
        return (
            f"Packed sequences: {name} attends with {chosen} through a mask of all tokens by all tokens; "
            "flash-attn, or model.use_remove_padding=false, is faster for long batches."
        )
    # Its loop over sequences has another length in every batch, for each of which a compiled layer would compile anew.
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    AttentionMaskInterface.register(NAME, packed_mask)
    model.set_attn_implementation(NAME)
    return f"Packed sequences: {name} attends sequence by sequence, without a mask of all tokens by all tokens."
