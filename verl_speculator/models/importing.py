"""Importing what a user names: a module, an attribute of one, or something in a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

from verl_speculator.errors import ConfigError


def import_attribute(name: str, key: str) -> Any:
    """What a full dotted name stands for.

    Args:
        key: The setting that the name was given with; errors begin with it.

    Raises:
        ConfigError: It is no full name, or cannot be imported.
    """
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise ConfigError(f"{key} must be a full dotted name such as package.module.Class, got {name!r}")
    module = _imported(module_name, repr(name), key)
    if not hasattr(module, attribute):
        raise ConfigError(f"{key}: {name!r} cannot be imported (module {module_name} has no {attribute!r})")
    return getattr(module, attribute)


def import_file(path: Path, key: str) -> ModuleType:
    """A Python file as a module, which runs once however often it is asked for; errors as in `import_attribute`."""
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {str(path)!r}")
    # A stable module name lets Ray and pickle find the same class in every process that loads the file.
    module_name = f"verl_speculator_file_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):x}"
    module = sys.modules.get(module_name)
    if module is None:
        module_spec = importlib.util.spec_from_file_location(module_name, path)
        if module_spec is None or module_spec.loader is None:
            raise ConfigError(f"{key}: {str(path)!r} is not a Python file")
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_name] = module
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise _cannot_import(repr(str(path)), key, error) from error
    return module


def import_code(name: str, key: str) -> ModuleType:
    """The module that a file's path or a dotted name stands for; errors as in `import_attribute`."""
    if name.endswith(".py") or "/" in name or Path(name).is_file():
        return import_file(Path(name).expanduser(), key)
    return _imported(name, repr(name), key)


def _imported(module_name: str, asked: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        # A user's module is run here, and can fail in any way.
        raise _cannot_import(asked, key, error) from error


def _cannot_import(asked: str, key: str, error: Exception) -> ConfigError:
    reason = f"{type(error).__name__}: {error}".replace("\n", " ")
    return ConfigError(f"{key}: {asked} cannot be imported ({reason})")
