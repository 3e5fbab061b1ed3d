"""The parts of a transformer that drafters are built from, taken from transformers when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from verl_speculator.errors import ConfigError


class ModelComponents(NamedTuple):
    """The classes that make up a model; the first layer is apart because a drafter reads more than hidden states.

    Attributes:
        first_layer_class: Called like `decoder_layer_class`, which it is unless overridden.
        decoder_layer_class: `(config, layer_idx)`.
        norm_class: `(width, eps=)`.
        rotary_emb_class: `(config)`; called with states and position ids [B, T] it gives cosines and sines.
    """

    first_layer_class: type[nn.Module]
    decoder_layer_class: type[nn.Module]
    norm_class: type[nn.Module]
    rotary_emb_class: type[nn.Module]


class _Architectures(Mapping[str, ModelComponents]):
    """By `model_type`. transformers is imported by looking one up, for `models` itself needs torch alone."""

    _prefixes: Mapping[str, str] = {"llama": "Llama", "qwen3": "Qwen3"}

    def __getitem__(self, arch: str) -> ModelComponents:
        if arch not in self._prefixes:
            raise ConfigError(f"the architecture of a draft model must be {' or '.join(self)}, not {arch!r}.")
        modeling: Any = importlib.import_module(f"transformers.models.{arch}.modeling_{arch}")
        names = ("DecoderLayer", "DecoderLayer", "RMSNorm", "RotaryEmbedding")
        return ModelComponents(*(getattr(modeling, self._prefixes[arch] + name) for name in names))

    def __contains__(self, arch: object) -> bool:
        return arch in self._prefixes

    def __iter__(self) -> Iterator[str]:
        return iter(self._prefixes)

    def __len__(self) -> int:
        return len(self._prefixes)


model_classes: Mapping[str, ModelComponents] = _Architectures()


def override_components(arch: str, **parts: type[nn.Module]) -> ModelComponents:
    """The parts of `arch` with some of them exchanged, as in `first_layer_class=MyFirstLayer`.

    Raises:
        ConfigError: The architecture is not known, or there is no part of that name.
    """
    unknown = sorted(set(parts) - set(ModelComponents._fields))
    if unknown:
        raise ConfigError(f"a model has no part {unknown[0]!r}; it has {', '.join(ModelComponents._fields)}.")
    return model_classes[arch]._replace(**parts)
