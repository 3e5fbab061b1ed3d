"""Starting processes: most by a Python that has verl loaded already, because importing it takes many seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.warm_python import start as start_warm_python

REPOSITORY = Path(__file__).resolve().parents[2]


def run_process(
    command: list[str], *, cwd: Path | None = None, timeout: int = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def own_stderr(stderr: str) -> str:
    """What the processes wrote, without torchrun's report on how they ended."""
    return stderr.partition("torch/distributed/elastic/multiprocessing/api.py")[0] + stderr[-500:]


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory) -> Iterator[Path]:
    """An executable for what takes long to import; those that start it are to be tested with a real one elsewhere."""
    executable, server = start_warm_python(tmp_path_factory.mktemp("warm"))
    yield executable
    server.communicate()


@pytest.fixture(scope="session")
def torchrun(warm_python) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(num_processes: int, *arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
        command = [str(warm_python), "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        result = run_process([*command, *arguments], **kwargs)
        assert result.returncode == 0, result.stdout[-3000:] + own_stderr(result.stderr)[-9000:]
        return result

    return run


@pytest.fixture(scope="session")
def verl_speculator(warm_python) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command; the caller looks at the exit status. Under Ray it is a real process, with Ray's own."""

    def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
        python = sys.executable if {"--ray", "tune"} & {*arguments} else str(warm_python)
        return run_process([python, "-m", "verl_speculator.cli", *arguments], **kwargs)

    return run
