"""The benchmark of the draft loop at toy sizes, and what two engines on one GPU are given; no time is asserted."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


def test_draft_loop(tmp_path) -> None:
    sizes = ["--hidden", "16", "--width", "24", "--vocab", "50", "--heads", "2", "--batches", "1", "3", "--rounds", "2"]
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "bench_serving.py"), "draft", *sizes, "--json", "out.json"],
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(row["kind"], row["batch"]) for row in report["rows"]] == [
        (kind, batch) for kind in ("mlp", "sum_rnn", "sum_lstm") for batch in (1, 3)
    ]
    for row in report["rows"]:
        # Of two rounds, so the median is half-way between the two.
        assert 0 < row["seconds_min"] < row["seconds_max"]
        assert row["seconds_median"] == pytest.approx((row["seconds_min"] + row["seconds_max"]) / 2)
        assert row["ms_per_call"] == pytest.approx(1e3 * row["seconds_median"])
        assert row["ms_per_token"] == pytest.approx(row["ms_per_call"] / 2)
    assert "ms_per_token" in result.stdout


@pytest.mark.parametrize(("options", "share"), [([], 0.45), (["--gpu-memory-utilization", "0.3"], 0.3)])
def test_two_engines_fit_on_one_gpu(options: list[str], share: float, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    bench = importlib.import_module("bench_serving")
    engines: list[dict[str, Any]] = []

    class Engine:
        def __init__(self, base: str, speculator: str | None, settings: dict[str, Any]) -> None:
            engines.append(settings)

        def generate(self, prompts: list[Any], max_tokens: int, *, profile: bool = False) -> dict[str, Any]:
            counters = {"num_drafts": 1, "num_accepted_tokens": 1}
            return {"seconds": 1.0, "tokens": [], "counters": counters, "split": {}}

        def close(self) -> None: ...

    monkeypatch.setattr(bench, "EngineProcess", Engine)
    monkeypatch.setattr(bench, "make_prompts", lambda args, batch: [])
    monkeypatch.setattr(sys, "argv", ["bench_serving.py", "serve", "BASE", "SPECULATOR", "--batches", "2", *options])
    (row,) = bench.bench_serving(bench.parse_arguments())
    assert row["speedup"] == 1
    assert [engine["gpu_memory_utilization"] for engine in engines] == [share, share]
