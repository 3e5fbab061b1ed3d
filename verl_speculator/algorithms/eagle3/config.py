"""EAGLE-3's `config.json`, in the form of Speculators 0.9, and what a training run may set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from verl_speculator.algorithms.transformer import TransformerSpeculatorConfig, check_layer_ids
from verl_speculator.errors import ConfigError
from verl_speculator.models.base_components import model_classes
from verl_speculator.models.config import SpeculatorConfig, require_bool, require_positive_int

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")


@dataclass(kw_only=True)
class Eagle3TrainingArguments:
    """What `from_training_args` and `get_trainer_kwargs` take; the defaults are those of Speculators 0.9."""

    num_layers: int = field(default=1, metadata={"help": "decoder layers"})
    draft_arch: str = field(default="llama", metadata={"help": "architecture of the decoder layers: llama or qwen3"})
    ttt_steps: int = field(
        default=3, metadata={"help": "steps of the training-time test, and drafts per round when served"}
    )
    ttt_step_loss_decay: float = field(
        default=1.0, metadata={"help": "weight of a step's loss relative to that of the step before"}
    )
    target_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "layers of the base whose residual streams it reads; null for [2, n/2, n-3]"}
    )
    draft_vocab_size: int | None = field(
        default=None, metadata={"help": "tokens that it can draft; null for all of the base's"}
    )
    draft_vocab_path: str | None = field(
        default=None,
        metadata={"help": "a .npy file of V booleans, true for the tokens that it can draft (t2d.npy of Speculators)"},
    )
    norm_before_residual: bool = field(
        default=True, metadata={"help": "the first layer's residual starts after its norm"}
    )
    norm_before_fc: bool = field(default=True, metadata={"help": "one norm over the base's states, side by side"})
    fc_norm: bool = field(default=False, metadata={"help": "one norm for each of the base's states instead"})
    norm_output: bool = field(default=True, metadata={"help": "a step goes on from normed states"})
    embed_requires_grad: bool = field(
        default=False, metadata={"help": "train the token embeddings, which are the base's"}
    )
    objective: Any = field(default="kl", metadata={"help": "what it learns from"})
    objective_temperature: float = field(
        default=1.0, metadata={"help": "the sampling temperature for which drafts are meant"}
    )

    def __post_init__(self) -> None:
        for name in ("num_layers", "ttt_steps"):
            require_positive_int(getattr(self, name), name)
        for name in FLAGS:
            require_bool(getattr(self, name), name)
        decay = self.ttt_step_loss_decay
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise ConfigError(f"ttt_step_loss_decay must be a number above 0 and up to 1, not {decay!r}.")
        if self.draft_arch not in model_classes:
            raise ConfigError(f"draft_arch must be {' or '.join(model_classes)}, not {self.draft_arch!r}.")
        _check_norms(self.norm_before_fc, self.fc_norm)
        if self.draft_vocab_size is not None:
            require_positive_int(self.draft_vocab_size, "draft_vocab_size")
        if self.target_layer_ids is not None:
            check_layer_ids(self.target_layer_ids, "target_layer_ids")


@SpeculatorConfig.register("eagle3")
@dataclass(kw_only=True)
class Eagle3SpeculatorConfig(TransformerSpeculatorConfig):
    """Adds the flags of EAGLE-3 and 3.1.

    Attributes:
        eagle_aux_hidden_state_layer_ids: Layers of the base that it reads. Id i is the residual stream after i layers.
        norm_before_residual: Where false, the first layer's residual is its input as it came.
        norm_before_fc: A norm over all states that it reads, side by side.
        fc_norm: A norm over each of them instead.
        norm_output: A step's output, from which the next one goes on, is the normed state.
        embed_requires_grad: The embeddings train.
    """

    architectures: ClassVar[tuple[str, ...]] = ("Eagle3Speculator",)
    speculators_model_type: ClassVar[str] = "eagle3"
    training_arguments: ClassVar[type | None] = Eagle3TrainingArguments
    layer_ids_key: ClassVar[str] = "eagle_aux_hidden_state_layer_ids"

    n_predict: int = 3
    eagle_aux_hidden_state_layer_ids: list[int]
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    embed_requires_grad: bool = False

    def validate(self) -> None:
        super().validate()
        for name in FLAGS:
            require_bool(getattr(self, name), name)
        _check_norms(self.norm_before_fc, self.fc_norm)

    def to_dict(self) -> dict[str, Any]:
        # Always written: where one is absent vLLM takes true and Speculators false.
        return {**super().to_dict(), **{name: getattr(self, name) for name in FLAGS}}


def _check_norms(norm_before_fc: bool, fc_norm: bool) -> None:
    if norm_before_fc and fc_norm:
        raise ConfigError("norm_before_fc and fc_norm exclude each other: set one of them to false.")
