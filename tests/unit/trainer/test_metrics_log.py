"""The run's own log: every line whole, nothing lost by a killed run or a resumed one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from verl_speculator.trainer.metrics_log import METRICS_FILE, MetricsLog


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_each_line_is_in_the_file_at_once(tmp_path) -> None:
    log = MetricsLog(tmp_path / "run", start_step=0)
    log.append(1, {"train/loss": 2.5, "train/tokens": 7})
    assert lines(tmp_path / "run") == [
        {"step": 0, "metrics": {}, "start": True},
        {"step": 1, "metrics": {"train/loss": 2.5, "train/tokens": 7}},
    ]
    log.append(2, {"train/loss": 2.0})
    assert lines(tmp_path / "run")[-1] == {"step": 2, "metrics": {"train/loss": 2.0}}
    log.close()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (torch.tensor(0.25), 0.25),
        (float("nan"), None),
        (float("-inf"), None),
    ],
)
def test_values_are_plain_json(tmp_path, value, expected) -> None:
    MetricsLog(tmp_path, start_step=0).append(1, {"x": value})
    text = (tmp_path / METRICS_FILE).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert lines(tmp_path)[-1]["metrics"] == {"x": expected}


def test_what_is_no_number_is_left_out(tmp_path) -> None:
    log = MetricsLog(tmp_path, start_step=0)
    log.append(1, {"name": "x", "flag": True, "many": torch.zeros(2), "one": 1})
    assert lines(tmp_path)[-1]["metrics"] == {"one": 1}


def test_a_run_that_logs_nothing_leaves_the_file_alone(tmp_path) -> None:
    (tmp_path / METRICS_FILE).write_text("before\n")
    log = MetricsLog(tmp_path, start_step=0)
    log.append(1, {})
    log.close()
    assert (tmp_path / METRICS_FILE).read_text() == "before\n"


def test_resumed_run_goes_on_after_an_unfinished_line(tmp_path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "metrics": {"x": 1}}\n{"step": 2, "metr')
    MetricsLog(tmp_path, start_step=1).append(2, {"x": 5})
    assert lines(tmp_path) == [
        {"step": 1, "metrics": {"x": 1}},
        {"step": 1, "metrics": {}, "start": True},
        {"step": 2, "metrics": {"x": 5}},
    ]
