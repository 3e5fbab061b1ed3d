"""`Speculator`: the configuration, files and registration of a draft model, whatever its layers are."""

from __future__ import annotations

import math
import os
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import nn

from verl_speculator.errors import CheckpointError, ConfigError
from verl_speculator.models import serialization
from verl_speculator.models.config import _BY_NAME, _CONFIG_CLASSES, SpeculatorConfig, config_class_named
from verl_speculator.models.layers import RMSNorm

SpeculatorT = TypeVar("SpeculatorT", bound="Speculator")

_MODEL_CLASSES: dict[type[SpeculatorConfig], type[Speculator]] = {}


def register_speculator(config_class: type[SpeculatorConfig]) -> Callable[[type[SpeculatorT]], type[SpeculatorT]]:
    """Class decorator: `Speculator.from_config` builds the decorated class from a `config_class`.

    `Speculator.register` does the same for an algorithm with a name, and checks more.
    """

    def register(model_class: type[SpeculatorT]) -> type[SpeculatorT]:
        _MODEL_CLASSES[config_class] = model_class
        return model_class

    return register


class Fused(NamedTuple):
    """A tensor that the file format holds in pieces of equal size.

    Attributes:
        names: The pieces' names in files, in the order in which they lie in the tensor.
        dim: The dimension along which they lie side by side.
    """

    names: tuple[str, ...]
    dim: int


