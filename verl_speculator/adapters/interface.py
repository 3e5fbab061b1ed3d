"""What an engine asks of a speculator type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Generator, Tensor, nn

from verl_speculator.adapters.needs import AdapterNeeds
from verl_speculator.losses import (
    PackedHiddenStates,
    acceptance_metrics,
    count_trained_positions,
    speculator_metrics,
)
from verl_speculator.models import Speculator


class SpeculatorAdapter(ABC):
    """One speculator type: how it is built from `model.speculator`, and its loss on a packed batch.

    An adapter knows nothing of engines, ranks or padding: it sees `PackedHiddenStates` only. The engine sets
    `speculator` to what `build_speculator_module` returned, or to the one loaded from
    `model.speculator_path`, and shards its parameters in place.

    Attributes:
        settings: `model.speculator`, as given by the user over the defaults.
        speculator_class: What may be loaded from `model.speculator_path`; anything if a subclass does not say.
    """

    speculator_class: ClassVar[type[Speculator]] = Speculator

    speculator: Speculator

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self.validate_settings()

    def validate_settings(self) -> None:  # noqa: B027 - nothing to check is a right answer
        """Raise `ConfigError` naming the key if `settings` cannot work. No model is loaded yet."""

    @abstractmethod
    def build_speculator_module(self, model: nn.Module) -> Speculator:
        """A freshly initialised speculator for this base model (a Hugging Face model; its `config` has the sizes)."""

    @abstractmethod
    def get_optimizer_params(self) -> Iterable[nn.Parameter] | Iterable[dict[str, Any]]:
        """The parameters to train, or parameter groups of them. Called after the engine has sharded the speculator."""

    @abstractmethod
    def compute_speculator_logits(self, packed: PackedHiddenStates) -> Tensor:
        """Logits `[n_predict, T, V]` at every position, for small inputs: tests and evaluation."""

    @abstractmethod
    def compute_speculator_loss(self, packed: PackedHiddenStates) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (a scalar with gradient) and metrics as sums and counts.

        With `packed.head_counts` set, the losses of all micro-batches and ranks must add up to the loss of the global
        batch: divide by those counts and not by this batch's. Metrics ending in `_sum` are divided by their
        `count` once, after everything has been added up.
        """

    @property
    def needs(self) -> AdapterNeeds:
        """What the engine has to provide; read once `speculator` is set, on which it may depend."""
        return AdapterNeeds()

    @property
    def starts_from_base(self) -> bool:
        """Whether a fresh speculator takes something over from the base's matrices; `start_from_base` then does."""
        return False

    def start_from_base(self, embed_tokens: Tensor, lm_head: Tensor, generator: Generator) -> None:
        """Change the fresh `speculator` by the base's embeddings and vocabulary matrix, [V, H] each.

        One process calls this, before the speculator is sharded.
        """
        raise NotImplementedError

    def count_trained_positions(self, input_ids: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`[n_predict]`: positions that train each head, for the division above."""
        return count_trained_positions(loss_mask, cu_seqlens, self.speculator.n_predict)

    def measure_acceptance(self, packed: PackedHiddenStates) -> dict[str, Tensor]:
        """What decoding along these sequences would accept, as sums; runs in validation only.

        `packed.target_head` is set where the base's distribution is known, and `packed.lm_head_weight` where that is
        `softmax(hidden_states @ lm_head_weight.T)`. An adapter that cannot tell leaves it empty.
        """
        return {}

    def summarize_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Averages from the added-up sums and counts of the two methods above; needs no speculator."""
        heads = [key for key in sums if key.startswith("head_") and key.endswith("/count")]
        return speculator_metrics(sums, len(heads)) | acceptance_metrics(sums)
