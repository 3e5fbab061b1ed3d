"""Which vLLM the hooks fit, and what to say when they do not.

Supported are the newest vLLM that was tested and the four minor versions before it. From `V2_FROM` on drafts are made
on its Model Runner V2; `serving/v1` goes when `OLDEST` gets there.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from verl_speculator.errors import SpeculatorError

OLDEST = (0, 28)
V2_FROM = (0, 32)
NEWEST_TESTED = (0, 32)
SUPPORTED = "0.28 to 0.32"

_MARK = "_verl_speculator_hook"


class UnsupportedEngineError(SpeculatorError, RuntimeError):
    """The installed vLLM is too old, or has moved what a hook needs."""


def parse(version: str) -> tuple[int, int] | None:
    """The first two numbers of a version; None for a build that has none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def check_version(version: str) -> str | None:
    """A warning for a vLLM newer than those tested, else None; `version` is `vllm.__version__`.

    Raises:
        UnsupportedEngineError: it is older than the oldest that works.
    """
    found = parse(version)
    if found is None or found > NEWEST_TESTED:
        return (
            f"verl_speculator was tested with vLLM {SUPPORTED}, not with {version}; its hooks fit as far as it can see."
        )
    if found < OLDEST:
        raise UnsupportedEngineError(
            f"verl_speculator serves speculators in vLLM {SUPPORTED}, but vLLM {version} is installed: "
            f"install vllm>=0.28."
        )
    return None


def moved(what: str) -> UnsupportedEngineError:
    """The error for a part of vLLM that a hook needs and that is not as it was."""
    return UnsupportedEngineError(
        f"verl_speculator cannot serve this speculator in vLLM {_version()}: {what}; it was tested with {SUPPORTED}."
    )


def require_parameters(function: Callable[..., Any], names: Iterable[str]) -> inspect.Signature:
    """The signature of `function`, once it is known to have parameters of these `names`.

    Raises:
        UnsupportedEngineError: it lacks one.
    """
    signature = inspect.signature(function)
    missing = [name for name in names if name not in signature.parameters]
    if missing:
        raise moved(f"{function.__qualname__} has no parameter {', '.join(missing)} any more")
    return signature


def wrap(owner: type | ModuleType, name: str, make_wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function `name` of a class or module by `make_wrapper(original)`; a second call changes nothing.

    Raises:
        UnsupportedEngineError: there is no such function.
    """
    original = getattr(owner, name, None)
    if original is None:
        raise moved(f"{owner.__name__} has no {name} any more")
    if getattr(original, _MARK, False):
        return
    wrapper = functools.wraps(original)(make_wrapper(original))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, wrapper)


def _version() -> str:
    import vllm

    return str(vllm.__version__)
