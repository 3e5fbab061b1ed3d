"""Speculator folders on disk: `config.json`, `model.safetensors`, `pytorch_model.bin`, and how names in them map."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from verl_speculator.errors import CheckpointError, MissingFileError

CONFIG_NAME = "config.json"
SAFETENSORS_NAME = "model.safetensors"
BIN_NAME = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
# Whole files and the parts of sharded ones.
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin", f"*{INDEX_SUFFIX}")
SUBFOLDER = "speculator"
PREFIX = "speculator."
MAX_NAMES_IN_ERROR = 5

Tensors = dict[str, torch.Tensor]


def find_folder(path: str | os.PathLike[str]) -> Path:
    """`path/speculator` where there is one (as in a global_step_N), else `path`; it holds a `config.json`."""
    folder = Path(path)
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder; a speculator folder holds {CONFIG_NAME} and weights.")
    inner = folder / SUBFOLDER
    if inner.is_dir():
        folder = inner
    if not (folder / CONFIG_NAME).is_file():
        raise MissingFileError(f"{folder} holds no {CONFIG_NAME}, so it is not a speculator folder.")
    return folder


def read_config(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(values).__name__}.")
    return values


def find_weights(folder: Path) -> Path:
    """The weights file of a speculator's folder, or the index of a sharded one; safetensors comes first.

    Raises:
        MissingFileError: the folder holds neither.
    """
    names = [name + suffix for name in (SAFETENSORS_NAME, BIN_NAME) for suffix in ("", INDEX_SUFFIX)]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise MissingFileError(f"{folder} holds no weights: neither {SAFETENSORS_NAME} nor {BIN_NAME}.")
    return found


def read_weights(folder: Path) -> tuple[Path, Tensors]:
    """The file of `find_weights` and its tensors, on the CPU and under the file's own names."""
    file = find_weights(folder)
    read = load_file if file.name.startswith(SAFETENSORS_NAME) else _read_bin
    return file, _read_shards(file, read) if file.name.endswith(INDEX_SUFFIX) else _read_or_explain(file, read)


def strip_prefix(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def merge_tied_copies(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, tuple[int, ...]],
    tied_copies: Mapping[str, str],
    source: str,
) -> Tensors:
    """The tensors named in `expected`, from a set with all tied copies or with none of them.

    Args:
        tensors: under the file format's names
        expected: `{name: shape}` of the tensors that are held once
        tied_copies: `{copy: shared}` module names
        source: what errors call the origin of the tensors

    Raises:
        CheckpointError: tensors are missing, unexpected, of the wrong shape, or tied copies differ.
    """
    copies = copy_names(expected, tied_copies)
    written_out = {copies[name] for name in tensors if name in copies}
    required = [*expected, *(copy for copy, shared in copies.items() if shared in written_out)]
    _reject(source, "lacks tensors", (name for name in required if name not in tensors))
    _reject(source, "has unexpected tensors", (name for name in tensors if name not in expected and name not in copies))
    shapes = {name: expected[copies.get(name, name)] for name in tensors}
    _reject(
        source,
        "has tensors that do not fit its config.json",
        (
            f"{name} {list(tensor.shape)} instead of {list(shapes[name])}"
            for name, tensor in tensors.items()
            if tuple(tensor.shape) != shapes[name]
        ),
    )
    _reject(
        source,
        "has tied copies that differ although tie_weights or tie_lstm_embs is true",
        (f"{name} and {copies[name]}" for name in tensors if name in copies and not _same(tensors, name, copies[name])),
    )
    return {name: tensors[name] for name in expected}


def expand_tied_copies(tensors: Mapping[str, torch.Tensor], tied_copies: Mapping[str, str]) -> Tensors:
    """`tensors` and every tied copy, each with its own memory as safetensors wants it."""
    copies = {copy: tensors[shared].clone() for copy, shared in copy_names(tensors, tied_copies).items()}
    return {**tensors, **copies}


def copy_names(shared_names: Iterable[str], tied_copies: Mapping[str, str]) -> dict[str, str]:
    """`{copy: shared}` of tensors, from `{copy: shared}` of the modules that hold them."""
    names = list(shared_names)
    return {
        copy + name.removeprefix(shared): name
        for copy, shared in tied_copies.items()
        for name in names
        if name.startswith(f"{shared}.")
    }


def plain_tensors(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Contiguous copies on the CPU; sharded and meta tensors are refused."""
    _reject(
        "the speculator to save",
        "has parameters that are not whole tensors with data",
        (name for name, tensor in tensors.items() if hasattr(tensor, "full_tensor") or tensor.is_meta),
    )
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def write_folder(path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write the three files; each appears under its name only when complete, `config.json` last."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / SAFETENSORS_NAME, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    _write(folder / BIN_NAME, lambda file: torch.save(tensors, file))
    text = json.dumps(config, indent=2) + "\n"
    _write(folder / CONFIG_NAME, lambda file: file.write_text(text, encoding="utf-8"))


def _write(file: Path, write: Callable[[Path], object]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        # safetensors makes files that only their owner can read; a server often runs as someone else.
        temporary.chmod(mode)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _read_or_explain(file: Path, read: Callable[[Path], object]) -> Tensors:
    try:
        tensors = read(file)
    except Exception as error:
        # Damaged files end in a dozen exception types of pickle, zipfile, torch and safetensors.
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file} is damaged or not a weights file: {reason}") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{file} must hold tensors by name and nothing else.")
    return dict(tensors)


def _read_shards(index: Path, read: Callable[[Path], object]) -> Tensors:
    """All tensors that an index of Hugging Face's format names, from the files beside it."""
    try:
        file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{index} is not a readable index with a weight_map: {error}") from error
    tensors: Tensors = {}
    for name in sorted(set(file_of.values())):
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise MissingFileError(f"{index} names the file {name!r}, which is not beside it.")
        tensors |= _read_or_explain(file, read)
    _reject(str(index), "names tensors that its files lack", (name for name in file_of if name not in tensors))
    return tensors


def _read_bin(file: Path) -> object:
    return torch.load(file, map_location="cpu", weights_only=True)


def _same(tensors: Mapping[str, torch.Tensor], first: str, second: str) -> bool:
    return torch.equal(tensors[first], tensors[second])


def _reject(source: str, problem: str, found: Iterable[str]) -> None:
    names = list(found)
    if names:
        shown = ", ".join(names[:MAX_NAMES_IN_ERROR])
        more = len(names) - MAX_NAMES_IN_ERROR
        raise CheckpointError(f"{source} {problem}: {shown}{f' and {more} more' if more > 0 else ''}.")
