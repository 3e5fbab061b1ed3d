from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a file of `benchmarks/` as its neighbours there do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run_benchmark(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a script as a user does; what it wrote with `--json`, once its table has been printed too."""

    def run(script: str, *arguments: str) -> dict[str, Any]:
        report = tmp_path / "report.json"
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY))
        result = subprocess.run(
            [sys.executable, str(BENCHMARKS / script), *arguments, "--json", str(report)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        whole = json.loads(report.read_text())
        assert {"cores", "device", "load_average", "torch_threads"} <= set(whole["machine"])
        assert whole["versions"]["torch"]
        assert whole["rows"]
        assert "seconds_median" in result.stdout
        return whole

    return run
