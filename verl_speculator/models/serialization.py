"""Speculator folders on disk: `config.json`, `model.safetensors`, `pytorch_model.bin`, and how names in them map.

Whoever reads a folder may have it from a stranger, or from a disk that lost some bits. So everything in it has bounds,
and `model.safetensors` carries in its metadata a checksum of each tensor and the `config.json` that it was written
with. Files that other projects wrote carry neither, and are read without.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from verl_speculator.errors import CheckpointError, MissingFileError

CONFIG_NAME = "config.json"
SAFETENSORS_NAME = "model.safetensors"
BIN_NAME = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
# Whole files and the parts of sharded ones.
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin", f"*{INDEX_SUFFIX}")
SUBFOLDER = "speculator"
# In a run's folder: the name of the checkpoint that did best in validation.
BEST_FILE = "best_checkpoint.txt"
PREFIX = "speculator."
MAX_NAMES_IN_ERROR = 5

# Far above any real file, and little enough to be read and looked through in a moment.
_MAX_JSON_BYTES = 4 * 2**20
# What a weights file may hold beyond its tensors: names, padding, an unread tensor of another engine.
_MAX_EXTRA_BYTES = 64 * 2**20
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_METADATA_KEY = "verl_speculator"
# Keys of `config.json` that may be edited later: they do not change what the weights compute. (Without
# `speculators_model_type` a speculator is found by its `architectures`.)
_FREE_KEYS = (
    *("base_model_name_or_path", "base_model_archs", "torch_dtype", "transformers_version"),
    "speculators_model_type",
)

Tensors = dict[str, torch.Tensor]


class Weights(NamedTuple):
    """The tensors of a folder, on the CPU and under the file's own names.

    Attributes:
        file: Where they come from: a weights file, or the index of a sharded one.
        written_with: The `config.json` that they were written with, as far as it decides what they compute; empty
            where the file does not say.
    """

    file: Path
    tensors: Tensors
    written_with: dict[str, Any]


def find_folder(path: str | os.PathLike[str]) -> Path:
    """`path/speculator` where there is one (as in a global_step_N), else `path`; it holds a `config.json`.

    Of a run's folder that names its best checkpoint it is that one's.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder; a speculator folder holds {CONFIG_NAME} and weights.")
    if (folder / BEST_FILE).is_file():
        folder = folder / (folder / BEST_FILE).read_text().strip()
    inner = folder / SUBFOLDER
    if inner.is_dir():
        folder = inner
    if not (folder / CONFIG_NAME).is_file():
        raise MissingFileError(f"{folder} holds no {CONFIG_NAME}, so it is not a speculator folder.")
    return folder


def read_config(file: Path) -> dict[str, Any]:
    values = _read_json(file)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(values).__name__}.")
    return values


def find_weights(folder: Path) -> Path:
    """The weights file of a speculator's folder, or the index of a sharded one; safetensors comes first.

    Raises:
        MissingFileError: The folder holds neither.
    """
    names = [name + suffix for name in (SAFETENSORS_NAME, BIN_NAME) for suffix in ("", INDEX_SUFFIX)]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise MissingFileError(f"{folder} holds no weights: neither {SAFETENSORS_NAME} nor {BIN_NAME}.")
    return found


def read_weights(folder: Path, max_bytes: int | None = None) -> Weights:
    """What the file of `find_weights` holds.

    Args:
        max_bytes: What the tensors of this folder's configuration can take at most; larger files are not read.

    Raises:
        MissingFileError: A file is not there.
        CheckpointError: A file is damaged, too large, or holds something else than tensors by name.
    """
    file = find_weights(folder)
    if not file.name.endswith(INDEX_SUFFIX):
        return Weights(file, *_read_file(file, max_bytes))
    values = _read_json(file)
    file_of = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise CheckpointError(f"{file} is not a readable index: it must have a weight_map of names to file names.")
    tensors: Tensors = {}
    for name in sorted(set(file_of.values())):
        part = file.parent / name
        if Path(name).name != name or "\0" in name or not part.is_file():
            raise MissingFileError(f"{file} names the file {name[:100]!r}, which is not beside it.")
        tensors |= _read_file(part, max_bytes)[0]
        if max_bytes is not None:
            max_bytes -= part.stat().st_size
    _reject(str(file), "names tensors that its files lack", (name for name in file_of if name not in tensors))
    return Weights(file, tensors, {})


