"""The errors a user can cause. Each message is one sentence: what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class SpeculatorError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(SpeculatorError, ValueError):
    """A configuration value that cannot work; the message names its key."""


class DataError(SpeculatorError, ValueError):
    """Training or evaluation data that cannot be used; the message names the file."""


class CheckpointError(SpeculatorError, ValueError):
    """A speculator folder or checkpoint whose contents are wrong; the message names the file."""


class MissingFileError(SpeculatorError, FileNotFoundError):
    """A file or folder that should be there and is not; the message names it."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Errors of this package that are raised inside begin with `key`, the flag or configuration key to blame."""
    try:
        yield
    except SpeculatorError as error:
        raise type(error)(f"{key}: {error}") from error


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The one of `known` that a mistyped `name` must have meant, for an error to suggest; None if none is like it.

    `cutoff` is the least likeness, from 0 to 1, in the sense of `difflib.SequenceMatcher.ratio`.
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return near[0] if near else None
