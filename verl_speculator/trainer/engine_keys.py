"""Settings that only one of the two engines has: what to say when the other one is given them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import cached_property

from verl_speculator.errors import ConfigError

ENGINES = ("fsdp", "megatron")

# What serves the same purpose with the other engine.
_COUNTERPARTS = (
    ("engine.ulysses_sequence_parallel_size", "engine.context_parallel_size"),
    ("engine.mixed_precision", "engine.model_dtype"),
    ("optim.lr_scheduler_type", "optim.lr_decay_style"),
    ("optim.min_lr_ratio", "optim.min_lr"),
)


class OtherEngine:
    """The engine that was not chosen.

    :param keys: gives the keys that it has and the chosen engine has not; called when an unknown key is met
    """

    def __init__(self, name: str, keys: Callable[[], Iterable[str]]) -> None:
        self.name = name
        self._read_keys = keys

    @cached_property
    def _keys(self) -> list[str]:
        return list(self._read_keys())

    def refuse(self, key: str) -> None:
        """Raise :class:`ConfigError` if ``key`` or a section around it is this engine's."""
        own = next((part for part in _with_parents(key) if part in self._keys), None)
        if own is None:
            return
        chosen = ENGINES[1 - ENGINES.index(self.name)]
        counterparts = dict(_COUNTERPARTS) if self.name == "fsdp" else {b: a for a, b in _COUNTERPARTS}
        if own in counterparts:
            advice = f"with engine={chosen} set {counterparts[own]}"
        elif self.name == "megatron":
            advice = "give engine=megatron optim=megatron to train on Megatron, or leave it out"
        else:
            advice = f"leave it out with engine={chosen}"
        raise ConfigError(f"{own} is a setting of engine={self.name}: {advice}")

    def nearest(self, key: str, rival: str | None) -> str | None:
        """The key of this engine that ``key`` must have meant: one that is much like it, and more so than ``rival``."""
        near = difflib.get_close_matches(key, self._keys, n=1, cutoff=0.85)
        if not near or (rival is not None and _likeness(key, rival) >= _likeness(key, near[0])):
            return None
        return near[0]


def _with_parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(2, len(parts) + 1)]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
