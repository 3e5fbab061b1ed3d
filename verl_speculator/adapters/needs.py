"""What an adapter asks an engine for, beyond what every batch carries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterNeeds:
    """An engine puts exactly this into `PackedHiddenStates`, and does no work for what is not asked for.

    Attributes:
        aux_hidden_state_layer_ids: Layers whose residual stream fills `aux_hidden_states`, in this order. Id i is the
            stream after i layers: 0 is the embeddings, n (the number of layers) the state before the final norm. The
            convention is that of EAGLE-3 checkpoints in vLLM and Speculators.
        whole_sequences: Ranks that hold the same batch divide it by sequences, so that attention sees each of them
            uncut. Otherwise they divide it by trained tokens, which is more even.
        target_head_weight: `lm_head_weight` is set in training too, for soft targets. In validation it is set wherever
            the base's distribution is measured.
            A base whose logits are more than states times that matrix is refused.
        target_head: `target_head` is set in training too, for soft targets of a base that may scale, shift or cap its
            logits.
        position_ids: `position_ids` is set.
    """

    aux_hidden_state_layer_ids: tuple[int, ...] = ()
    whole_sequences: bool = False
    target_head_weight: bool = False
    position_ids: bool = False
    target_head: bool = False
