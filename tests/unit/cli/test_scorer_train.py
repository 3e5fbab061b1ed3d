from __future__ import annotations

import sys

import pytest

from tests.support.windows import make_window, write_window_file
from verl_speculator import cli
from verl_speculator.cli import scorer_train


@pytest.fixture
def settings(base_model, tmp_path):
    file = write_window_file(tmp_path / "windows.parquet", [make_window([4], [7], [3, 4])])
    return [f"rollout.target_model_path={base_model}", f"data.train_files={file}"]


def test_a_checked_run_becomes_the_trainers_process(settings, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(scorer_train.os, "execv", lambda path, command: started.append(command))
    file = tmp_path / "mine.yaml"
    file.write_text("lora_rank: 4\n")

    assert cli.main(["scorer", "train", "--config", str(file), *settings, "rollout.n=4"]) == 0

    module = ["-m", "verl_speculator.scorer.train_spd_scorer"]
    assert started == [[sys.executable, *module, "--config", str(file), *settings, "rollout.n=4"]]


def test_a_mistake_is_one_sentence(settings, capsys):
    assert cli.main(["scorer", "train", *settings, "rollout.nn=4"]) == 2

    assert capsys.readouterr().err == (
        "error: rollout.nn is not a configuration key; did you mean actor_rollout_ref.rollout.n?\n"
    )


def test_the_configuration_is_printed(settings, capsys):
    assert cli.main(["scorer", "train", "--print-config", *settings]) == 0

    printed = capsys.readouterr().out
    assert "adv_estimator: grpo" in printed
    assert "trainer_mode: spd" in printed