def check_written_with(weights: Weights, values: Mapping[str, Any], config_file: Path) -> None:
    """Raise CheckpointError if the contents of `config.json` are not those that the weights were written with."""
    for key, was in weights.written_with.items():
        if values.get(key) != was:
            raise CheckpointError(
                f"{config_file} was changed after {weights.file.name} was written: {key} must be {json.dumps(was)}, "
                f"not {json.dumps(values.get(key))[:100]}."
            )


def strip_prefix(tensors: Mapping[str, torch.Tensor], source: str) -> Tensors:
    stripped = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors):
        twice = (name for name in tensors if name.startswith(PREFIX) and name.removeprefix(PREFIX) in tensors)
        _reject(source, "has tensors with and without the prefix of their names", twice)
    return stripped


def merge_tied_copies(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    tied_copies: Mapping[str, str],
    source: str,
) -> Tensors:
    """The tensors named in `expected`, from a set with all tied copies or with none of them.

    Args:
        tensors: Under the file format's names.
        expected: Those that are held once, on any device: their shapes count, and which are floating-point numbers.
        tied_copies: `{copy: shared}` module names.
        source: What errors call the origin of the tensors.

    Raises:
        CheckpointError: Tensors are missing, unexpected, of the wrong shape or kind, or tied copies differ.
    """
    copies = copy_names(expected, tied_copies)
    written_out = {copies[name] for name in tensors if name in copies}
    required = [*expected, *(copy for copy, shared in copies.items() if shared in written_out)]
    _reject(source, "lacks tensors", (name for name in required if name not in tensors))
    check_tensors(tensors, expected, copies, source)
    _reject(
        source,
        "has tied copies that differ although tie_weights or tie_lstm_embs is true",
        (
            f"{name} and {copies[name]}"
            for name in tensors
            if name in copies and not torch.equal(tensors[name], tensors[copies[name]])
        ),
    )
    return {name: tensors[name] for name in expected}


def check_tensors(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    copies: Mapping[str, str],
    source: str,
) -> None:
    """Raise CheckpointError for tensors that are not `expected`, or of another shape or kind.

    Args:
        copies: `{copy: shared}`, other names that tensors of `expected` may have.
    """
    _reject(source, "has unexpected tensors", (name for name in tensors if name not in expected and name not in copies))
    wanted = {name: expected[copies.get(name, name)] for name in tensors}
    _reject(
        source,
        "has tensors that do not fit its config.json",
        (
            f"{name} {list(tensor.shape)} instead of {list(wanted[name].shape)}"
            for name, tensor in tensors.items()
            if tensor.shape != wanted[name].shape
        ),
    )
    _reject(
        source,
        "has tensors of a type that cannot be used",
        (f"{name} {tensor.dtype}" for name, tensor in tensors.items() if not _same_kind(tensor, wanted[name])),
    )


def copy_names(shared_names: Iterable[str], tied_copies: Mapping[str, str]) -> dict[str, str]:
    """`{copy: shared}` of tensors, from `{copy: shared}` of the modules that hold them."""
    names = list(shared_names)
    return {
        copy + name.removeprefix(shared): name
        for copy, shared in tied_copies.items()
        for name in names
        if name.startswith(f"{shared}.")
    }


