"""A frozen base's hidden states on disk, so that later epochs and runs need not compute them again.

A folder has `cache.json`, which says of what base and data it holds states, and shards. A shard is a safetensors file
with a tensor [K, T, H] for each row: K states (the last ones and those of the layers that an adapter asked for) of T
tokens, under a name made from the row's tokens. What precedes a token in its row is all that its states depend on, so
a row is found again whatever the order of rows, the cut into batches or the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from verl_speculator.errors import CheckpointError, ConfigError
from verl_speculator.models.serialization import checksum

KEY = "data.hidden_states_cache"
DESCRIPTION_FILE = "cache.json"

_SHARD_BYTES = 256 << 20
# What others need of a disk that is almost full.
_SPARE_BYTES = 1 << 30


@dataclass
class StatesCacheSettings:
    """What every process has to know of the folder that it shares with the others.

    Attributes:
        folder: Seen by all processes.
        dtype: The name of the type in which states are kept.
        is_complete: Whether it holds every row of the training and the validation data.
        max_bytes: What all processes together may fill; None for what the disk has.
    """

    folder: str
    dtype: str
    is_complete: bool = False
    max_bytes: int | None = None


class _Entry(NamedTuple):
    shard: Path
    checksum: int
    seconds: float  # that the base took for it


class StatesCache:
    """One process's way to the folder.

    Args:
        settings: The same on every process.
        layers: The states of each token: numbers of layers, and -1 for the last ones.
        num_writers: Processes that write, which share `max_bytes`.

    Raises:
        ConfigError: the folder has the states of other layers.
    """

    def __init__(self, settings: StatesCacheSettings, layers: Sequence[int], num_writers: int) -> None:
        self.folder = Path(settings.folder)
        self.is_complete = settings.is_complete
        self.dtype = getattr(torch, settings.dtype)
        self._layers = list(layers)
        self._entries: dict[str, _Entry] = {}
        self._shards: set[str] = set()
        self._unwritten: dict[str, tuple[Tensor, float]] = {}
        self._unwritten_bytes = 0
        self._reads: dict[str, Future[Tensor]] = {}
        # One thread: it is ahead of the step, and a disk gains nothing from several that jump about.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hidden-states")
        self._open = lru_cache(maxsize=64)(_opened)
        self.find_new_shards()
        self._budget: int | None = None
        if settings.max_bytes is not None:
            self._budget = max(settings.max_bytes - stored_bytes(self.folder), 0) // num_writers

    def find_new_shards(self) -> None:
        """Take note of what other processes have written since the last call."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name in self._shards:
                continue
            with _opened(file) as opened:
                facts = json.loads(opened.metadata()["rows"])
                layers = json.loads(opened.metadata()["layers"])
            if layers != self._layers:
                raise ConfigError(
                    f"{KEY}: {str(self.folder)!r} has the states of {_spoken(layers)} of the base, and this run needs "
                    f"those of {_spoken(self._layers)}: give another folder"
                )
            self._entries |= {key: _Entry(file, *fact) for key, fact in facts.items()}
            self._shards.add(file.name)

    def has(self, keys: Sequence[str]) -> bool:
        return all(key in self._entries for key in keys)

    def seconds_saved(self, keys: Sequence[str]) -> float:
        """What the base took for these rows when they were written."""
        return sum(self._entries[key].seconds for key in keys)

    def prefetch(self, keys: Sequence[str]) -> None:
        """Begin to read, in a thread, the rows among these that are there."""
        for key in keys:
            if key in self._entries and key not in self._reads:
                self._reads[key] = self._thread.submit(self._read, key)

    def read(self, keys: Sequence[str]) -> list[Tensor]:
        """The states of the rows one after the other: for each of `layers`, [T, H].

        Raises:
            CheckpointError: a shard is damaged.
        """
        self.prefetch(keys)
        rows = [self._reads[key].result() for key in keys]
        for key in set(keys):
            del self._reads[key]
        return list(torch.cat(rows, dim=1).unbind())

    def _read(self, key: str) -> Tensor:
        entry = self._entries[key]
        try:
            states = self._open(entry.shard).get_tensor(key)
        except Exception as error:
            raise CheckpointError(
                f"{entry.shard} cannot be read ({error}): delete it, or give another {KEY}"
            ) from error
        if checksum(states) != entry.checksum:
            raise CheckpointError(f"{entry.shard} is damaged: delete it, or give another {KEY}")
        return states

    def forget_prefetched(self) -> None:
        """Let go of rows that were asked for and will not be read."""
        self._reads = {}

    def write(self, keys: Sequence[str], states: Sequence[Tensor], lengths: Sequence[int], seconds: float) -> None:
        """Keep the states of rows that are not there yet, as far as there is room for them.

        Args:
            keys: Of each row.
            states: For each of `layers`, [T, H], the rows one after the other.
            lengths: Of each row; T in all.
            seconds: What the base took for all of them.
        """
        num_tokens = max(sum(lengths), 1)
        rows = torch.stack([state.to(self.dtype) for state in states]).cpu().split(list(lengths), dim=1)
        for key, row in zip(keys, rows, strict=True):
            if key in self._entries or key in self._unwritten or not self._has_room(row.nbytes):
                continue
            # A copy: a view would keep the states of the whole micro-batch.
            self._unwritten[key] = (row.clone(), seconds * row.shape[1] / num_tokens)
            self._unwritten_bytes += row.nbytes
        if self._unwritten_bytes >= _SHARD_BYTES:
            self.flush()

    def _has_room(self, num_bytes: int) -> bool:
        if self._budget is None:
            return True
        if num_bytes > self._budget:
            self._give_up()
            return False
        self._budget -= num_bytes
        return True

    def _give_up(self) -> None:
        if self._budget != 0:
            print(f"{KEY}: {str(self.folder)!r} is full; what is not in it is computed whenever it is needed")
        self._budget = 0

    def flush(self) -> None:
        """Write what is kept in memory; other processes see it once they look for new shards."""
        rows, self._unwritten, self._unwritten_bytes = self._unwritten, {}, 0
        if not rows:
            return
        if shutil.disk_usage(self.folder).free < _SPARE_BYTES + sum(row.nbytes for row, _ in rows.values()):
            self._give_up()
            return
        facts = {key: (checksum(row), seconds) for key, (row, seconds) in rows.items()}
        metadata = {"layers": json.dumps(self._layers), "rows": json.dumps(facts)}
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = file.with_suffix(".partial")
        save_file({key: row for key, (row, _) in rows.items()}, partial, metadata=metadata)
        # At once, so that no reader finds half of it.
        os.replace(partial, file)
        self._entries |= {key: _Entry(file, *fact) for key, fact in facts.items()}
        self._shards.add(file.name)


