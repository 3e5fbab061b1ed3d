"""Attributes of modules and classes that are replaced for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


class Patch(NamedTuple):
    """`owner.name`, an attribute of the owner itself and not of a parent, becomes `replacement`."""

    owner: Any
    name: str
    replacement: Any


@contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    """Apply `patches`, and put back what was there. Nests.

    Raises:
        RuntimeError: an owner has no such attribute; nothing has been replaced then.
    """
    for owner, name, _ in patches:
        if name not in vars(owner):
            raise RuntimeError(f"{owner.__name__} has no {name!r} in the installed version, which this code relies on")
    originals = [vars(owner)[name] for owner, name, _ in patches]
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(patches, originals, strict=True):
            setattr(owner, name, original)
