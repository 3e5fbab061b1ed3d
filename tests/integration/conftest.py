"""Starting real processes. Importing verl takes many seconds in each, so a launch does as much as it can."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run_process(command: list[str], *, cwd: Path | None = None, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY))
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def own_stderr(stderr: str) -> str:
    """What the processes wrote, without torchrun's report on how they ended."""
    return stderr.partition("torch/distributed/elastic/multiprocessing/api.py")[0] + stderr[-500:]


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(num_processes: int, *arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        result = run_process([*command, *arguments], **kwargs)
        assert result.returncode == 0, result.stdout[-3000:] + own_stderr(result.stderr)[-6000:]
        return result

    return run


@pytest.fixture(scope="session")
def verl_speculator() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed command; the caller looks at the exit status."""

    def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
        return run_process([sys.executable, "-m", "verl_speculator.cli", *arguments], **kwargs)

    return run
