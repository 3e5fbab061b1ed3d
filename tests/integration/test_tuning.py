"""A search from the command to its table, with real trainings under Ray Tune."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.support.tiny import write_base_model, write_chats
from verl_speculator.models import Speculator
from verl_speculator.reports.curves import read_curves

pytestmark = pytest.mark.slow


def test_ranks_trials_and_goes_on(tmp_path: Path, verl_speculator) -> None:
    base = write_base_model(tmp_path / "base")
    write_chats(tmp_path / "train.parquet", 24)
    write_chats(tmp_path / "val.parquet", 6, seed=1)
    output = tmp_path / "search"
    settings = [
        f"model.partial_pretrain={base}",
        f"data.train_files={tmp_path / 'train.parquet'}",
        f"data.val_files={tmp_path / 'val.parquet'}",
        "data.train_batch_size=12",
        "data.num_workers=0",
        "trainer.total_training_steps=2",
        *(f"model.speculator.{name}_dim=32" for name in ("inner", "emb", "proj")),
    ]
    command = ["tune", "--output", str(output), "--draw", "optim.lr=1e-3:1e-2", *settings]
    grid = "model.speculator.n_predict="
    first = verl_speculator(*command, "--grid", f"{grid}1")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-5000:]
    written = {folder.name: (folder / "log.txt").stat().st_mtime_ns for folder in output.glob("trial_*")}
    assert len(written) == 1

    second = verl_speculator(*command, "--grid", f"{grid}1,3")
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-5000:]
    trials = json.loads((output / "tune.json").read_text())
    assert len(trials) == 2
    [known] = [trial for trial in trials if Path(trial["folder"]).name in written]
    assert f"{grid}1" in known["settings"]
    assert "Nothing to train" in (Path(known["folder"]) / "log.txt").read_text()

    assert trials[0]["score"] >= trials[1]["score"]
    for trial in trials:
        curve = read_curves(Path(trial["folder"])).points("val/closed_loop_acceptance_length")
        assert trial["acceptance_length"] == curve[-1][1]
        assert trial["score"] == pytest.approx(trial["acceptance_length"] / (1 + trial["draft_share"]))
        assert Speculator.from_pretrained(Path(trial["folder"]) / "global_step_2").config.n_predict in (1, 3)
    by_heads = {f"{grid}1" in trial["settings"]: trial["draft_share"] for trial in trials}
    assert by_heads[False] == pytest.approx(3 * by_heads[True])

    table, winner = second.stdout[-3000:], trials[0]["settings"]
    assert (output / "tune.md").read_text() in table
    assert shlex.join(["verl-speculator", "train", "--nproc", "1", *settings, *winner]) in table
