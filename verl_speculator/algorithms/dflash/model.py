"""DFlash (Chen et al. 2026, arXiv:2602.06036): the model, and how it is trained.

A block begins with its anchor, the last token that is known; the others are a mask token in the input. One pass gives
all of them: token k of a block predicts what stands k places behind the anchor. Each layer's attention sees the whole
block, and before it keys and values that it makes of the base's own states, up to the position before the anchor.

T tokens of a packed batch; A anchors with blocks of S tokens, N = A * S; H is the base's hidden size, V its vocabulary.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from verl_speculator.algorithms.dflash.attention import BlockAttention
from verl_speculator.algorithms.dflash.config import DFlashSpeculatorConfig, DFlashTrainingArguments
from verl_speculator.algorithms.transformer import (
    TransformerSpeculator,
    make_objective,
    paired_metrics,
    sequence_offsets,
)
from verl_speculator.errors import ConfigError
from verl_speculator.losses.alignment import trained_positions
from verl_speculator.losses.soft_targets import HeadRows, Objective, SoftTargetsOutput, TargetHead, soft_target_loss
from verl_speculator.models.base_components import ModelComponents, model_classes, override_components
from verl_speculator.models.draft_vocabulary import read_t2d
from verl_speculator.models.speculator import Speculator

if TYPE_CHECKING:
    from verl_speculator.decoding import SamplingParams, StatefulDrafter

# `attend(layer, (context keys, context values), query, key, value, scaling)`, else as for other drafters.
AttendWithContext: TypeAlias = Callable[[int, tuple[Tensor, Tensor], Tensor, Tensor, Tensor, float], Tensor]


@functools.cache
def dflash_components(arch: str) -> ModelComponents:
    """The parts of `arch` with layers whose attention has a context beside what goes through them."""
    base = model_classes[arch]
    apply_rotary = importlib.import_module(base.decoder_layer_class.__module__).apply_rotary_pos_emb

    class Layer(base.decoder_layer_class):  # type: ignore[name-defined]
        def forward(
            self,
            hidden: Tensor,
            context: Tensor,
            context_rotary: tuple[Tensor, Tensor],
            attend: AttendWithContext,
            **kwargs: Any,
        ) -> Tensor:
            attention = self.self_attn
            shape = (*context.shape[:-1], -1, attention.head_dim)
            key = attention.k_norm(attention.k_proj(context).view(shape)).transpose(1, 2)
            value = attention.v_proj(context).view(shape).transpose(1, 2)
            _, key = apply_rotary(key, key, *context_rotary)

            def with_context(layer: int, *args: Any) -> Tensor:
                return attend(layer, (key, value), *args)

            return super().forward(hidden, attend=with_context, **kwargs)

    return override_components(arch, first_layer_class=Layer, decoder_layer_class=Layer)


@Speculator.register("dflash")
class DFlashSpeculator(TransformerSpeculator):
    """Decoder layers between blocks of tokens and the base's states; names and shapes in files are Speculators'."""

    config: DFlashSpeculatorConfig

    def __init__(self, config: DFlashSpeculatorConfig) -> None:
        super().__init__(config)
        layer_config = self.layer_config
        width, eps = layer_config.hidden_size, layer_config.rms_norm_eps
        parts = dflash_components(layer_config.model_type)
        self.fc = nn.Linear(len(config.aux_hidden_state_layer_ids) * width, width, bias=False)
        self.hidden_norm = parts.norm_class(width, eps=eps)
        layers = [parts.decoder_layer_class(layer_config, i) for i in range(layer_config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = parts.norm_class(width, eps=eps)
        self.reset_parameters()

    # Building and training: the contract of every model that is no chain

    @classmethod
    def from_training_args(
        cls,
        verifier_config: Any,
        *,
        t2d: Tensor | None = None,
        d2t: Tensor | None = None,
        verifier_name_or_path: str = "",
        verifier_architectures: list[str] | None = None,
        **kwargs: Any,
    ) -> DFlashSpeculator:
        """A fresh model for a base; `load_verifier_weights` has to follow, until then what is the base's is NaN.

        Args:
            verifier_config: The base's text configuration.
            t2d: [V] bool, the tokens that can be drafted; instead of `draft_vocab_path`.
            d2t: Ignored, for it follows from `t2d`.
            kwargs: The fields of `DFlashTrainingArguments`.

        Raises:
            ConfigError: A setting that cannot work; the message begins with its name.
            MissingFileError: There is no file `draft_vocab_path`.
        """
        arguments = DFlashTrainingArguments(**kwargs)
        mask = arguments.mask_token_id
        if mask is None:
            padding = getattr(verifier_config, "pad_token_id", None)
            mask = verifier_config.vocab_size - 1 if padding is None else padding
        return cls.build(
            DFlashSpeculatorConfig,
            verifier_config,
            arguments,
            draft_arch="qwen3",
            t2d=t2d,
            verifier_name_or_path=verifier_name_or_path,
            verifier_architectures=verifier_architectures,
            n_predict=arguments.block_size - 1,
            block_size=arguments.block_size,
            mask_token_id=mask,
        )

    @staticmethod
    def get_trainer_kwargs(args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `forward` is called with in training and in validation, from the fields of the training arguments.

        Raises:
            ConfigError: A setting that cannot work; the message begins with its name.
        """
        arguments = DFlashTrainingArguments(**args)
        if arguments.draft_vocab_path is not None:
            read_t2d(arguments.draft_vocab_path)
        kwargs = {
            "anchor_fraction": float(arguments.anchor_fraction),
            "decay_gamma": float(arguments.decay_gamma),
            "objective": make_objective(arguments.objective, arguments.objective_temperature),
        }
        return kwargs, dict(kwargs)

    def count_trained(
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        document_ids: Tensor,
        *,
        anchor_fraction: float,
        decay_gamma: float,
        objective: Objective,
    ) -> Tensor:
        """What the mean of `forward` divides by: trained tokens of every block, as much as their place counts."""
        trained_PT = self._trained(input_ids[0], loss_mask[0], sequence_offsets(document_ids[0]), anchor_fraction)
        trained_PT = self._with_labels(trained_PT, input_ids[0], objective)
        return _place_weights(self.n_predict, decay_gamma, trained_PT.device) @ trained_PT.sum(dim=1).double()

    def forward(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        document_ids: Tensor,
        loss_mask: Tensor,
        position_ids: Tensor,
        verifier_last_hidden_states: Tensor,
        verifier_lm_head_weight: Tensor | None = None,
        *,
        anchor_fraction: float = 1.0,
        decay_gamma: float = 4.0,
        objective: Objective | None = None,
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """Draft a block from each of the anchors of a packed batch, whose sequences lie end to end.

        An anchor is a token that is followed, in its sequence, by one with loss mask 1. Of these the text itself picks
        `anchor_fraction`, so that it is the same whatever a batch is cut into. A block's token trains where what it
        predicts is in the same sequence and has loss mask 1; for hard labels it must be in the draft vocabulary too.

        Args:
            hidden_states: [1, T, layers * H], the base's layers `target_layer_ids` side by side.
            input_ids: [1, T], what the base read.
            document_ids: [1, T], the same for the tokens of a sequence and other than its neighbours'.
            loss_mask: [1, T], 1 where a token is to be learnt.
            position_ids: [1, T], from 0 in each sequence.
            verifier_last_hidden_states: [1, T, H], what goes into the base's `lm_head`.
            verifier_lm_head_weight: [V, H]; None only if `objective` needs no target.
            decay_gamma: Draft k of a block, from 1, counts for `exp(-(k - 1) / gamma)`.
            objective: `kl` if not given.

        Returns:
            Each place's output [N_k, H] where it trains; the weighted mean of all trained rows' losses; and pairs
            `<name>_sum`, `<name>_total`. `loss_total` is what the mean divides by. For each place k, from 0, there are
            `loss_k`, `cross_entropy_k` of the text's tokens, `overlap_k` with the target's distribution and
            `full_acc_k`, drafts that are the text's; and `acceptance_length`, tokens per verification along the text.
        """
        objective = Objective({"kl": 1.0}) if objective is None else objective
        ids_T, size = input_ids[0], self.config.block_size
        offsets = sequence_offsets(document_ids[0])
        drafted_PT = self._trained(ids_T, loss_mask[0], offsets, anchor_fraction)
        trained_PT = self._with_labels(drafted_PT, ids_T, objective)
        # The states of position t are the last that a block with its anchor at t + 1 sees.
        anchors_A = drafted_PT[0].nonzero().squeeze(1) + 1
        trained_PA = trained_PT[:, anchors_A - 1]
        if anchors_A.shape[0] == 0:
            # Layers do not run on nothing; nobody trains on this one.
            anchors_A = anchors_A.new_full((1,), min(1, ids_T.shape[0] - 1))

        places_S = torch.arange(size, device=ids_T.device)
        blocks_AS = ids_T.new_full((anchors_A.shape[0], size), self.config.mask_token_id)
        blocks_AS[:, 0] = ids_T[anchors_A]
        positions_AS = position_ids[0, anchors_A][:, None] + places_S
        starts_T = offsets[:-1].repeat_interleave(offsets.diff(), output_size=ids_T.shape[0])
        outputs_NH = self.denoise(
            blocks_AS.reshape(1, -1),
            positions_AS.reshape(1, -1),
            self.fuse(hidden_states),
            position_ids,
            BlockAttention(anchors_A, starts_T, size),
        )[0]

        outputs_APH = outputs_NH.unflatten(0, (-1, size))[:, 1:]
        place_weights = _place_weights(self.n_predict, decay_gamma, ids_T.device)
        total = place_weights @ trained_PT.sum(dim=1).double()
        sum_dtype = torch.promote_types(outputs_NH.dtype, torch.float32)
        scales = (place_weights / total.clamp(min=torch.finfo(torch.float32).tiny)).to(sum_dtype)
        # The distribution of the token k places behind an anchor follows from the states of the position before it.
        rows = [trained_A.nonzero().squeeze(1) for trained_A in trained_PA]
        at = [anchors_A[rows_M] + k for k, rows_M in enumerate(rows)]
        needed_T = torch.zeros_like(ids_T, dtype=torch.bool)
        needed_T[torch.cat(at)] = True
        row_of_T = needed_T.cumsum(0) - 1
        labels = [self.to_draft_ids(ids_T[at_M + 1]) for at_M in at]
        heads = [
            HeadRows(
                outputs_APH[rows_M, k],
                self.lm_head.weight,
                labels[k],
                scales[k].expand(len(rows_M)),
                row_of_T[at[k]],
            )
            for k, rows_M in enumerate(rows)
        ]
        target_head = None
        if objective.needs_target:
            assert verifier_lm_head_weight is not None, "an objective against the target needs its vocabulary matrix"
            ids = self.draft_ids
            target_head = TargetHead(verifier_lm_head_weight if ids is None else verifier_lm_head_weight[ids])
        result = soft_target_loss(heads, verifier_last_hidden_states[0, needed_T], target_head, objective)
        return [head.states for head in heads], result.loss, self._metrics(result, labels, trained_PT, total)

    # The layers, for training and for decoding

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """[..., H] from the base's states [..., layers * H]."""
        return self.hidden_norm(self.fc(aux_hidden_states))

    def denoise(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        context: Tensor,
        context_positions: Tensor,
        attend: AttendWithContext,
    ) -> Tensor:
        """What `lm_head` reads [B, N, H], for blocks of tokens [B, N] beside a context [B, C, H]."""
        hidden = self.embed_tokens(tokens)
        kwargs = {
            "position_embeddings": self.rotary(hidden, position_ids),
            "context": context,
            "context_rotary": self.rotary(hidden, context_positions),
            "attention_mask": None,
            "attend": attend,
        }
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        return self.norm(hidden)

    def make_drafter(self, sampling: SamplingParams | None = None) -> StatefulDrafter:
        """What drafts with it in `speculative_generate`: its likeliest tokens, or tokens drawn as `sampling` says."""
        from verl_speculator.algorithms.dflash.drafter import DFlashDrafter

        return DFlashDrafter(self, sampling)

    def native_form(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`config.json` and tensors as DFlash's own checkpoints have them: one flat Qwen3 configuration.

        Raises:
            ConfigError: There is no such form of it.
        """
        if self.d2t is not None:
            raise ConfigError("DFlash's own form has no draft vocabulary, and this speculator has one.")
        values = {
            **self.config.transformer_layer_config,
            "architectures": ["DFlashDraftModel"],
            "block_size": self.config.block_size,
            "dflash_config": {
                "mask_token_id": self.config.mask_token_id,
                # They count the layers themselves from 0, and we what there is after so many of them.
                "target_layer_ids": [i - 1 for i in self.target_layer_ids],
            },
            "torch_dtype": self.config.torch_dtype,
        }
        # Embeddings and vocabulary matrix are left to the base.
        shared = ("embed_tokens.", "lm_head.")
        return values, {name: t for name, t in self.export_state_dict().items() if not name.startswith(shared)}

    # Details of training

    def _trained(self, ids_T: Tensor, loss_mask_T: Tensor, offsets: Tensor, anchor_fraction: float) -> Tensor:
        """[n_predict, T], bool: in column t, the places that train in the block of the anchor at t + 1."""
        trained_PT = trained_positions(loss_mask_T, offsets, self.n_predict)
        return trained_PT & trained_PT[0] & _picked(ids_T, offsets, anchor_fraction)

    def _with_labels(self, trained_PT: Tensor, ids_T: Tensor, objective: Objective) -> Tensor:
        """Without those that hard labels cannot train, for they are not in the draft vocabulary."""
        if self.d2t is None or not objective.weights.get("ce"):
            return trained_PT
        can_T = self.to_draft_ids(ids_T) >= 0
        places_P1 = torch.arange(self.n_predict, device=ids_T.device)[:, None]
        at_PT = torch.arange(ids_T.shape[0], device=ids_T.device) + 2 + places_P1
        return trained_PT & can_T[at_PT.clamp(max=ids_T.shape[0] - 1)]

    def _metrics(
        self, result: SoftTargetsOutput, labels: list[Tensor], trained_PT: Tensor, total: Tensor
    ) -> dict[str, Tensor]:
        metrics = {"loss": (result.loss.detach() * total, total)}
        for k, labels_M in enumerate(labels):
            count, can_M = trained_PT[k].sum(), labels_M >= 0
            metrics[f"loss_{k}"] = (result.row_losses[k].sum(), count)
            metrics[f"cross_entropy_{k}"] = (result.cross_entropies[k].where(can_M, 0.0).sum(), can_M.sum())
            metrics[f"overlap_{k}"] = (result.overlaps[k].sum(), count)
            metrics[f"full_acc_{k}"] = (result.correct[k].sum(), count)
        correct_PT = torch.zeros_like(trained_PT).masked_scatter_(trained_PT, torch.cat(result.correct))
        accepted_T = correct_PT.long().cumprod(dim=0).sum(dim=0) + trained_PT[0]
        metrics["acceptance_length"] = (accepted_T[trained_PT[0]].sum(), trained_PT[0].sum())
        return paired_metrics(metrics)


def _place_weights(n_predict: int, gamma: float, device: torch.device) -> Tensor:
    return torch.exp(-torch.arange(n_predict, dtype=torch.float64, device=device) / gamma)


def _picked(ids_T: Tensor, offsets: Tensor, fraction: float) -> Tensor:
    """[T], bool: about `fraction` of the positions, told by a token, the one before it and their place in the sequence.

    A hash in place of random numbers: ranks and micro-batches need not agree on anything to pick the same.
    """
    starts_T = offsets[:-1].repeat_interleave(offsets.diff(), output_size=ids_T.shape[0])
    place_T = torch.arange(ids_T.shape[0], device=ids_T.device) - starts_T
    before_T = torch.where(place_T > 0, ids_T.roll(1), 0)
    mixed_T = (ids_T * 2654435761 + before_T * 2246822519 + place_T * 3266489917) & 0xFFFFFFFF
    mixed_T = ((mixed_T ^ (mixed_T >> 15)) * 668265263) & 0xFFFFFFFF
    return (mixed_T ^ (mixed_T >> 13)) & 0xFFFF < round(fraction * 0x10000)
