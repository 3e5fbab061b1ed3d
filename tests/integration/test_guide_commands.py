"""The user guide's commands, through the script that it names, with a local base model and data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.integration.conftest import REPOSITORY, run_process
from tests.support.tiny import write_base_model, write_chats

pytestmark = pytest.mark.slow

SCRIPT = REPOSITORY / "examples" / "sft" / "speculator" / "run_speculator_training.sh"
DATA = ["data.train_files=train.parquet", "data.val_files=test.parquet"]
COMMANDS = {
    "speculator-checkpoints": DATA,
    "speculator-qwen": [
        "model.speculator.n_predict=3",
        "model.speculator.inner_dim=512",
        "model.speculator.emb_dim=512",
        "model.speculator.proj_dim=512",
        "model.speculator.method=sum_rnn",
    ],
    "speculator-lstm": [
        "model.speculator.n_predict=5",
        "model.speculator.inner_dim=1024.2048",
        "model.speculator.emb_dim=1024.2048",
        "model.speculator.proj_dim=1024.2048",
        "model.speculator.method=sum_lstm",
        "model.speculator.tie_lstm_embs=true",
        "optim.lr=5e-5",
        "trainer.total_epochs=3",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    write_base_model(folder / "BASE")
    write_chats(folder / "train.parquet", 32)
    write_chats(folder / "test.parquet", 5, seed=1)
    return folder


@pytest.fixture(scope="module")
def warm_command(tmp_path_factory, warm_python) -> Path:
    """A folder to put on PATH, with a `verl-speculator` for `warm_python`."""
    command = tmp_path_factory.mktemp("bin") / "verl-speculator"
    command.write_text(f'#!/bin/sh\nexec "{warm_python}" -m verl_speculator.cli "$@"\n')
    command.chmod(0o755)
    return command.parent


@pytest.mark.parametrize("name", COMMANDS)
def test_command_trains_a_speculator(name: str, folder: Path, warm_command: Path) -> None:
    # The first command names no base model: the default is one on the Hugging Face hub.
    overrides = ["model.partial_pretrain=BASE", *DATA, *(o for o in COMMANDS[name] if o not in DATA)]
    # One of them as a user starts it, with two processes; the others by a command that has verl loaded.
    is_real = name == "speculator-lstm"
    environment = {} if is_real else {"PATH": f"{warm_command}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), "2" if is_real else "1", f"./{name}", *overrides]
    result = run_process(command, cwd=folder, **environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    steps = 3 if name == "speculator-lstm" else 1
    config = json.loads((folder / name / f"global_step_{steps}" / "speculator" / "config.json").read_text())
    wanted = dict(
        override.removeprefix("model.speculator.").split("=")
        for override in COMMANDS[name]
        if override.startswith("model.speculator.")
    )
    for key, value in wanted.items():
        assert str(config[key]).lower() == value
