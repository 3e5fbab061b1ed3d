"""What drafters made of a transformer's own layers share: their form in files, and what they take over from the base.

The form of `config.json` and the names of weights are those of Speculators 0.9, which stock vLLM reads.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from verl_speculator.errors import ConfigError
from verl_speculator.losses.soft_targets import Objective
from verl_speculator.models.base_components import model_classes
from verl_speculator.models.config import SpeculatorConfig, require_positive_int
from verl_speculator.models.draft_vocabulary import DraftVocabulary, given_draft_ids
from verl_speculator.models.speculator import Speculator

# `attend(layer, query, key, value, scaling)`: [B, heads, N, D] each, to [B, N, heads, D].
Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]

_FORMAT_VERSION = "0.9.0"
# Of a base, or of a drafter: far more than any has.
_MAX_LAYERS = 1024
_ATTENTION = "verl_speculator_attend"
# What the draft layers take over from the base's configuration, whatever its architecture.
_TAKEN_OVER = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
)


@dataclass(kw_only=True)
class TransformerSpeculatorConfig(SpeculatorConfig):
    """`input_hidden_dim`, `vocab_size` and `n_predict` stand in the file where Speculators has them.

    Attributes:
        transformer_layer_config: The decoder layers' configuration, as transformers writes it; with `model_type`.
        draft_vocab_size: Rows of `lm_head`.
        base_architectures: Of the base model, for information.
    """

    served_by_vllm: ClassVar[bool] = True
    # The key of the base's layers whose states it reads, and the architectures that its own layers may have.
    layer_ids_key: ClassVar[str]
    draft_archs: ClassVar[tuple[str, ...]] = tuple(model_classes)

    transformer_layer_config: dict[str, Any]
    draft_vocab_size: int
    base_architectures: list[str] = field(default_factory=list)

    def validate(self) -> None:
        super().validate()
        if self.transformer_layer_config.get("model_type") not in self.draft_archs:
            known = " or ".join(self.draft_archs)
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
        check_layer_ids(getattr(self, self.layer_ids_key), self.layer_ids_key)
        width = self.transformer_layer_config.get("hidden_size")
        if width != self.input_hidden_dim:
            raise ConfigError(
                f"transformer_layer_config.hidden_size must be the base's hidden size ({self.input_hidden_dim}), "
                f"not {width!r}."
            )

    def layer_config(self) -> Any:
        """`transformer_layer_config` as transformers' own, for layers that call `attend`; imports transformers."""
        values = dict(self.transformer_layer_config)
        config = _auto_config().for_model(values.pop("model_type"), **values)
        _register_attention()
        config._attn_implementation = _ATTENTION
        return config

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
            self.layer_ids_key: list(getattr(self, self.layer_ids_key)),
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
            defaults = _auto_config().for_model(layer_config["model_type"])
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
        if cls.layer_ids_key not in fields:
            raise ConfigError(f"{cls.layer_ids_key} is missing and must list the base's layers it reads.")
        return fields


