"""The reader of training logs, against logs written by hand and by the writers that runs use."""

from __future__ import annotations

import json

import pytest

from verl_speculator.errors import DataError, MissingFileError
from verl_speculator.reports.curves import find_run, read_curves
from verl_speculator.trainer.metrics_log import METRICS_FILE, MetricsLog


def test_reads_what_a_run_writes(tmp_path) -> None:
    log = MetricsLog(tmp_path, start_step=0)
    log.append(1, {"train/loss": 2.0})
    log.append(2, {"train/loss": float("nan")})
    log.append(2, {"val/loss": 3.0})
    log.append(3, {"train/loss": 1.0})
    curves = read_curves(tmp_path)
    assert curves.points("train/loss") == [(1, 2.0), (3, 1.0)]
    assert curves.points("val/loss") == [(2, 3.0)]
    assert curves.points("absent") == []
    assert curves.names("train/") == ["train/loss"]
    assert curves.last_step == 3


def test_resumed_run_takes_back_the_steps_that_it_does_again(tmp_path) -> None:
    first = MetricsLog(tmp_path, start_step=0)
    for step in (1, 2, 3, 4):
        first.append(step, {"x": step, "only_before": step})
    second = MetricsLog(tmp_path, start_step=2)
    second.append(3, {"x": 30})
    curves = read_curves(tmp_path)
    assert curves.points("x") == [(1, 1), (2, 2), (3, 30)]
    assert curves.points("only_before") == [(1, 1), (2, 2)]


def test_run_started_afresh_takes_back_everything(tmp_path) -> None:
    MetricsLog(tmp_path, start_step=0).append(0, {"val/loss": 9.0, "x": 1})
    MetricsLog(tmp_path, start_step=0).append(1, {"x": 5})
    assert read_curves(tmp_path).values == {"x": {1: 5.0}}


def test_reads_the_file_of_verls_logger(tmp_path) -> None:
    file = tmp_path / "experiment.jsonl"
    file.write_text('{"step":1,"data":{"train/loss":2.5}}\n{"step":2,"data":{"train/loss":null,"name":"x"}}\n')
    assert read_curves(file).values == {"train/loss": {1: 2.5, 2: None}}


def test_unfinished_last_line_is_left_out(tmp_path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "metrics": {"x": 1}}\n{"step": 2, "me')
    assert read_curves(tmp_path).points("x") == [(1, 1.0)]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"step": "1", "metrics": {}}', '{"metrics": {"x": 1}}'])
def test_damaged_line_is_named(tmp_path, line) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "metrics": {"x": 1}}\n' + line + "\n{}\n")
    with pytest.raises(DataError, match="line 2"):
        read_curves(tmp_path)


def test_nothing_to_read(tmp_path) -> None:
    with pytest.raises(MissingFileError, match="no folder or file"):
        read_curves(tmp_path / "absent")
    with pytest.raises(MissingFileError, match=r"holds no metrics\.jsonl"):
        read_curves(tmp_path)
    (tmp_path / METRICS_FILE).write_text(json.dumps({"step": 0, "metrics": {}, "start": True}) + "\n")
    with pytest.raises(DataError, match="no values yet"):
        read_curves(tmp_path)


def test_reads_tensorboard_events(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in (1, 2):
            writer.add_scalar("train/loss", 4.0 / step, step)
    assert read_curves(tmp_path).points("train/loss") == [(1, 4.0), (2, 2.0)]


@pytest.mark.parametrize("place", ["global_step_5/speculator", "global_step_5", "speculator", "."])
def test_finds_the_run_of_a_checkpoint(tmp_path, place) -> None:
    (tmp_path / "run" / place).mkdir(parents=True)
    assert find_run(tmp_path / "run" / place) is None
    (tmp_path / "run" / METRICS_FILE).write_text("")
    assert find_run(tmp_path / "run" / place) == tmp_path / "run"


def test_a_name_on_the_hub_lies_in_no_run(tmp_path, monkeypatch) -> None:
    (tmp_path / METRICS_FILE).write_text("")
    monkeypatch.chdir(tmp_path)
    assert find_run("owner/speculator") is None