def read_description(folder: Path) -> dict[str, Any] | None:
    """What the folder says that it has; None if it is new.

    Raises:
        ConfigError: it is a folder of something else.
        CheckpointError: what it says cannot be read.
    """
    file = folder / DESCRIPTION_FILE
    if not file.is_file():
        if folder.is_dir() and any(not item.name.startswith(".") for item in folder.iterdir()):
            raise ConfigError(
                f"{KEY}: {str(folder)!r} is not empty and has no {DESCRIPTION_FILE}: give a folder of its own"
            )
        return None
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): give another {KEY}") from error


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Put it into the folder, which is made where it is missing.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    partial = folder / f"{DESCRIPTION_FILE}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(description, indent=2) + "\n")
        os.replace(partial, folder / DESCRIPTION_FILE)
    except OSError as error:
        raise ConfigError(f"{KEY}: cannot write to {str(folder)!r} ({error.strerror}): give another folder") from error


def row_key(input_ids: Tensor) -> str:
    """A name for a row: a digest of its tokens."""
    return hashlib.blake2b(input_ids.to("cpu", torch.int64).numpy().tobytes(), digest_size=16).hexdigest()


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def room_for(folder: Path, needed: int, max_bytes: int | None) -> int:
    """The bytes that a folder may still grow by.

    Raises:
        ConfigError: `needed` is more.
    """
    free = shutil.disk_usage(folder).free - _SPARE_BYTES
    if max_bytes is not None and max_bytes - stored_bytes(folder) < min(needed, free):
        raise ConfigError(
            f"{KEY}_gb={max_bytes / 1e9:g} is less than the {(needed + stored_bytes(folder)) / 1e9:.3g} GB that the "
            "hidden states of these data take: raise it, or train on less data"
        )
    if needed > free:
        raise ConfigError(
            f"{KEY}: the hidden states of these data take {needed / 1e9:.3g} GB more, and {str(folder)!r} has room for "
            f"{max(free, 0) / 1e9:.3g}: give a folder with more room, or leave the key out"
        )
    return free


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read ({error}): delete it, or give another {KEY}") from error


def _spoken(layers: Sequence[int]) -> str:
    return ", ".join("the last layer after its norm" if layer < 0 else f"layer {layer}" for layer in layers)
