from __future__ import annotations

import re

import pytest

from verl_speculator.errors import ConfigError, MissingFileError
from verl_speculator.reports.curves import read_curves
from verl_speculator.reports.training import compared_charts, run_charts, write_train_report
from verl_speculator.trainer.metrics_log import MetricsLog


@pytest.fixture
def run(tmp_path):
    def write(name="run", steps=3, **extra):
        log = MetricsLog(tmp_path / name, start_step=0)
        for step in range(1, steps + 1):
            heads = {f"train/head_{i}/{what}": 0.1 * step for i in range(2) for what in ("loss", "accuracy")}
            log.append(
                step,
                {
                    "train/loss": 4.0 / step,
                    "train/acceptance_length": 1.0 + step / 4,
                    "train/lr": 1e-3,
                    "train/grad_norm": 1.0,
                    "perf/tokens_per_second": 5000.0,
                    **heads,
                    **extra,
                },
            )
        measured = {"val/acceptance_length": 1.75, "val/closed_loop_acceptance_length": 1.5}
        log.append(steps, {"val/loss": 2.5, **measured})
        log.close()
        return tmp_path / name

    return write


def line_colours(block) -> list[str]:
    return re.findall(r"stroke: var\(--(s\d|sbase)\)", block.svg)


def test_every_curve_has_its_chart(run) -> None:
    blocks = {block.heading: block for block in run_charts(read_curves(run()))}
    assert list(blocks) == [
        "Loss", "Acceptance length", "Loss per head", "Accuracy per head", "Learning rate", "Gradient norm", "Speed",
    ]  # fmt: skip
    assert line_colours(blocks["Accuracy per head"]) == ["s0", "s1"]
    assert line_colours(blocks["Loss"]) == ["s0", "s1"]
    assert "head 2" in blocks["Loss per head"].legend
    named = re.findall("</svg>(.*?)</li>", blocks["Acceptance length"].legend)
    assert named == ["training", "validation", "validation, closed loop"]


def test_page_is_written_next_to_the_log(run) -> None:
    folder = run()
    page = write_train_report(folder).read_text()
    assert (folder / "report.html").is_file()
    assert "Training run: run" in page
    assert "at step 3; best 1.75 at step 3" in page
    assert "<script" not in page


def test_page_goes_where_it_is_asked_to(run, tmp_path) -> None:
    assert write_train_report(run(), tmp_path / "deep" / "x.html").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^--output: cannot write"):
        write_train_report(run(), tmp_path / "file" / "x.html")


def test_runs_without_our_curves(tmp_path) -> None:
    with pytest.raises(MissingFileError):
        write_train_report(tmp_path)
    MetricsLog(tmp_path, start_step=0).append(1, {"something/else": 1.0})
    with pytest.raises(ConfigError, match="none of the curves"):
        write_train_report(tmp_path)


def test_several_runs_share_their_charts(run) -> None:
    runs = [(name, read_curves(run(name))) for name in ("a", "b")]
    blocks = compared_charts(runs)
    assert [block.heading for block in blocks] == ["Loss", "Loss", "Acceptance length", "Acceptance length"]
    assert all(line_colours(block) == ["s0", "s1"] for block in blocks)
