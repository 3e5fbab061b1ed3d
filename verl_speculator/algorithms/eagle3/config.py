"""EAGLE-3's `config.json`, in the form of Speculators 0.9, and what a training run may set."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any, ClassVar

from verl_speculator.errors import ConfigError
from verl_speculator.models.base_components import model_classes
from verl_speculator.models.config import SpeculatorConfig, require_bool, require_positive_int

_FORMAT_VERSION = "0.9.0"
# Of a base, or of a drafter: far more than any has.
_MAX_LAYERS = 1024
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")


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
        for name in _FLAGS:
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
class Eagle3SpeculatorConfig(SpeculatorConfig):
    """`input_hidden_dim`, `vocab_size` and `n_predict` stand in the file where Speculators has them.

    Attributes:
        transformer_layer_config: The decoder layers' configuration, as transformers writes it; with `model_type`.
        draft_vocab_size: Rows of `lm_head`.
        eagle_aux_hidden_state_layer_ids: Layers of the base that it reads. Id i is the residual stream after i layers.
        norm_before_residual: Where false, the first layer's residual is its input as it came.
        norm_before_fc: A norm over all states that it reads, side by side.
        fc_norm: A norm over each of them instead.
        norm_output: A step's output, from which the next one goes on, is the normed state.
        embed_requires_grad: The embeddings train.
        base_architectures: Of the base model, for information.
    """

    architectures: ClassVar[tuple[str, ...]] = ("Eagle3Speculator",)
    speculators_model_type: ClassVar[str] = "eagle3"
    training_arguments: ClassVar[type | None] = Eagle3TrainingArguments
    served_by_vllm: ClassVar[bool] = True

    n_predict: int = 3
    transformer_layer_config: dict[str, Any]
    draft_vocab_size: int
    eagle_aux_hidden_state_layer_ids: list[int]
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    embed_requires_grad: bool = False
    base_architectures: list[str] = field(default_factory=list)

    def validate(self) -> None:
        super().validate()
        if self.transformer_layer_config.get("model_type") not in model_classes:
            known = " or ".join(model_classes)
            found = self.transformer_layer_config.get("model_type")
            raise ConfigError(f"transformer_layer_config.model_type must be {known}, not {found!r}.")
        if "sliding_attention" in (self.transformer_layer_config.get("layer_types") or ()):
            raise ConfigError("transformer_layer_config.layer_types must not have sliding_attention: not supported.")
        # Absent, it is transformers' default.
        num_layers = self.transformer_layer_config.get("num_hidden_layers", 1)
        require_positive_int(num_layers, "transformer_layer_config.num_hidden_layers", _MAX_LAYERS)
        require_positive_int(self.draft_vocab_size, "draft_vocab_size")
        if self.draft_vocab_size > self.vocab_size:
            raise ConfigError(f"draft_vocab_size must be at most vocab_size ({self.vocab_size}).")
        check_layer_ids(self.eagle_aux_hidden_state_layer_ids, "eagle_aux_hidden_state_layer_ids")
        for name in _FLAGS:
            require_bool(getattr(self, name), name)
        _check_norms(self.norm_before_fc, self.fc_norm)
        width = self.transformer_layer_config.get("hidden_size")
        if width != self.input_hidden_dim:
            raise ConfigError(
                f"transformer_layer_config.hidden_size must be the base's hidden size ({self.input_hidden_dim}), "
                f"not {width!r}."
            )

    def layer_config(self) -> Any:
        """`transformer_layer_config` as transformers' own configuration; imports transformers."""
        auto: Any = importlib.import_module("transformers").AutoConfig
        values = dict(self.transformer_layer_config)
        return auto.for_model(values.pop("model_type"), **values)

    def to_dict(self) -> dict[str, Any]:
        proposal = {
            "proposal_type": "greedy",
            "speculative_tokens": self.n_predict,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        return {
            "architectures": [self.architectures[0]],
            "speculators_model_type": self.speculators_model_type,
            "speculators_version": _FORMAT_VERSION,
            "speculators_config": {
                "algorithm": self.speculators_model_type,
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": {
                    "name_or_path": self.base_model_name_or_path or None,
                    "architectures": list(self.base_architectures),
                },
            },
            "transformer_layer_config": dict(self.transformer_layer_config),
            "draft_vocab_size": self.draft_vocab_size,
            "target_hidden_size": self.input_hidden_dim,
            "eagle_aux_hidden_state_layer_ids": list(self.eagle_aux_hidden_state_layer_ids),
            # Always written: where it is absent vLLM takes true and Speculators false.
            **{name: getattr(self, name) for name in _FLAGS},
            "tie_word_embeddings": False,
            "torch_dtype": self.torch_dtype,
        }

    @classmethod
    def _fields_from_file(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._fields_from_file(values)
        layer_config = fields.get("transformer_layer_config")
        if not isinstance(layer_config, Mapping):
            raise ConfigError("transformer_layer_config is missing and must be a decoder layer's configuration.")
        # Speculators leaves out what is transformers' default, the type too where it is a Qwen3.
        layer_config = {"model_type": "qwen3", **layer_config}
        if layer_config["model_type"] in model_classes and {"hidden_size", "vocab_size"} - set(layer_config):
            auto: Any = importlib.import_module("transformers").AutoConfig
            defaults = auto.for_model(layer_config["model_type"])
            sizes = {"hidden_size": defaults.hidden_size, "vocab_size": defaults.vocab_size}
            layer_config = {**sizes, **layer_config}
        fields["transformer_layer_config"] = layer_config
        fields.setdefault("input_hidden_dim", fields.get("target_hidden_size") or layer_config.get("hidden_size"))
        fields.setdefault("vocab_size", layer_config.get("vocab_size"))
        speculators = fields.get("speculators_config") or {}
        methods = speculators.get("proposal_methods") or [{}]
        fields.setdefault("n_predict", methods[0].get("speculative_tokens", cls.n_predict))
        verifier = speculators.get("verifier") or {}
        fields.setdefault("base_model_name_or_path", verifier.get("name_or_path") or "")
        fields.setdefault("base_architectures", verifier.get("architectures") or [])
        if "eagle_aux_hidden_state_layer_ids" not in fields:
            raise ConfigError("eagle_aux_hidden_state_layer_ids is missing and must list the base's layers it reads.")
        return fields


def check_layer_ids(ids: Any, name: str, num_layers: int | None = None) -> None:
    """Refuse what is no ascending list of layers of a base with so many layers."""
    is_list = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    top = _MAX_LAYERS if num_layers is None else num_layers
    # Inference engines collect the states on their way through the layers, so in this order.
    if not is_list or not ids or ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] > top:
        until = "on" if num_layers is None else f"to {num_layers}, the base's number of layers"
        raise ConfigError(f"{name} must be a list of layers in ascending order, from 0 {until}; not {short(ids)}.")


def _check_norms(norm_before_fc: bool, fc_norm: bool) -> None:
    if norm_before_fc and fc_norm:
        raise ConfigError("norm_before_fc and fc_norm exclude each other: set one of them to false.")
