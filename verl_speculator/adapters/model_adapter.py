"""The adapter of every registered model that is no chain of heads: it calls the model, which knows how it is trained.

docs/adding_an_algorithm.md has the contract: `from_training_args`, `get_trainer_kwargs`, `forward`, `target_layer_ids`,
and the methods that a model may have beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from verl_speculator.adapters.interface import SpeculatorAdapter
from verl_speculator.adapters.needs import AdapterNeeds
from verl_speculator.adapters.settings import SECTION, SHARED_DEFAULTS, base_model_sizes, own_settings
from verl_speculator.errors import ConfigError, MissingFileError
from verl_speculator.losses import Objective, PackedHiddenStates
from verl_speculator.models import Speculator, SpeculatorConfig


class ModelAdapter(SpeculatorAdapter):
    """Its settings are the fields of the configuration's `training_arguments`; without these, anything goes."""

    config_class: ClassVar[type[SpeculatorConfig]]
    speculator_class: ClassVar[type[Speculator]]

    def validate_settings(self) -> None:
        given = {key: _plain(value) for key, value in self.settings.items()}
        declared = self.config_class.training_arguments
        if declared is not None:
            given = own_settings([field.name for field in dataclasses.fields(declared)], given)
        # What nobody set is the algorithm's to choose.
        self._arguments = {
            key: value for key, value in given.items() if key not in SHARED_DEFAULTS or value != SHARED_DEFAULTS[key]
        }
        model: Any = self.speculator_class
        self._train_kwargs, self._val_kwargs = _named(model.get_trainer_kwargs, self._arguments)

    @property
    def needs(self) -> AdapterNeeds:
        objective = self._train_kwargs.get("objective")
        return AdapterNeeds(
            aux_hidden_state_layer_ids=tuple(getattr(self.speculator, "target_layer_ids", None) or ()),
            whole_sequences=True,
            target_head_weight=objective.needs_target if isinstance(objective, Objective) else True,
            position_ids=True,
        )

    def build_speculator_module(self, model: Any) -> Speculator:
        sizes = base_model_sizes(model)
        names = {
            "verifier_name_or_path": sizes["base_model_name_or_path"],
            "verifier_architectures": sizes["base_model_archs"],
        }
        model_class: Any = self.speculator_class
        return _named(model_class.from_training_args, model.config.get_text_config(), **names, **self._arguments)

    @property
    def starts_from_base(self) -> bool:
        return hasattr(self.speculator_class, "load_verifier_weights")

    def start_from_base(self, embed_tokens: Tensor, lm_head: Tensor, generator: Generator) -> None:
        speculator: Any = self.speculator
        speculator.load_verifier_weights(embed_tokens.detach(), lm_head.detach())

    def get_optimizer_params(self) -> Iterable[nn.Parameter]:
        return (parameter for parameter in self.speculator.parameters() if parameter.requires_grad)

    def compute_speculator_logits(self, packed: PackedHiddenStates) -> Tensor:
        raise NotImplementedError(f"a {type(self.speculator).__name__} gives no logits outside of its loss")

    def compute_speculator_loss(self, packed: PackedHiddenStates) -> tuple[Tensor, dict[str, Tensor]]:
        states = packed.hidden_states if packed.aux_hidden_states is None else packed.aux_hidden_states
        assert packed.position_ids is not None
        _, loss, metrics = self.speculator(
            hidden_states=states.unsqueeze(0),
            **_tokens(packed.input_ids, packed.loss_mask, packed.cu_seqlens),
            position_ids=packed.position_ids.unsqueeze(0),
            verifier_last_hidden_states=packed.hidden_states.unsqueeze(0),
            verifier_lm_head_weight=packed.lm_head_weight,
            **(self._train_kwargs if self.speculator.training else self._val_kwargs),
        )
        if packed.head_counts is not None:
            # From a mean over this part of the batch to its share of the mean over all of it.
            total = packed.head_counts[0].clamp(min=torch.finfo(torch.float32).tiny)
            loss = loss * (metrics["loss_total"] / total).to(loss.dtype)
        return loss, {name: value for name, value in metrics.items() if name.endswith(("_sum", "_total"))}

    def count_trained_positions(self, input_ids: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`[1]`: what the mean over all of these divides by. For a model that cannot tell: their trained tokens.

        The second is as exact however a batch is cut, but it is not the model's own mean.
        """
        count = getattr(self.speculator, "count_trained", None)
        if count is None:
            return (loss_mask == 1).sum().double().reshape(1)
        return count(**_tokens(input_ids, loss_mask, cu_seqlens), **self._train_kwargs).double().reshape(1)

    def summarize_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        names = [name.removesuffix("_sum") for name in sums if name.endswith("_sum")]
        totals = {name: sums.get(f"{name}_total", 0.0) for name in names}
        return {name: sums[f"{name}_sum"] / total if total else 0.0 for name, total in totals.items()}


def _tokens(input_ids: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> dict[str, Tensor]:
    lengths_B = cu_seqlens.diff()
    index_B = torch.arange(lengths_B.shape[0], device=lengths_B.device)
    document_ids = index_B.repeat_interleave(lengths_B, output_size=input_ids.shape[0]).to(input_ids.device)
    named = {"input_ids": input_ids, "document_ids": document_ids, "loss_mask": loss_mask}
    return {name: value.unsqueeze(0) for name, value in named.items()}


def _named(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call something of the model's, whose errors begin with a setting's name, which here gets its section."""
    try:
        return call(*args, **kwargs)
    except (ConfigError, MissingFileError) as error:
        raise type(error)(f"{SECTION}.{error}") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
