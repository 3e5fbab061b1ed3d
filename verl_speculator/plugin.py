"""The `verl.plugins` entry point: runs inside `import verl`, so it does as little as possible.

verl swallows what a plugin raises, so a failure is written to stderr here.
"""

from __future__ import annotations

import sys
import traceback


def register() -> None:
    """Add the `cpu` platform. Engines register when a trainer imports `verl_speculator.engine`."""
    from verl_speculator.platforms import cpu, vllm_cpu

    cpu.ensure_registered()
    vllm_cpu.ensure_distribution()


try:
    register()
except Exception:
    print(
        "verl_speculator: its plugin for verl could not load, so verl runs without it. The reason:\n"
        + traceback.format_exc(),
        file=sys.stderr,
    )
    raise
