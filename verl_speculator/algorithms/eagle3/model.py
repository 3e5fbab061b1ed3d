"""EAGLE-3 (Li et al. 2025, arXiv:2503.01840): the model, and its training-time test.

Entry t of a sequence is made of what the base knows at position t and of the token that follows, x_{t+1}; from it the
model predicts x_{t+2}. A later step goes on from its own output there, with the next token: step k at t reads x_{t+1+k}
and predicts x_{t+2+k}, as head k of a chain does. In training these tokens are the text's.

T tokens of a packed batch, of which N are worked on; H is the base's hidden size, V its vocabulary, A the number of
layers that are read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from verl_speculator.algorithms.eagle3.attention import TrainingTimeAttention
from verl_speculator.algorithms.eagle3.config import FLAGS, Eagle3SpeculatorConfig, Eagle3TrainingArguments
from verl_speculator.algorithms.transformer import (
    Attend,
    TransformerSpeculator,
    make_objective,
    paired_metrics,
    sequence_offsets,
)
from verl_speculator.errors import ConfigError
from verl_speculator.losses.alignment import chain_rows, head_inputs, head_targets, trained_positions
from verl_speculator.losses.soft_targets import HeadRows, Objective, SoftTargetsOutput, TargetHead, soft_target_loss
from verl_speculator.models.base_components import ModelComponents, model_classes, override_components
from verl_speculator.models.draft_vocabulary import read_t2d
from verl_speculator.models.speculator import Speculator

if TYPE_CHECKING:
    from verl_speculator.decoding import SamplingParams, StatefulDrafter


@functools.cache
def eagle3_components(arch: str) -> ModelComponents:
    """The parts of `arch` with EAGLE-3's first layer, whose attention reads embeddings beside hidden states."""
    base = model_classes[arch]

    class FirstLayer(base.first_layer_class):  # type: ignore[name-defined]
        def __init__(self, config: Any, layer_idx: int, norm_before_residual: bool) -> None:
            super().__init__(config, layer_idx)
            self.norm_before_residual = norm_before_residual
            self.hidden_norm = base.norm_class(config.hidden_size, eps=config.rms_norm_eps)
            for name in ("q_proj", "k_proj", "v_proj"):
                narrow = getattr(self.self_attn, name)
                wide = nn.Linear(2 * narrow.in_features, narrow.out_features, bias=narrow.bias is not None)
                setattr(self.self_attn, name, wide)

        def forward(self, embeds_and_hidden: Tensor, **kwargs: Any) -> Tensor:
            embeds, hidden = embeds_and_hidden.chunk(2, dim=-1)
            normed = self.hidden_norm(hidden)
            residual = normed if self.norm_before_residual else hidden
            attended, _ = self.self_attn(torch.cat([self.input_layernorm(embeds), normed], dim=-1), **kwargs)
            residual = residual + attended
            return residual + self.mlp(self.post_attention_layernorm(residual))

    return override_components(arch, first_layer_class=FirstLayer)


