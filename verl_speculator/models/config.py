"""The configuration of a speculator: what `config.json` in a speculator folder says."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from reprlib import repr as short
from typing import Any, ClassVar, TypeVar

from verl_speculator.errors import CheckpointError, ConfigError, nearest_name
from verl_speculator.models import serialization

ConfigT = TypeVar("ConfigT", bound="SpeculatorConfig")

TORCH_DTYPES = ("bfloat16", "float16", "float32", "float64")

# Far above any speculator. Beyond them building one takes minutes, or more memory than there is.
MAX_HEADS = 256
MAX_WIDTH = 2**20
MAX_LAYERS = 16
MAX_VOCAB_SIZE = 2**24

_CONFIG_CLASSES: dict[str, type[SpeculatorConfig]] = {}
_BY_NAME: dict[str, type[SpeculatorConfig]] = {}
# A folder in it is an algorithm of that name, loaded when it is asked for: it needs more than torch.
_OWN = "verl_speculator.algorithms"
ENTRY_POINTS = "verl_speculator.algorithms"


def parse_width(value: object, name: str) -> tuple[int, ...]:
    """Widths of a stack of layers: `1024` or `"1024"` is `(1024,)`, `"1024.2048"` is `(1024, 2048)`.

    Raises:
        ConfigError: `value` is not a positive integer or positive integers joined by dots.
    """
    if isinstance(value, float):
        # YAML reads an unquoted 1024.2048 as a number, and 1024.2050 would silently lose its last digit.
        raise ConfigError(
            f'{name} must be an integer or a quoted string such as "1024.2048", not the number {value!r}.'
        )
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    # Seven digits at most: MAX_WIDTH has so many, and Python refuses to read numbers of thousands.
    if isinstance(text, str) and re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,7})*", text) and text.count(".") < MAX_LAYERS:
        widths = tuple(int(width) for width in text.split("."))
        if all(0 < width <= MAX_WIDTH for width in widths):
            return widths
    raise ConfigError(
        f"{name} must be a positive integer of at most {MAX_WIDTH}, or up to {MAX_LAYERS} of them joined by dots such "
        f'as "1024.2048", not {short(value)}.'
    )


def require_positive_int(value: object, name: str, most: int = MAX_VOCAB_SIZE) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, not {short(value)}.")
    if value > most:
        raise ConfigError(f"{name} must be at most {most}, not {short(value)}.")


def require_bool(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, not {short(value)}.")


def require_one_of(value: object, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be {' or '.join(repr(choice) for choice in choices)}, not {short(value)}.")


@dataclass(kw_only=True)
class SpeculatorConfig:
    """Fields that every speculator has; a subclass adds those of its model.

    Attributes:
        architectures: A subclass's names. The first is written to `config.json`, all of them are recognised in one.
        torch_dtype: The type in which inference engines load the weights; it does not choose the training type.
        base_model_archs: Written when set, for engines that check which base model a speculator belongs to.

    Raises:
        ConfigError: A value that cannot work; the message begins with the name of its field.
    """

    architectures: ClassVar[tuple[str, ...]] = ()
    model_type: ClassVar[str] = "speculator"
    # The name under which `register` knows it.
    speculators_model_type: ClassVar[str] = ""
    # A dataclass of the settings that a training run may give, beside those that every run has.
    training_arguments: ClassVar[type | None] = None
    # Whether stock vLLM drafts with such a folder by itself, so that our plugin has to leave it alone.
    served_by_vllm: ClassVar[bool] = False

    base_model_name_or_path: str = ""
    input_hidden_dim: int
    vocab_size: int
    n_predict: int = field(default=5, metadata={"help": "tokens drafted ahead"})
    torch_dtype: str = field(default="bfloat16", metadata={"help": "the type in which engines load the weights"})
    base_model_archs: list[str] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for architecture in cls.__dict__.get("architectures", ()):
            _CONFIG_CLASSES[architecture] = cls

    @classmethod
    def register(cls, name: str) -> Callable[[type[ConfigT]], type[ConfigT]]:
        """Class decorator: the algorithm `name` is configured by the decorated class, which becomes a dataclass.

        Raises:
            ConfigError: The name is taken, or the class does not carry it as `speculators_model_type`.
        """

        def decorate(config_class: type[ConfigT]) -> type[ConfigT]:
            if not (isinstance(config_class, type) and issubclass(config_class, SpeculatorConfig)):
                raise ConfigError(f"speculator {name!r}: {config_class!r} must be a subclass of SpeculatorConfig.")
            taken = _BY_NAME.get(name)
            if taken is not None:
                raise ConfigError(
                    f"speculator {name!r} is registered already, by {taken.__module__}.{taken.__qualname__}: "
                    "choose another name."
                )
            if "__dataclass_fields__" not in config_class.__dict__:
                config_class = dataclass(kw_only=True)(config_class)
            if config_class.speculators_model_type != name:
                raise ConfigError(
                    f"speculator {name!r}: {config_class.__name__} must have speculators_model_type: str = {name!r}, "
                    f"not {config_class.speculators_model_type!r}."
                )
            _BY_NAME[name] = config_class
            return config_class

        return decorate

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        if not isinstance(self.base_model_name_or_path, str):
            raise ConfigError(
                f"base_model_name_or_path must be a model name or a path, not {short(self.base_model_name_or_path)}."
            )
        bounds = {"input_hidden_dim": MAX_WIDTH, "vocab_size": MAX_VOCAB_SIZE, "n_predict": MAX_HEADS}
        for name, most in bounds.items():
            require_positive_int(getattr(self, name), name, most)
        require_one_of(self.torch_dtype, TORCH_DTYPES, "torch_dtype")
        archs = self.base_model_archs
        if archs is not None and not (isinstance(archs, list) and all(isinstance(arch, str) for arch in archs)):
            raise ConfigError(f"base_model_archs must be a list of architecture names, not {short(archs)}.")

    def check_fits_base(self, hidden_size: int, vocab_size: int, speculator: str = "the speculator") -> None:
        """Refuse a base model that this speculator was not trained on, as far as sizes can tell.

        `vocab_size` counts the rows of `lm_head`, padding included: the speculator's own vocabulary matrix has as many.

        Args:
            speculator: What errors call it, such as `--speculator: the one in 'folder'`.

        Raises:
            ConfigError: The hidden size or the vocabulary differs.
        """
        for name, own, wanted in (
            ("hidden size", self.input_hidden_dim, hidden_size),
            ("vocabulary size", self.vocab_size, vocab_size),
        ):
            if own != wanted:
                base = f" ({self.base_model_name_or_path})" if self.base_model_name_or_path else ""
                raise ConfigError(
                    f"{speculator} was trained for {name} {own} and the base model has {wanted}; "
                    f"give the base model that it was trained on{base}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json` into the folder `path`, which `from_pretrained` reads."""
        serialization.write_config(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The contents of `config.json` in the form that other engines read.

        Of a subclass that does not say otherwise these are all of its fields, under their names.
        """
        values = self.common_values()
        if self.speculators_model_type:
            values = {"speculators_model_type": self.speculators_model_type, **values}
        common = {one.name for one in dataclasses.fields(SpeculatorConfig)}
        own = (one.name for one in dataclasses.fields(self) if one.init and one.name not in common)
        return values | {name: getattr(self, name) for name in own}

    def common_values(self) -> dict[str, Any]:
        """The part of `config.json` that every speculator has."""
        values: dict[str, Any] = {
            "architectures": [self.architectures[0]],
            "model_type": self.model_type,
            "base_model_name_or_path": self.base_model_name_or_path,
            "input_hidden_dim": self.input_hidden_dim,
            "vocab_size": self.vocab_size,
            "n_predict": self.n_predict,
            "torch_dtype": self.torch_dtype,
        }
        if self.base_model_archs is not None:
            values["base_model_archs"] = list(self.base_model_archs)
        return values

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """Read the contents of a `config.json`, written here or by another engine.

        On `SpeculatorConfig` the key `speculators_model_type` chooses the subclass, or `architectures` where there is
        none. Keys that a speculator does not have are ignored, except one that looks like a misspelt field.

        Raises:
            ConfigError: An unknown architecture, a missing key, a misspelt key or a value that cannot work.
        """
        name = values.get("speculators_model_type")
        config_class = cls._class_for(values.get("architectures")) if name is None else cls._class_named(name)
        try:
            fields = config_class._fields_from_file(values)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ConfigError(f"a value has another type than a {config_class.__name__} can have ({error}).") from error
        known = [one for one in dataclasses.fields(config_class) if one.init]
        names = [one.name for one in known]
        absent = [name for name in names if name not in fields]
        for key in fields:
            near = None if key in names else nearest_name(key, absent, cutoff=0.85)
            if near:
                raise ConfigError(f"{key} is not a speculator setting; {near} is.")
        for needed in known:
            if needed.default is dataclasses.MISSING and needed.name in absent:
                raise ConfigError(f"{needed.name} is missing and must be a positive integer.")
        return config_class(**{name: fields[name] for name in names if name in fields})

    @classmethod
    def from_pretrained(cls: type[ConfigT], path: str | os.PathLike[str]) -> ConfigT:
        """The configuration in a speculator folder, or in a folder that contains one as `speculator`.

        Raises:
            MissingFileError: The folder or its `config.json` is not there.
            CheckpointError: The file is damaged or not usable.
        """
        config_file = serialization.find_folder(path) / serialization.CONFIG_NAME
        try:
            return cls.from_dict(serialization.read_config(config_file))
        except ConfigError as error:
            raise CheckpointError(f"{config_file} is not usable: {error}") from error

    @classmethod
    def _class_named(cls: type[ConfigT], name: object) -> type[ConfigT]:
        found = config_class_named(str(name))
        if not issubclass(found, cls):
            raise ConfigError(f"speculators_model_type must not be {name!r} where a {cls.__name__} is wanted.")
        return found

    @classmethod
    def _class_for(cls: type[ConfigT], architectures: object) -> type[ConfigT]:
        names = [architectures] if isinstance(architectures, str) else architectures
        if names is None and cls is not SpeculatorConfig:
            return cls
        known = ", ".join(sorted(_CONFIG_CLASSES))
        if not isinstance(names, list | tuple) or len(names) != 1 or names[0] not in [*_CONFIG_CLASSES]:
            raise ConfigError(f"architectures must hold one of {known}, not {short(architectures)}.")
        found = _CONFIG_CLASSES[names[0]]
        if not issubclass(found, cls):
            raise ConfigError(f"architectures must hold {' or '.join(cls.architectures)}, not {short(names[0])}.")
        return found

    @classmethod
    def _fields_from_file(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        fields = dict(values)
        if "torch_dtype" not in fields and "dtype" in fields:
            fields["torch_dtype"] = fields["dtype"]
        # transformers writes null for what nobody set.
        return {name: value for name, value in fields.items() if value is not None}


SpeculatorConfigBase = SpeculatorConfig


def config_class_named(name: str) -> type[SpeculatorConfig]:
    """The configuration class of the algorithm `name`, whose module is imported if it has not been.

    An algorithm of another package is found by an entry point of the group `verl_speculator.algorithms` whose name is
    the algorithm's and whose value is the module, or an object in it.

    Raises:
        ConfigError: Nothing is registered under that name; or the entry point's module fails or registers nothing.
    """
    if name not in _BY_NAME:
        if name in _own_algorithms():
            importlib.import_module(f"{_OWN}.{name}")
        for entry_point in entry_points(group=ENTRY_POINTS, name=name):
            where = f"the entry point {entry_point.name} = {entry_point.value} of the group {ENTRY_POINTS}"
            try:
                entry_point.load()
            except Exception as error:
                # Another package's code is run here, and can fail in any way.
                reason = f"{type(error).__name__}: {error}".replace("\n", " ")
                raise ConfigError(f"{where} cannot be loaded ({reason})") from error
            if name not in _BY_NAME:
                raise ConfigError(f"{where} registers no speculator {name!r}.")
    if name not in _BY_NAME:
        known = algorithm_names()
        near = nearest_name(name, known, cutoff=0.6)
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(known)}."
        raise ConfigError(f"there is no speculator {name!r}; {hint}")
    return _BY_NAME[name]


def algorithm_names() -> list[str]:
    """The algorithms that `config_class_named` finds."""
    return sorted({*_BY_NAME, *_own_algorithms(), *entry_points(group=ENTRY_POINTS).names})


def _own_algorithms() -> list[str]:
    spec = importlib.util.find_spec(_OWN)
    folders = (spec and spec.submodule_search_locations) or []
    return [module.name for module in pkgutil.iter_modules(folders) if module.ispkg]
