"""The adapter of speculators that draft as a chain of heads: `ChainSpeculator`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from verl_speculator.adapters.interface import SpeculatorAdapter
from verl_speculator.adapters.needs import AdapterNeeds
from verl_speculator.adapters.settings import (
    SECTION,
    SHARED_DEFAULTS,
    base_model_sizes,
    build_config,
    config_settings,
    own_settings,
)
from verl_speculator.errors import ConfigError, MissingFileError
from verl_speculator.losses import (
    Objective,
    PackedHiddenStates,
    acceptance_sums,
    count_loss_rows,
    normalised_weights,
    speculator_loss,
)
from verl_speculator.models import ChainSpeculator, ChainSpeculatorConfig
from verl_speculator.models.chain import ChainTrainingArguments
from verl_speculator.models.config import require_positive_int
from verl_speculator.models.draft_vocabulary import given_draft_ids, read_t2d

_TRAINING_SETTINGS = tuple(field.name for field in dataclasses.fields(ChainTrainingArguments))


class ChainSpeculatorAdapter(SpeculatorAdapter):
    """Needs a configuration class only: its fields are the settings, and its registered model is what trains.

    A setting that is a field of `config_class` and not in the run's configuration file is given as
    `+model.speculator.KEY=VALUE`. What the speculator learns from is set the same way for all of them: `objective`,
    `objective_temperature` and `head_loss_weights`; and what it can draft: `draft_vocab_size`, `draft_vocab_path`.
    """

    config_class: ClassVar[type[ChainSpeculatorConfig]]
    speculator_class: ClassVar[type[ChainSpeculator]] = ChainSpeculator  # type: ignore[type-abstract]

    speculator: ChainSpeculator

    def validate_settings(self) -> None:
        # The base's sizes are not known yet; any positive ones let the other values be checked.
        config = self._build_config(input_hidden_dim=1, vocab_size=1)
        given = self._setting("objective") or "ce"
        weights = given if isinstance(given, Mapping) else {given: 1.0}
        self._head_loss_weights = self._setting("head_loss_weights")
        try:
            self._objective = Objective(weights, self._setting("objective_temperature"))
            normalised_weights(self._head_loss_weights, config.n_predict)
            if self._setting("init_from_base") not in (True, False, "auto"):
                raise ConfigError(
                    f"init_from_base must be true, false or auto, not {self._setting('init_from_base')!r}"
                )
            if self._setting("draft_vocab_size") is not None:
                require_positive_int(self._setting("draft_vocab_size"), "draft_vocab_size")
            if self._setting("draft_vocab_path") is not None:
                read_t2d(self._setting("draft_vocab_path"))
        except (ConfigError, MissingFileError) as error:
            raise type(error)(f"{SECTION}.{error}") from error

    @property
    def needs(self) -> AdapterNeeds:
        return AdapterNeeds(target_head=self._objective.needs_target)

    def build_speculator_module(self, model: nn.Module) -> ChainSpeculator:
        sizes = base_model_sizes(model)
        given = self._setting("draft_vocab_size"), None, self._setting("draft_vocab_path")
        try:
            ids = given_draft_ids(*given, sizes["vocab_size"])
        except ConfigError as error:
            raise ConfigError(f"{SECTION}.{error}") from error
        config = self._build_config(**sizes, draft_vocab_size=None if ids is None else ids.shape[0])
        speculator = self.speculator_class.from_config(config)
        if ids is not None:
            rows = speculator.head_weight(0).shape[0]
            if rows != ids.shape[0]:
                raise ConfigError(
                    f"{SECTION}.draft_vocab_size: the head of a {type(speculator).__name__} has {rows} rows; "
                    f"give it config.head_rows ({ids.shape[0]}) so that it can have a draft vocabulary"
                )
            speculator.set_draft_ids(ids)
        return speculator

    @property
    def starts_from_base(self) -> bool:
        return self._setting("init_from_base") is not False

    def start_from_base(self, embed_tokens: Tensor, lm_head: Tensor, generator: Generator) -> None:
        self.speculator.start_from_base(embed_tokens, lm_head, generator)

    def get_optimizer_params(self) -> Iterable[nn.Parameter]:
        return self.speculator.parameters()

    def compute_speculator_logits(self, packed: PackedHiddenStates) -> Tensor:
        """Teacher-forced with the batch's own tokens; a head that would read past the end has no meaningful logits."""
        # The batch as one long sequence: a chain looks at one position only, and never across a boundary.
        tokens_T = F.pad(packed.input_ids[1:], (0, self.speculator.n_predict))
        return self.speculator(packed.hidden_states.unsqueeze(0), tokens_T.unsqueeze(0)).squeeze(1)

    def compute_speculator_loss(self, packed: PackedHiddenStates) -> tuple[Tensor, dict[str, Tensor]]:
        output = speculator_loss(
            self.speculator, packed, objective=self._objective, head_loss_weights=self._head_loss_weights
        )
        return output.loss, output.metrics

    def count_trained_positions(self, input_ids: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        return count_loss_rows(self.speculator, self._objective, input_ids, loss_mask, cu_seqlens)

    def measure_acceptance(self, packed: PackedHiddenStates) -> dict[str, Tensor]:
        return acceptance_sums(self.speculator, packed)

    def _build_config(self, **sizes: Any) -> ChainSpeculatorConfig:
        own = own_settings(config_settings(self.config_class), self.settings, also=_TRAINING_SETTINGS)
        # How many tokens it can draft is known with the base's.
        own.pop("draft_vocab_size", None)
        return build_config(self.config_class, own, **sizes)

    def _setting(self, key: str) -> Any:
        return self.settings.get(key, SHARED_DEFAULTS[key])
