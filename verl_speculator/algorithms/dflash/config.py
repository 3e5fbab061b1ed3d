"""DFlash's `config.json`, in the form of Speculators 0.9, and what a training run may set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from verl_speculator.algorithms.transformer import TransformerSpeculatorConfig, check_layer_ids
from verl_speculator.errors import ConfigError
from verl_speculator.models.config import MAX_HEADS, SpeculatorConfig, require_positive_int


@dataclass(kw_only=True)
class DFlashTrainingArguments:
    """What `from_training_args` and `get_trainer_kwargs` take."""

    num_layers: int = field(default=5, metadata={"help": "decoder layers"})
    block_size: int = field(default=8, metadata={"help": "the last token and the drafts of a round"})
    mask_token_id: int | None = field(
        default=None, metadata={"help": "the token that stands for what is drafted; null for padding, or the last one"}
    )
    target_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "layers of the base whose residual streams it reads; null for [2, n/2, n-3]"}
    )
    anchor_fraction: float = field(
        default=0.25, metadata={"help": "share of the positions from which a block is drafted in training"}
    )
    decay_gamma: float = field(
        default=4.0, metadata={"help": "the loss of a block's draft k counts exp(-(k - 1) / gamma)"}
    )
    draft_vocab_size: int | None = field(
        default=None, metadata={"help": "draft so many tokens only, those that the training data have most"}
    )
    draft_vocab_path: str | None = field(
        default=None, metadata={"help": "a .npy file of V booleans instead: the tokens that it can draft"}
    )
    objective: Any = field(default="kl", metadata={"help": "what it learns from"})
    objective_temperature: float = field(
        default=1.0, metadata={"help": "the sampling temperature for which drafts are meant"}
    )

    def __post_init__(self) -> None:
        require_positive_int(self.num_layers, "num_layers")
        _check_block_size(self.block_size)
        for name, most in (("anchor_fraction", 1.0), ("decay_gamma", float("inf"))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                until = f" and up to {most:g}" if most == 1 else ""
                raise ConfigError(f"{name} must be a number above 0{until}, not {value!r}.")
        if self.draft_vocab_size is not None:
            require_positive_int(self.draft_vocab_size, "draft_vocab_size")
        if self.target_layer_ids is not None:
            check_layer_ids(self.target_layer_ids, "target_layer_ids")


@SpeculatorConfig.register("dflash")
@dataclass(kw_only=True)
class DFlashSpeculatorConfig(TransformerSpeculatorConfig):
    """Adds what a block is.

    Attributes:
        aux_hidden_state_layer_ids: Layers of the base that it reads. Id i is the residual stream after i layers.
        block_size: The anchor, which is known, and the tokens that are drafted with it.
        mask_token_id: What stands in their place.
    """

    architectures: ClassVar[tuple[str, ...]] = ("DFlashSpeculator", "DFlashDraftModel")
    speculators_model_type: ClassVar[str] = "dflash"
    training_arguments: ClassVar[type | None] = DFlashTrainingArguments
    layer_ids_key: ClassVar[str] = "aux_hidden_state_layer_ids"
    # vLLM has no other.
    draft_archs: ClassVar[tuple[str, ...]] = ("qwen3",)

    aux_hidden_state_layer_ids: list[int]
    block_size: int = 8
    mask_token_id: int

    def validate(self) -> None:
        super().validate()
        _check_block_size(self.block_size)
        if self.n_predict != self.block_size - 1:
            raise ConfigError(f"block_size must be {self.n_predict + 1}, one more than the tokens drafted in a round.")
        is_token = isinstance(self.mask_token_id, int) and not isinstance(self.mask_token_id, bool)
        if not is_token or not 0 <= self.mask_token_id < self.vocab_size:
            raise ConfigError(f"mask_token_id must be a token of the base, below {self.vocab_size}.")

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "sample_from_anchor": False,
            # It speaks of sliding windows, which there are none of. But where it is false, vLLM 0.28 masks every layer
            # causally, and the tokens of a block would not see each other.
            "sliding_window_non_causal": True,
        }

    @classmethod
    def _fields_from_file(cls, values: Any) -> dict[str, Any]:
        fields = super()._fields_from_file(values)
        if fields.get("sample_from_anchor"):
            raise ConfigError("sample_from_anchor must be false: drafts at the anchor itself are not supported.")
        fields.setdefault("block_size", cls.block_size)
        return {**fields, "n_predict": fields["block_size"] - 1}


def _check_block_size(value: Any) -> None:
    require_positive_int(value, "block_size", MAX_HEADS + 1)
    if value < 2:
        raise ConfigError("block_size must be at least 2: the first of a block is known.")
