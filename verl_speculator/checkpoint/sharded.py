"""Sharded tensors as safetensors: every rank writes what it holds, and any number of ranks reads what it needs.

A folder has a `rank_N.safetensors` for each rank that wrote something. Its metadata says for every tensor in it how
large the full tensor is and where in it the piece lies. `torch.distributed.checkpoint` does as much, but keeps this in
a pickle: reading a stranger's checkpoint would run the stranger's code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from verl_speculator.errors import CheckpointError

_METADATA_KEY = "pieces"


class _Piece(NamedTuple):
    """A part of a full tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    full_shape: tuple[int, ...]


def save_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's pieces of `tensors`; every rank must call it with the same names.

    Plain tensors are taken to be the same on all ranks, and rank 0 writes them.
    """
    pieces: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, tensor in tensors.items():
        local, offset = _local_part(tensor)
        if local.numel() and _is_mine(tensor):
            # A copy of its own: safetensors refuses names that share memory.
            pieces[name] = local.detach().to("cpu", copy=True).contiguous()
            described[name] = {"full_shape": list(tensor.shape), "offset": list(offset)}
    folder.mkdir(parents=True, exist_ok=True)
    if pieces:
        metadata = {"format": "pt", _METADATA_KEY: json.dumps(described)}
        save_file(pieces, folder / f"rank_{dist.get_rank()}.safetensors", metadata=metadata)


@torch.no_grad()
def load_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's parts of `tensors` from the folder, however many ranks wrote it.

    Raises:
        CheckpointError: The folder lacks a tensor or a part of one, or one has another shape or type.
    """
    try:
        pieces = _find_pieces(folder)
        for name, tensor in tensors.items():
            local, offset = _local_part(tensor)
            filled = 0
            for piece in pieces.get(name, ()):
                if piece.full_shape != tuple(tensor.shape):
                    raise CheckpointError(f"{name} is {list(piece.full_shape)} instead of {list(tensor.shape)}")
                filled += _copy_overlap(piece, name, local, offset)
            if filled != local.numel() or (name not in pieces and tensor.numel()):
                raise CheckpointError(f"{name} is missing or not complete")
    except Exception as error:
        # A damaged file can be wrong in any way.
        raise CheckpointError(f"{folder} cannot be read, it is damaged or incomplete: {error}") from error


def _find_pieces(folder: Path) -> dict[str, list[_Piece]]:
    pieces: dict[str, list[_Piece]] = {}
    for file in sorted(folder.glob("rank_*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            described = json.loads((opened.metadata() or {})[_METADATA_KEY])
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                shape = tuple(opened.get_slice(name).get_shape())
                full_shape, offset = (tuple(map(int, described[name][key])) for key in ("full_shape", "offset"))
                if not len(shape) == len(offset) == len(full_shape):
                    raise CheckpointError(f"{file.name} does not say where {name} belongs")
                pieces.setdefault(name, []).append(_Piece(file, shape, offset, full_shape))
    return pieces


def _copy_overlap(piece: _Piece, name: str, local: Tensor, offset: tuple[int, ...]) -> int:
    """Copy what a piece and the local part have in common; the number of its elements."""
    ranges = list(_overlaps(piece, local, offset))
    if any(start >= stop for start, stop in ranges):
        return 0
    with safe_open(piece.file, framework="pt") as opened:
        if ranges:
            # Only the bytes in common are read, not the whole piece.
            lies = zip(ranges, piece.offset, strict=True)
            found = opened.get_slice(name)[tuple(slice(start - at, stop - at) for (start, stop), at in lies)]
        else:
            found = opened.get_tensor(name)
    if found.dtype != local.dtype:
        raise CheckpointError(f"{name} is {found.dtype} instead of {local.dtype}")
    goes = zip(ranges, offset, strict=True)
    local[tuple(slice(start - at, stop - at) for (start, stop), at in goes)].copy_(found)
    return found.numel()


def _overlaps(piece: _Piece, local: Tensor, offset: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    for theirs, size, ours, length in zip(piece.offset, piece.shape, offset, local.shape, strict=True):
        yield max(theirs, ours), min(theirs + size, ours + length)


def _local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this rank holds of a tensor, and where that lies in the full one."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


def _is_mine(tensor: Tensor) -> bool:
    """Whether this rank writes its part: of those that hold the same one the first does."""
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == 0
    mesh = tensor.device_mesh
    copied = (dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate))
    return all(mesh.get_local_rank(dim) == 0 for dim in copied)
