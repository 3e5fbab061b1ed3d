"""Progress bars of commands that do several things, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


class ProgressBars:
    """A bar for each thing that is done, one after the other."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._doing = ""

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, doing: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None or doing != self._doing:
            self.__exit__()
            self._doing, self._bar = doing, tqdm(total=total, desc=doing, unit="prompt", dynamic_ncols=True)
        self._bar.update(done - self._bar.n)