class TransformerSpeculator(DraftVocabulary, Speculator):
    """Decoder layers of transformers between the base's embeddings and the rows of its `lm_head`.

    `embed_tokens` and `lm_head` are the base's: the rows of its matrices, those of the draft vocabulary for the second.
    They do not train, unless the subclass says so.
    """

    config: TransformerSpeculatorConfig
    t2d: Tensor | None

    def __init__(self, config: TransformerSpeculatorConfig) -> None:
        super().__init__(config)
        self.layer_config = config.layer_config()
        width = self.layer_config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        is_reduced = config.draft_vocab_size < config.vocab_size
        self.make_draft_vocabulary(config.draft_vocab_size if is_reduced else None)
        # Which of the target's tokens can be drafted: `d2t` says so too, but Speculators looks for it.
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size if is_reduced else None)
        for module in (self.embed_tokens, self.lm_head):
            module.weight.requires_grad_(False)
        rotary_class = model_classes[self.layer_config.model_type].rotary_emb_class
        # No module of its own: it has nothing to load or to shard, and a table on whatever device it is used on.
        self._make_rotary = functools.cache(lambda device: rotary_class(self.layer_config).to(device))

    @property
    def target_layer_ids(self) -> list[int]:
        return getattr(self.config, self.config.layer_ids_key)

    def rotary(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [B, N], in the type and on the device of `like`."""
        return self._make_rotary(like.device)(like, position_ids)

    @classmethod
    def build(
        cls,
        config_class: type[TransformerSpeculatorConfig],
        verifier_config: Any,
        arguments: Any,
        *,
        draft_arch: str,
        t2d: Tensor | None,
        verifier_name_or_path: str,
        verifier_architectures: list[str] | None,
        **fields: Any,
    ) -> Any:
        """A fresh model for a base; until `load_verifier_weights` what is the base's is NaN.

        Args:
            config_class: Made with `fields` and all that follows from the base.
            verifier_config: The base's text configuration.
            arguments: `num_layers`, `target_layer_ids`, `draft_vocab_size`, `draft_vocab_path`.
            t2d: [V] bool, the tokens that can be drafted; instead of `draft_vocab_path`.

        Raises:
            ConfigError: A setting that cannot work; the message begins with its name.
            MissingFileError: There is no file `draft_vocab_path`.
        """
        num_layers = verifier_config.num_hidden_layers
        layer_ids = arguments.target_layer_ids or [2, num_layers // 2, num_layers - 3]
        if arguments.target_layer_ids is None and num_layers < 7:
            raise ConfigError(f"target_layer_ids must be given for a base of {num_layers} layers, as in [0, 1, 2].")
        check_layer_ids(layer_ids, "target_layer_ids", num_layers)
        vocab_size = verifier_config.vocab_size
        ids = given_draft_ids(arguments.draft_vocab_size, t2d, arguments.draft_vocab_path, vocab_size)
        size = vocab_size if ids is None else ids.shape[0]
        taken = {name: getattr(verifier_config, name, None) for name in _TAKEN_OVER}
        # Where it is not written, transformers takes 128 for a Qwen3, and vLLM this.
        taken["head_dim"] = taken["head_dim"] or verifier_config.hidden_size // verifier_config.num_attention_heads
        layer_config = {
            "model_type": draft_arch,
            **{name: value for name, value in taken.items() if value is not None},
            "num_hidden_layers": arguments.num_layers,
            "attention_bias": False,
            "tie_word_embeddings": False,
        }
        fields[config_class.layer_ids_key] = list(layer_ids)
        model = cls(
            config_class(
                input_hidden_dim=verifier_config.hidden_size,
                vocab_size=vocab_size,
                base_model_name_or_path=verifier_name_or_path,
                base_architectures=verifier_architectures or [],
                transformer_layer_config=layer_config,
                draft_vocab_size=size,
                **fields,
            )
        )
        if ids is not None and size < vocab_size:
            model.set_draft_ids(ids)
        with torch.no_grad():
            model.embed_tokens.weight.fill_(torch.nan)
            model.lm_head.weight.fill_(torch.nan)
        return model

    def set_draft_ids(self, ids: Tensor) -> None:
        super().set_draft_ids(ids)
        assert self.t2d is not None
        self.t2d.fill_(False)[ids] = True

    @torch.no_grad()
    def load_verifier_weights(self, embed_tokens: Tensor, lm_head: Tensor) -> None:
        """Take over what is the base's: its embeddings [V, H] and its vocabulary matrix [V, H]."""
        self.embed_tokens.weight.copy_(embed_tokens)
        self.lm_head.weight.copy_(lm_head if self.draft_ids is None else lm_head[self.draft_ids])

    def target_logits(self, outputs: Tensor) -> Tensor:
        """Logits over the target's vocabulary [..., V], -inf where a token cannot be drafted."""
        return self.to_target_logits(self.lm_head(outputs))


def sequence_offsets(document_ids_T: Tensor) -> Tensor:
    """[B + 1], where each sequence starts and the last one ends."""
    starts = (document_ids_T.diff() != 0).nonzero().squeeze(1) + 1
    end = starts.new_full((1,), document_ids_T.shape[0])
    return torch.cat([starts.new_zeros(1), starts, end])


def make_objective(given: Any, temperature: float) -> Objective:
    """From the settings `objective` and `objective_temperature`."""
    return Objective(given if isinstance(given, Mapping) else {given: 1.0}, temperature)


def paired_metrics(metrics: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Each sum and total as `<name>_sum` and `<name>_total`."""
    named = {f"{name}_sum": pair[0] for name, pair in metrics.items()}
    named |= {f"{name}_total": pair[1] for name, pair in metrics.items()}
    return {name: value.detach().float() for name, value in named.items()}


def check_layer_ids(ids: Any, name: str, num_layers: int | None = None) -> None:
    """Refuse what is no ascending list of layers of a base with so many layers."""
    is_list = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    top = _MAX_LAYERS if num_layers is None else num_layers
    # Inference engines collect the states on their way through the layers, so in this order.
    if not is_list or not ids or ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] > top:
        until = "on" if num_layers is None else f"to {num_layers}, the base's number of layers"
        raise ConfigError(f"{name} must be a list of layers in ascending order, from 0 {until}; not {short(ids)}.")


def _auto_config() -> Any:
    transformers: Any = importlib.import_module("transformers")
    return transformers.AutoConfig


@functools.cache
def _register_attention() -> None:
    """Let transformers' layers hand their queries, keys and values to the `attend` that they were called with."""
    utils: Any = importlib.import_module("transformers.modeling_utils")

    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any) -> tuple:
        return kwargs["attend"](module.layer_idx, query, key, value, kwargs["scaling"]), None

    utils.ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, forward)