class Speculator(nn.Module, ABC):
    """A draft model: it proposes up to `n_predict` tokens after the one that the base model has just given.

    How it drafts is its subclass's: `ChainSpeculator` is one family. What is here holds for every family. A subclass
    calls `reset_parameters` at the end of its constructor, and says with `tied_copies`, `fused_tensors` and
    `file_only_tensors` how its files differ from its modules: weights that several heads share are held once, while
    the file formats of this field hold a copy for each head.
    """

    # What `register` asks of a class, beside its abstract methods.
    required_methods: ClassVar[tuple[str, ...]] = ("forward", "from_training_args", "get_trainer_kwargs")

    def __init__(self, config: SpeculatorConfig) -> None:
        super().__init__()
        self.config = config
        self.n_predict = config.n_predict

    @classmethod
    def register(cls, name: str) -> Callable[[type[SpeculatorT]], type[SpeculatorT]]:
        """Class decorator: the algorithm `name`, whose configuration is registered, drafts with the decorated class.

        A chain of heads has all it needs from `ChainSpeculator`. Any other model has `forward`, the class method
        `from_training_args(verifier_config, **kwargs)` and the static method `get_trainer_kwargs(args)`.

        Raises:
            ConfigError: The name has no configuration or has a model already, or the class lacks something.
        """

        def decorate(model_class: type[SpeculatorT]) -> type[SpeculatorT]:
            if not (isinstance(model_class, type) and issubclass(model_class, Speculator)):
                raise ConfigError(f"speculator {name!r}: {model_class!r} must be a subclass of Speculator.")
            config_class = _BY_NAME.get(name)
            if config_class is None:
                raise ConfigError(
                    f"speculator {name!r} has no configuration: put @SpeculatorConfig.register({name!r}) on a subclass "
                    "of SpeculatorConfig before its model."
                )
            taken = _MODEL_CLASSES.get(config_class)
            if taken is not None:
                raise ConfigError(
                    f"speculator {name!r} has a model already, {taken.__module__}.{taken.__qualname__}: "
                    "choose another name."
                )
            missing = sorted(model_class.__abstractmethods__)
            for method in model_class.required_methods:
                if getattr(model_class, method, None) in (None, getattr(nn.Module, method, None)):
                    missing.append(method)
            if missing:
                raise ConfigError(f"speculator {name!r}: {model_class.__name__} must define {', '.join(missing)}.")
            if not config_class.architectures:
                config_class.architectures = (model_class.__name__,)
                _CONFIG_CLASSES.setdefault(model_class.__name__, config_class)
            return register_speculator(config_class)(model_class)

        return decorate

    @classmethod
    def get_class(cls: type[SpeculatorT], name: str) -> type[SpeculatorT]:
        """The model of the algorithm `name`.

        Raises:
            ConfigError: There is none, it has a configuration only, or it is no `cls`.
        """
        config_class = config_class_named(name)
        model_class = _MODEL_CLASSES.get(config_class)
        if model_class is None:
            raise ConfigError(
                f"speculator {name!r} has a configuration, {config_class.__name__}, and no model: "
                f"put @Speculator.register({name!r}) on one."
            )
        if not issubclass(model_class, cls):
            raise ConfigError(f"speculator {name!r} is a {model_class.__name__}, not a {cls.__name__}.")
        return model_class

    @classmethod
    def from_config(cls: type[SpeculatorT], config: SpeculatorConfig) -> SpeculatorT:
        """A freshly initialised speculator of the class that belongs to the type of `config`.

        Raises:
            ConfigError: No speculator, or none below `cls`, belongs to the type of `config`.
        """
        return _model_class(cls, config)(config)

    def init_std(self, weight: torch.Tensor) -> float:
        """Standard deviation with which `reset_parameters` draws a linear or embedding weight of a file."""
        return 0.02

    def tied_copies(self) -> dict[str, str]:
        """Modules that files hold as copies of a shared one: `{copy: shared}`, such as `{"head.1": "head.0"}`."""
        return {}

    def fused_tensors(self) -> dict[str, Fused]:
        """Parameters that files hold in pieces, or under another name: `{own name: pieces}`."""
        return {}

    def file_only_tensors(self) -> dict[str, tuple[int, ...]]:
        """Tensors that the file format has although this configuration never reads them: `{name: shape}`."""
        return {}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights; the same `generator` state gives the same weights on every device."""
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                # Piece by piece: the shape of a piece, not of what is fused, says how large its weights should be.
                for weight in self.file_views({f"{name}.weight": module.weight}).values():
                    std = self.init_std(weight)
                    if generator is None:
                        weight.normal_(0, std)
                    else:
                        drawn = torch.empty(weight.shape, dtype=torch.float32, device=generator.device)
                        weight.copy_(drawn.normal_(0, std, generator=generator))

    def file_views(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors under this module's own names, as views under the names of files; tied copies are not made."""
        fused = self.fused_tensors()
        views: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            names, dim = fused.get(name, Fused((name,), 0))
            views |= zip(names, tensor.chunk(len(names), dim), strict=True)
        return views

    def canonical_state_dict(self, tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
        """Turn tensors under the file format's names into this module's own; `source` is named in errors.

        Raises:
            CheckpointError: Tensors are missing, unexpected, of the wrong shape, or tied copies differ.
        """
        ignored = self.file_only_tensors()
        named = serialization.strip_prefix(tensors, source)
        named = {name: tensor for name, tensor in named.items() if name not in ignored}
        own = serialization.merge_tied_copies(named, self.file_views(self.state_dict()), self.tied_copies(), source)
        self.check_loaded(own, source)
        for name, (pieces, dim) in self.fused_tensors().items():
            own[name] = torch.cat([own.pop(piece) for piece in pieces], dim)
        return own

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Write tensors under the file format's names over the module's own, where these lie; returns the names.

        They may be some of a file's, as weights come in buckets. Nothing moves in memory: CUDA graphs that were
        captured with this module go on with the new values.

        Raises:
            CheckpointError: A tensor has an unknown name, another shape or kind; nothing was written then.
        """
        views = self.file_views(self.state_dict())
        copies = serialization.copy_names(views, self.tied_copies())
        ignored = self.file_only_tensors()
        given = serialization.strip_prefix(dict(weights), "the weights to load")
        given = {name: tensor for name, tensor in given.items() if name not in ignored}
        serialization.check_tensors(given, views, copies, "the set of weights to load")
        self.check_loaded(given, "the set of weights to load")
        for name, tensor in given.items():
            views[copies.get(name, name)].copy_(tensor)
        return set(given)

    def check_loaded(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        """Raise CheckpointError for values that the model cannot work with; names are those of the file format."""

    def export_state_dict(
        self, state_dict: Mapping[str, torch.Tensor] | None = None, *, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """This module's tensors under the file format's names, on the CPU. Tied copies share their memory.

        Args:
            state_dict: Stands in for the module's own where its parameters are sharded: full tensors, same names.
            dtype: The type of floating-point tensors; None keeps theirs.

        Raises:
            CheckpointError: A tensor is sharded or has no data.
        """
        views = self.file_views(self.state_dict() if state_dict is None else state_dict)
        exported = serialization.plain_tensors(views, dtype)
        file_dtype = next(tensor.dtype for tensor in exported.values() if tensor.is_floating_point())
        unused = {name: torch.zeros(shape, dtype=file_dtype) for name, shape in self.file_only_tensors().items()}
        copies = serialization.copy_names(exported, self.tied_copies())
        return exported | {copy: exported[shared] for copy, shared in copies.items()} | unused

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        pytorch_bin: bool = True,
    ) -> None:
        """Write `config.json`, `model.safetensors` and `pytorch_model.bin` to the folder `path`.

        Every weight is written once to each: `pytorch_model.bin` has the tied copies too, in the same memory, and
        `model.safetensors` leaves them out.

        Args:
            state_dict: As in `export_state_dict`.
            dtype: As in `export_state_dict`.
            pytorch_bin: False leaves out `pytorch_model.bin`.
        """
        tensors = self.export_state_dict(state_dict, dtype=dtype)
        copies = serialization.copy_names(tensors, self.tied_copies())
        serialization.write_folder(path, self.config.to_dict(), tensors, copies=copies, pytorch_bin=pytorch_bin)

    @classmethod
    def from_pretrained(
        cls: type[SpeculatorT],
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> SpeculatorT:
        """Load a speculator folder or a folder that contains one as `speculator`.

        Args:
            dtype: The type of its floating-point tensors; None keeps the file's. Others, such as a map of token ids,
                keep theirs in any case.

        Raises:
            MissingFileError: The folder, its `config.json` or its weights are not there.
            CheckpointError: A file is damaged, does not fit its `config.json`, or holds another kind of speculator.
        """
        folder = serialization.find_folder(path)
        config_file = folder / serialization.CONFIG_NAME
        values = serialization.read_config(config_file)
        try:
            config = SpeculatorConfig.from_dict(values)
            model_class = _model_class(cls, config)
        except ConfigError as error:
            raise CheckpointError(f"{config_file} is not usable: {error}") from error
        try:
            # Without storage a parameter that the file forgot could not pass for a loaded one.
            with torch.device("meta"):
                speculator = model_class(config)
        except Exception as error:
            # The layers may be another package's, which has errors of its own for values that it cannot use.
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise CheckpointError(f"{config_file} is not usable: no model can be built from it ({reason}).") from error
        views = speculator.file_views(speculator.state_dict())
        copies = serialization.copy_names(views, speculator.tied_copies())
        # Of the widest type, and with every tied copy written out, as other projects do.
        numbers = sum(view.numel() for view in views.values()) + sum(views[name].numel() for name in copies.values())
        numbers += sum(math.prod(shape) for shape in speculator.file_only_tensors().values())
        weights = serialization.read_weights(folder, torch.float64.itemsize * numbers)
        serialization.check_written_with(weights, values, config_file)
        own = speculator.canonical_state_dict(weights.tensors, str(weights.file))
        loaded = {
            name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=True)
            for name, tensor in own.items()
        }
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


def config_class_of(model_class: type[Speculator]) -> type[SpeculatorConfig]:
    """The configuration class that a model is registered with.

    Raises:
        ConfigError: It is not registered.
    """
    for config_class, registered in _MODEL_CLASSES.items():
        if registered is model_class:
            return config_class
    raise ConfigError(f"{model_class.__name__} is not registered: put @Speculator.register(NAME) on it.")
