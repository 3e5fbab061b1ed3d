"""The benchmark of the draft loop at toy sizes; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
