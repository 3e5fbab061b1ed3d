"""`Speculator`: what every draft head can do, whatever its layers are."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

import torch
from torch import nn

from verl_speculator.errors import CheckpointError, ConfigError
from verl_speculator.models import serialization
from verl_speculator.models.config import SpeculatorConfig
from verl_speculator.models.layers import RMSNorm, for_head, scale_hidden_states

State: TypeAlias = tuple[torch.Tensor, ...]
SpeculatorT = TypeVar("SpeculatorT", bound="Speculator")

_MODEL_CLASSES: dict[type[SpeculatorConfig], type[Speculator]] = {}


def register_speculator(config_class: type[SpeculatorConfig]) -> Callable[[type[SpeculatorT]], type[SpeculatorT]]:
    """Class decorator: `Speculator.from_config` builds the decorated class from a `config_class`."""

    def register(model_class: type[SpeculatorT]) -> type[SpeculatorT]:
        _MODEL_CLASSES[config_class] = model_class
        return model_class

    return register


class Speculator(nn.Module, ABC):
    """A draft head that predicts the `n_predict` tokens after the next one from a base model's hidden state.

    Head i (from 0) at position t reads token `x_{t+1+i}` and predicts `x_{t+2+i}`. A subclass gives `step`, fills
    `head` with linear layers without bias (one when all heads share it, else `n_predict`) and calls
    `reset_parameters` at the end of its constructor. Weights that several heads share are held once; files hold a copy
    for each head.
    """

    head: nn.ModuleList

    def __init__(self, config: SpeculatorConfig) -> None:
        super().__init__()
        self.config = config
        self.n_predict = config.n_predict

    @classmethod
    def from_config(cls: type[SpeculatorT], config: SpeculatorConfig) -> SpeculatorT:
        """A freshly initialised speculator of the class that belongs to the type of `config`.

        Raises:
            ConfigError: no speculator, or none below `cls`, belongs to the type of `config`.
        """
        return _model_class(cls, config)(config)

    def begin(self, hidden_states: torch.Tensor) -> State:
        """The state before the first head, from hidden states [..., H]."""
        return (scale_hidden_states(hidden_states) if self.config.scale_input else hidden_states,)

    @abstractmethod
    def step(self, state: State, tokens: torch.Tensor, head_index: int) -> tuple[State, torch.Tensor]:
        """One head: reads `tokens` [...] int64; returns the next state and the output [..., D] for `head_weight`."""

    @abstractmethod
    def init_std(self, weight: torch.Tensor) -> float:
        """Standard deviation with which `reset_parameters` draws a linear or embedding weight."""

    def tied_copies(self) -> dict[str, str]:
        """Modules that files hold as copies of a shared one: `{copy: shared}`, such as `{"head.1": "head.0"}`."""
        return {f"head.{i}": "head.0" for i in range(1, self.n_predict)} if self.heads_are_tied else {}

    def file_only_tensors(self) -> dict[str, tuple[int, ...]]:
        """Tensors that the file format has although this configuration never reads them: `{name: shape}`."""
        return {}

    @property
    def heads_are_tied(self) -> bool:
        return len(self.head) == 1

    def head_weight(self, head_index: int) -> nn.Parameter:
        """The vocabulary matrix [V, D] of a head."""
        weight = for_head(self.head, head_index).weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of all heads with the true tokens as input.

        Args:
            hidden_states: [B, S, H]
            tokens: [B, S + n_predict] int64; `tokens[:, t]` is the token that `hidden_states[:, t]` predicts, and head
                i at position t reads `tokens[:, t + i]`

        Returns:
            [n_predict, B, S, V]; entry [i, :, t] predicts `tokens[:, t + i + 1]`
        """
        length = hidden_states.shape[1]
        if tokens.shape[1] < length + self.n_predict - 1:
            raise ValueError(
                f"tokens must be [B, S + n_predict] = [{hidden_states.shape[0]}, {length + self.n_predict}], "
                f"not {list(tokens.shape)}."
            )
        state = self.begin(hidden_states)
        logits = []
        for i in range(self.n_predict):
            state, output = self.step(state, tokens[:, i : i + length], i)
            logits.append(for_head(self.head, i)(output))
        return torch.stack(logits)

    @torch.no_grad()
    def draft(self, hidden_states: torch.Tensor, last_token: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Greedy draft tokens [B, num_tokens] after `last_token`.

        Args:
            hidden_states: [B, H] of the position that predicted `last_token`; cast to the type of the weights
            last_token: [B] int64
            num_tokens: 1 to `n_predict`

        Raises:
            ConfigError: `num_tokens` is out of range.
        """
        if not 1 <= num_tokens <= self.n_predict:
            raise ConfigError(f"num_tokens must be from 1 to n_predict ({self.n_predict}), not {num_tokens}.")
        state = self.begin(hidden_states.to(self.head_weight(0).dtype))
        token = last_token
        drafted = []
        for i in range(num_tokens):
            state, output = self.step(state, token, i)
            token = for_head(self.head, i)(output).argmax(-1)
            drafted.append(token)
        return torch.stack(drafted, dim=1)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights; the same `generator` state gives the same weights on every device."""
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                std = self.init_std(module.weight)
                if generator is None:
                    module.weight.normal_(0, std)
                else:
                    drawn = torch.empty(module.weight.shape, dtype=torch.float32, device=generator.device)
                    module.weight.copy_(drawn.normal_(0, std, generator=generator))

    def canonical_state_dict(self, tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
        """Turn tensors under the file format's names into this module's own; `source` is named in errors.

        Raises:
            CheckpointError: tensors are missing, unexpected, of the wrong shape, or tied copies differ.
        """
        ignored = self.file_only_tensors()
        named = {name: tensor for name, tensor in serialization.strip_prefix(tensors).items() if name not in ignored}
        expected = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        return serialization.merge_tied_copies(named, expected, self.tied_copies(), source)

    def export_state_dict(self, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """This module's tensors under the file format's names: on the CPU, every tied copy with its own memory.

        `state_dict` stands in for the module's own where its parameters are sharded: whole tensors, same names.

        Raises:
            CheckpointError: a tensor is sharded or has no data.
        """
        own = serialization.plain_tensors(self.state_dict() if state_dict is None else state_dict)
        exported = serialization.expand_tied_copies(own, self.tied_copies())
        dtype = next(iter(own.values())).dtype
        unused = {name: torch.zeros(shape, dtype=dtype) for name, shape in self.file_only_tensors().items()}
        return exported | unused

    def save_pretrained(
        self, path: str | os.PathLike[str], *, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write `config.json`, `model.safetensors` and `pytorch_model.bin` to the folder `path`.

        `state_dict` is as in `export_state_dict`.
        """
        serialization.write_folder(path, self.config.to_dict(), self.export_state_dict(state_dict))

    @classmethod
    def from_pretrained(
        cls: type[SpeculatorT],
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> SpeculatorT:
        """Load a speculator folder or a folder that contains one as `speculator`; `dtype` None keeps the file's.

        Raises:
            MissingFileError: the folder, its `config.json` or its weights are not there.
            CheckpointError: a file is damaged, does not fit its `config.json`, or holds another kind of speculator.
        """
        folder = serialization.find_folder(path)
        config_file = folder / serialization.CONFIG_NAME
        try:
            config = SpeculatorConfig.from_dict(serialization.read_config(config_file))
            model_class = _model_class(cls, config)
        except ConfigError as error:
            raise CheckpointError(f"{config_file} is not usable: {error}") from error
        # Without storage a parameter that the file forgot could not pass for a loaded one.
        with torch.device("meta"):
            speculator = model_class(config)
        weights_file, tensors = serialization.read_weights(folder)
        own = speculator.canonical_state_dict(tensors, str(weights_file))
        loaded = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in own.items()}
        speculator.load_state_dict(loaded, strict=True, assign=True)
        return speculator


def _model_class(wanted: type[SpeculatorT], config: SpeculatorConfig) -> type[SpeculatorT]:
    model_class = _MODEL_CLASSES.get(type(config))
    if model_class is None:
        raise ConfigError(f"{type(config).__name__} has no speculator: register one with @register_speculator.")
    if not issubclass(model_class, wanted):
        raise ConfigError(
            f"architectures {config.architectures[0]} is a {model_class.__name__}, not a {wanted.__name__}."
        )
    return model_class