def plain_tensors(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> Tensors:
    """Contiguous copies on the CPU, floating-point ones of type `dtype`; sharded and meta tensors are refused."""
    _reject(
        "the speculator to save",
        "has parameters that are not full tensors with data",
        (name for name, tensor in tensors.items() if hasattr(tensor, "full_tensor") or tensor.is_meta),
    )
    return {
        name: tensor.detach().to(
            "cpu",
            dtype if tensor.is_floating_point() else tensor.dtype,
            copy=True,
            memory_format=torch.contiguous_format,
        )
        for name, tensor in tensors.items()
    }


def write_folder(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    copies: Collection[str] = (),
    pytorch_bin: bool = True,
) -> None:
    """Write a speculator's folder; each file appears under its name only when complete, `config.json` last.

    Args:
        config: The contents of `config.json`.
        tensors: Under the file format's names. Those that share memory are written once to `pytorch_model.bin`.
        copies: Names to leave out of `model.safetensors`, which cannot share: our reader knows what they are copies of.
        pytorch_bin: Also write `pytorch_model.bin`.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # Where every tensor is wanted, one that shares another's memory needs its own: safetensors would refuse it.
    kept: Tensors = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if name not in copies:
            kept[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
    facts = {
        "checksums": {name: checksum(tensor) for name, tensor in kept.items()},
        "config": {key: value for key, value in config.items() if key not in _FREE_KEYS},
    }
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(facts)}
    _write(folder / SAFETENSORS_NAME, lambda file: save_file(kept, file, metadata=metadata))
    if pytorch_bin:
        _write(folder / BIN_NAME, lambda file: torch.save(dict(tensors), file))
    write_config(folder, config)


def write_config(path: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Write the contents of `config.json` into a folder."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    _write(folder / CONFIG_NAME, lambda file: file.write_text(text, encoding="utf-8"))


def checksum(tensor: torch.Tensor) -> int:
    """The CRC-32 of a CPU tensor's shape, type and bytes; it finds any change of up to 32 neighbouring bits."""
    head = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, head)


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


def _read_json(file: Path) -> object:
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, and such a file has a few thousand.")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        # Python goes on, after a semicolon, with what a programmer could do.
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise CheckpointError(f"{file} is not readable JSON: {reason}") from error


def _read_file(file: Path, max_bytes: int | None) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of one file, and the configuration that it was written with."""
    most = None if max_bytes is None else max_bytes + _MAX_EXTRA_BYTES
    try:
        _check_size(file, most)
        tensors, facts = _read_safetensors(file) if file.suffix == ".safetensors" else (_read_bin(file, most), {})
    except CheckpointError:
        raise
    except Exception as error:
        # Damaged files end in a dozen exception types of pickle, zipfile, torch and safetensors.
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file} is damaged or not a weights file: {reason}") from error
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{file} must hold tensors by name and nothing else.")
    checksums = facts.get("checksums", {})
    _reject(
        str(file),
        "is damaged, tensors have changed since it was written",
        (name for name in {**tensors, **checksums} if checksums and not _is_intact(name, tensors, checksums)),
    )
    return dict(tensors), facts.get("config", {})


def _is_intact(name: str, tensors: Mapping[str, torch.Tensor], checksums: Mapping[str, int]) -> bool:
    return name in tensors and name in checksums and checksum(tensors[name]) == checksums[name]


def _read_safetensors(file: Path) -> tuple[Tensors, dict[str, Any]]:
    # Copied out of the mapped file: it may be replaced while the tensors are in use.
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
        facts = json.loads((opened.metadata() or {}).get(_METADATA_KEY, "{}"))
    if not isinstance(facts, dict) or not all(isinstance(value, dict) for value in facts.values()):
        raise CheckpointError(f"{file} is damaged: its metadata is not what was written.")
    return tensors, facts


def _read_bin(file: Path, most: int | None) -> Any:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            # What it unpacks to, should a stranger have compressed it.
            _check_size(file, most, sum(record.file_size for record in archive.infolist()))
            # torch writes checksums of its records and does not look at them.
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{file} is damaged, {damaged[:100]} in it has changed since it was written.")
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_size(file: Path, most: int | None, size: int | None = None) -> None:
    size = file.stat().st_size if size is None else size
    if most is not None and size > most:
        raise CheckpointError(f"{file} holds {size} bytes, more than the tensors of its config.json can take.")


def _same_kind(tensor: torch.Tensor, wanted: torch.Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.dtype in _FLOATS if wanted.is_floating_point() else tensor.dtype == wanted.dtype


def _reject(source: str, problem: str, found: Iterable[str]) -> None:
    names = list(found)
    if names:
        # A stranger's file may have names of any length.
        shown = ", ".join(name[:200] for name in names[:MAX_NAMES_IN_ERROR])
        more = len(names) - MAX_NAMES_IN_ERROR
        raise CheckpointError(f"{source} {problem}: {shown}{f' and {more} more' if more > 0 else ''}.")
