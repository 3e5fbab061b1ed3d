"""`PackedHiddenStates`: the one thing that crosses from an engine to a speculator's objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verl_speculator.errors import DataError
from verl_speculator.losses.soft_targets import TargetHead


@dataclass
class PackedHiddenStates:
    """A batch of B sequences without padding, laid end to end over T tokens.

    Attributes:
        hidden_states: [T, H], the base model's last hidden states, after the final norm and before `lm_head`.
        input_ids: [T], the tokens that the base model read.
        loss_mask: [T], 1 where a token is a target to learn and 0 elsewhere.
        cu_seqlens: [B + 1], where each sequence starts; `cu_seqlens[0]` is 0 and `cu_seqlens[-1]` is T.
        lm_head_weight: [V, H], the base model's vocabulary matrix, where its logits are nothing but states times it; in
            training only where the adapter needs it.
        target_head: The matrix and what the base does to its logits after it, whatever that is; in training only where
            the adapter needs it.
        head_counts: [n_predict], trained positions of each head in the whole global batch. None says that this
            batch is the whole. An engine that cuts the batch into micro-batches or ranks must give it, or the
            loss depends on the cut.
        aux_hidden_states: [T, A * H], the residual stream after each of the A layers that the adapter asked for, side
            by side in the order asked; None where it asked for none.
        position_ids: [T], each token's place in its own sequence, from 0; None where the adapter did not ask.

    Raises:
        DataError: shapes that do not agree. Values are not looked at: that would make the host wait for the device.
    """

    hidden_states: Tensor
    input_ids: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor
    lm_head_weight: Tensor | None = None
    head_counts: Tensor | None = None
    aux_hidden_states: Tensor | None = None
    position_ids: Tensor | None = None
    target_head: TargetHead | None = None

    def __post_init__(self) -> None:
        self.validate()

    @property
    def base_head(self) -> TargetHead | None:
        """`target_head`, or what follows from `lm_head_weight`; None where neither is given."""
        if self.target_head is None and self.lm_head_weight is not None:
            return TargetHead(self.lm_head_weight)
        return self.target_head

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def validate(self) -> None:
        if self.hidden_states.dim() != 2:
            raise DataError(f"hidden_states must be packed as [T, H]; got shape {list(self.hidden_states.shape)}.")
        num_tokens, hidden_size = self.hidden_states.shape
        for name in ("input_ids", "loss_mask"):
            shape = list(getattr(self, name).shape)
            if shape != [num_tokens]:
                raise DataError(f"{name} must have shape [{num_tokens}] like hidden_states' rows; got {shape}.")
        if self.cu_seqlens.dim() != 1 or self.cu_seqlens.numel() == 0 or self.cu_seqlens.is_floating_point():
            raise DataError(
                "cu_seqlens must hold B + 1 integer offsets; "
                f"got {self.cu_seqlens.dtype} of shape {list(self.cu_seqlens.shape)}."
            )
        if self.lm_head_weight is not None and list(self.lm_head_weight.shape[1:]) != [hidden_size]:
            raise DataError(
                f"lm_head_weight must have shape [V, {hidden_size}]; got {list(self.lm_head_weight.shape)}."
            )
        if self.aux_hidden_states is not None and (
            self.aux_hidden_states.dim() != 2
            or self.aux_hidden_states.shape[0] != num_tokens
            or self.aux_hidden_states.shape[1] % hidden_size
        ):
            raise DataError(
                f"aux_hidden_states must have shape [{num_tokens}, A * {hidden_size}]; "
                f"got {list(self.aux_hidden_states.shape)}."
            )
        if self.position_ids is not None and list(self.position_ids.shape) != [num_tokens]:
            raise DataError(f"position_ids must have shape [{num_tokens}]; got {list(self.position_ids.shape)}.")
        if self.head_counts is not None and self.head_counts.dim() != 1:
            raise DataError(f"head_counts must have shape [n_predict]; got {list(self.head_counts.shape)}.")

    @classmethod
    def from_padded(
        cls,
        hidden_states: Tensor,
        input_ids: Tensor,
        loss_mask: Tensor,
        attention_mask: Tensor,
        *,
        lm_head_weight: Tensor | None = None,
        head_counts: Tensor | None = None,
    ) -> PackedHiddenStates:
        """Pack a right-padded batch.

        Args:
            hidden_states: [B, S, H].
            input_ids: [B, S].
            loss_mask: [B, S].
            attention_mask: [B, S], 1 on each sequence's tokens and 0 on the padding to their right.
        """
        is_token_BS = attention_mask.bool()
        lengths_B = is_token_BS.sum(dim=1)
        cu_seqlens = torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(dim=0)])
        index_T = is_token_BS.flatten().nonzero().squeeze(1)
        return cls(
            hidden_states=hidden_states.flatten(0, 1).index_select(0, index_T),
            input_ids=input_ids.flatten().index_select(0, index_T),
            loss_mask=loss_mask.flatten().index_select(0, index_T),
            cu_seqlens=cu_seqlens,
            lm_head_weight=lm_head_weight,
            head_counts=head_counts,
        )
