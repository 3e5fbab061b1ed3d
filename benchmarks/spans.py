"""Where time goes: spans recorded around functions from outside, without a change to the code that is measured."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import synchronize

_MISSING = object()


class SpanRecorder:
    """Adds up exclusive time: a span's seconds are those during which no span inside of it was open.

    So the spans inside of one outermost span add up to its whole time. On an accelerator each edge of a span waits for
    the device; what a recorded step takes is then more than what a step takes.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._clock = clock
        self._open: list[str] = []
        self._since = 0.0
        self._replaced: list[tuple[Any, str, Any]] = []

    def enter(self, name: str) -> None:
        self._credit_innermost()
        self._open.append(name)

    def leave(self) -> None:
        self._credit_innermost()
        self._open.pop()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Record calls of `owner.attribute` until `restore`; nothing happens where there is no such attribute.

        Outside of an outermost span nothing is recorded, so that wrapped functions may also run between steps.
        """
        function = getattr(owner, attribute, None)
        if function is None:
            return

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if not self._open:
                return function(*args, **kwargs)
            with self.span(name):
                return function(*args, **kwargs)

        self.replace(owner, attribute, recorded)

    def replace(self, owner: Any, attribute: str, value: Any) -> None:
        """Set `owner.attribute` until `restore`."""
        self._replaced.append((owner, attribute, vars(owner).get(attribute, _MISSING)))
        setattr(owner, attribute, value)

    def restore(self) -> None:
        while self._replaced:
            owner, attribute, before = self._replaced.pop()
            if before is _MISSING:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, before)

    def _credit_innermost(self) -> None:
        synchronize(self._device)
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