@Speculator.register("eagle3")
class Eagle3Speculator(TransformerSpeculator):
    """Decoder layers on the base's states of several layers; names and shapes in files are Speculators'."""

    config: Eagle3SpeculatorConfig

    def __init__(self, config: Eagle3SpeculatorConfig) -> None:
        super().__init__(config)
        layer_config = self.layer_config
        width, eps = layer_config.hidden_size, layer_config.rms_norm_eps
        parts = eagle3_components(layer_config.model_type)
        num_states = len(config.eagle_aux_hidden_state_layer_ids)

        self.input_norm = parts.norm_class(num_states * width, eps=eps) if config.norm_before_fc else None
        norms = [parts.norm_class(width, eps=eps) for _ in range(num_states)] if config.fc_norm else None
        self.fc_norm = None if norms is None else nn.ModuleList(norms)
        self.fc = nn.Linear(num_states * width, width, bias=False)
        first: Any = parts.first_layer_class
        layers = [first(layer_config, 0, config.norm_before_residual)]
        layers += [parts.decoder_layer_class(layer_config, i) for i in range(1, layer_config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = parts.norm_class(width, eps=eps)
        self.embed_tokens.weight.requires_grad_(config.embed_requires_grad)
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
    ) -> Eagle3Speculator:
        """A fresh model for a base; `load_verifier_weights` has to follow, until then what is the base's is NaN.

        Args:
            verifier_config: The base's text configuration.
            t2d: [V] bool, the tokens that can be drafted; instead of `draft_vocab_path`.
            d2t: Ignored, for it follows from `t2d`.
            kwargs: The fields of `Eagle3TrainingArguments`.

        Raises:
            ConfigError: A setting that cannot work; the message begins with its name.
            MissingFileError: There is no file `draft_vocab_path`.
        """
        arguments = Eagle3TrainingArguments(**kwargs)
        flags = {name: getattr(arguments, name) for name in FLAGS}
        return cls.build(
            Eagle3SpeculatorConfig,
            verifier_config,
            arguments,
            draft_arch=arguments.draft_arch,
            t2d=t2d,
            verifier_name_or_path=verifier_name_or_path,
            verifier_architectures=verifier_architectures,
            n_predict=arguments.ttt_steps,
            **flags,
        )

    @staticmethod
    def get_trainer_kwargs(args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `forward` is called with in training and in validation, from the fields of the training arguments.

        Raises:
            ConfigError: A setting that cannot work; the message begins with its name.
        """
        arguments = Eagle3TrainingArguments(**args)
        if arguments.draft_vocab_path is not None:
            read_t2d(arguments.draft_vocab_path)
        kwargs = {
            "ttt_steps": arguments.ttt_steps,
            "ttt_step_loss_decay": float(arguments.ttt_step_loss_decay),
            "objective": make_objective(arguments.objective, arguments.objective_temperature),
        }
        return kwargs, dict(kwargs)

    def count_trained(
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        document_ids: Tensor,
        *,
        ttt_steps: int,
        ttt_step_loss_decay: float,
        objective: Objective,
    ) -> Tensor:
        """What the mean of `forward` divides by: trained positions of every step, as much as the step counts."""
        trained_PT = self._trained(input_ids[0], loss_mask[0], sequence_offsets(document_ids[0]), ttt_steps, objective)
        return _step_weights(ttt_steps, ttt_step_loss_decay, trained_PT.device) @ trained_PT.sum(dim=1).double()

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
        ttt_steps: int = 3,
        ttt_step_loss_decay: float = 1.0,
        objective: Objective | None = None,
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """The training-time test on a packed batch, whose sequences lie end to end.

        A step trains where the token that it predicts lies in the same sequence and has loss mask 1; for hard labels it
        must be in the draft vocabulary too. The target's distribution is that over the draft vocabulary.

        Args:
            hidden_states: [1, T, A * H], the base's layers `target_layer_ids` side by side.
            input_ids: [1, T], what the base read.
            document_ids: [1, T], the same for the tokens of a sequence and other than its neighbours'.
            loss_mask: [1, T], 1 where a token is to be learnt.
            position_ids: [1, T], from 0 in each sequence.
            verifier_last_hidden_states: [1, T, H], what goes into the base's `lm_head`.
            verifier_lm_head_weight: [V, H]; None only if `objective` needs no target.
            ttt_step_loss_decay: Step k counts for its k-th power.
            objective: `kl` if not given.

        Returns:
            Each step's output [N_k, H] where it trains; the weighted mean of all trained rows' losses; and pairs
            `<name>_sum`, `<name>_total`. `loss_total` is what the mean divides by. For each step k there are `loss_k`,
            `cross_entropy_k` of the text's tokens, `overlap_k` with the target's distribution and `full_acc_k`, drafts
            that are the text's; and `acceptance_length`, tokens per verification along the text.
        """
        objective = Objective({"kl": 1.0}) if objective is None else objective
        ids_T = input_ids[0]
        offsets = sequence_offsets(document_ids[0])
        trained_PT = self._trained(ids_T, loss_mask[0], offsets, ttt_steps, objective)
        rows = chain_rows(trained_PT)

        hidden = self.fuse(hidden_states)
        starts_T = offsets[:-1].repeat_interleave(offsets.diff(), output_size=ids_T.shape[0])
        attention = TrainingTimeAttention(starts_T)
        # The first step runs everywhere, for its keys are seen from further on; the others where they train.
        rows_N = torch.arange(ids_T.shape[0], device=ids_T.device)
        outputs = []
        for k in range(ttt_steps):
            if k > 0:
                kept = rows.positions[1] if k == 1 else rows.kept[k]
                if kept.shape[0] == 0:
                    # Layers of transformers do not run on nothing.
                    kept = kept.new_zeros(1)
                rows_N = rows_N[kept]
                attention.next_step(kept, rows_N)
                hidden = hidden[:, kept]
            hidden, output = self.step(
                self.embed_tokens(head_inputs(ids_T, rows_N, k))[None], hidden, position_ids[:, rows_N] + k, attention
            )
            outputs.append(output[0, rows.trained_positions[0] if k == 0 else rows.trained[k]])

        step_weights = _step_weights(ttt_steps, ttt_step_loss_decay, ids_T.device)
        total = step_weights @ trained_PT.sum(dim=1).double()
        sum_dtype = torch.promote_types(outputs[0].dtype, torch.float32)
        scales = (step_weights / total.clamp(min=torch.finfo(torch.float32).tiny)).to(sum_dtype)
        labels = [self.to_draft_ids(head_targets(ids_T, at_N, k)) for k, at_N in enumerate(rows.trained_positions)]
        heads = [
            HeadRows(
                outputs[k],
                self.lm_head.weight,
                labels[k],
                scales[k].expand(len(at_N)),
                torch.searchsorted(rows.trained_positions[0], at_N + k),
            )
            for k, at_N in enumerate(rows.trained_positions)
        ]
        target_head = None
        if objective.needs_target:
            assert verifier_lm_head_weight is not None, "an objective against the target needs its vocabulary matrix"
            ids = self.draft_ids
            target_head = TargetHead(verifier_lm_head_weight if ids is None else verifier_lm_head_weight[ids])
        target_states = verifier_last_hidden_states[0, rows.trained_positions[0] + 1]
        result = soft_target_loss(heads, target_states, target_head, objective)
        return outputs, result.loss, self._metrics(result, labels, trained_PT, total)

    # The layers, for training and for decoding

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """[..., H] from the base's states [..., A * H]."""
        if self.input_norm is not None:
            aux_hidden_states = self.input_norm(aux_hidden_states)
        if self.fc_norm is not None:
            parts = aux_hidden_states.chunk(len(self.fc_norm), dim=-1)
            aux_hidden_states = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(aux_hidden_states)

    def step(self, embeds: Tensor, hidden: Tensor, position_ids: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """One step on entries [B, N, H] at `position_ids` [B, N]: the state to go on from, and what `lm_head` reads."""
        kwargs = {
            "position_embeddings": self.rotary(hidden, position_ids),
            "attention_mask": None,
            "attend": attend,
        }
        hidden = torch.cat([embeds, hidden], dim=-1)
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        normed = self.norm(hidden)
        return normed if self.config.norm_output else hidden, normed

    def make_drafter(self, sampling: SamplingParams | None = None) -> StatefulDrafter:
        """What drafts with it in `speculative_generate`: its likeliest tokens, or tokens drawn as `sampling` says."""
        from verl_speculator.algorithms.eagle3.drafter import Eagle3Drafter

        return Eagle3Drafter(self, sampling)

    def native_form(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`config.json` and tensors as EAGLE-3's own repository has them: one flat Llama configuration.

        Raises:
            ConfigError: There is no such form of it.
        """
        arch = self.layer_config.model_type
        if arch != "llama":
            raise ConfigError(f"EAGLE-3's own form has the layers of a llama, and these are a {arch}'s.")
        own = self.config.to_dict()
        kept = ("draft_vocab_size", "target_hidden_size", self.config.layer_ids_key, *FLAGS, "torch_dtype")
        values = {
            **self.config.transformer_layer_config,
            "architectures": ["LlamaForCausalLMEagle3"],
            **{name: own[name] for name in kept},
        }
        tensors = {
            name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name: tensor
            for name, tensor in self.export_state_dict().items()
        }
        return values, tensors

    # Details of the training-time test

    def _trained(
        self, ids_T: Tensor, loss_mask_T: Tensor, offsets: Tensor, ttt_steps: int, objective: Objective
    ) -> Tensor:
        """[ttt_steps, T], bool: where each step trains."""
        if self.d2t is not None and objective.weights.get("ce"):
            loss_mask_T = loss_mask_T * (self.to_draft_ids(ids_T) >= 0)
        return trained_positions(loss_mask_T, offsets, ttt_steps)

    def _metrics(
        self, result: SoftTargetsOutput, labels: list[Tensor], trained_PT: Tensor, total: Tensor
    ) -> dict[str, Tensor]:
        metrics = {"loss": (result.loss.detach() * total, total)}
        correct = []
        for k, labels_N in enumerate(labels):
            count = trained_PT[k].sum()
            can_N = labels_N >= 0
            correct.append(result.correct[k])
            metrics[f"loss_{k}"] = (result.row_losses[k].sum(), count)
            metrics[f"cross_entropy_{k}"] = (result.cross_entropies[k].where(can_N, 0.0).sum(), can_N.sum())
            metrics[f"overlap_{k}"] = (result.overlaps[k].sum(), count)
            metrics[f"full_acc_{k}"] = (correct[k].sum(), count)
        correct_PT = torch.zeros_like(trained_PT).masked_scatter_(trained_PT, torch.cat(correct))
        accepted_T = correct_PT.long().cumprod(dim=0).sum(dim=0) + trained_PT[0]
        metrics["acceptance_length"] = (accepted_T[trained_PT[0]].sum(), trained_PT[0].sum())
        return paired_metrics(metrics)


def _step_weights(ttt_steps: int, decay: float, device: torch.device) -> Tensor:
    return decay ** torch.arange(ttt_steps, dtype=torch.float64, device=device)
