"""The scripts of `examples/scorer`: every command that they give is one that the package takes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.windows import make_window, write_window_file
from verl_speculator.cli import scorer
from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.training_config import check_run, load_config, split_arguments

SCRIPTS = Path(__file__).resolve().parents[3] / "examples" / "scorer"
# Stands for the command: notes what it is called with, and leaves what the script goes on with.
COMMAND = """#!{python}
import json, shutil, sys
from pathlib import Path

arguments = sys.argv[1:]
with open("{log}", "a") as log:
    log.write(json.dumps(arguments) + "\\n")
if arguments[1] == "train":
    folder = Path(next(text for text in arguments if text.startswith("trainer.default_local_dir=")).split("'")[1])
    scorer = folder / "global_step_3" / "actor" / "scorer"
    scorer.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree("{world}/scorer", scorer, dirs_exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
elif arguments[1] in ("data", "label"):
    shutil.copy("{world}/windows.parquet", arguments[arguments.index("--output") + 1])
elif arguments[1] == "fit":
    shutil.copytree("{world}/scorer", arguments[arguments.index("--output") + 1])
"""


@pytest.fixture
def called(tmp_path, base_model):
    """Runs a script with its arguments; gives the command lines that it gave."""
    world, log = tmp_path / "world", tmp_path / "log"
    (world / "scorer").mkdir(parents=True)
    values = {"model_type": "spd_scorer", **ScoringModelConfig(32).to_dict()}
    (world / "scorer" / "config.json").write_text(json.dumps(values))
    write_window_file(world / "windows.parquet", [make_window([5, 6, 9], [1, 2], [1, 8, 3])])
    folder = tmp_path / "bin"
    folder.mkdir()
    stub = folder / "verl-speculator"
    stub.write_text(COMMAND.format(python=sys.executable, log=log, world=world))
    stub.chmod(0o755)
    python = folder / "python"  # a link would not find the environment's packages
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)

    def run(script: str, *arguments: object, **environment: str) -> list[list[str]]:
        result = subprocess.run(
            ["bash", str(SCRIPTS / script), *map(str, arguments)],
            env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return [json.loads(line) for line in log.read_text().splitlines()]

    return run


def check(commands: list[list[str]]) -> list[str]:
    """The commands' names, once each has been read as the package reads it."""
    parser = argparse.ArgumentParser()
    scorer.add_arguments(parser)
    for command in commands:
        assert command[0] == "scorer"
        if command[1] == "train":
            check_run(load_config(*split_arguments(command[2:])))
        else:
            parser.parse_args(command[1:])
    return [command[1] for command in commands]


def test_llama_on_gsm8k(called, base_model, tmp_path) -> None:
    """On a machine without GPUs and without the models: the tiny base stands for both."""
    data, output = tmp_path / "gsm8k", tmp_path / "it's out"
    data.mkdir()
    chats = [
        [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a #### {i}"}] for i in range(600)
    ]
    for split in ("train", "test"):
        pq.write_table(pa.table({"messages": chats}), data / f"{split}.parquet")
    names = {"TARGET": str(base_model), "DRAFT": str(base_model), "DATA_DIR": str(data)}

    commands = called("run_llama_8b_gsm8k.sh", output, "trainer.total_training_steps=5", **names)

    assert check(commands) == ["data", "label", "fit", "train", "evaluate"]
    parts = {part: pq.read_table(output / f"{part}.parquet") for part in ("train", "validation", "test")}
    assert {part: len(table) for part, table in parts.items()} == {"train": 100, "validation": 500, "test": 600}
    assert parts["validation"]["answer"][0].as_py() == "a #### 100"
    # What is there is not made again.
    again = called("run_llama_8b_gsm8k.sh", output, **names)[len(commands) :]
    assert [command[1] for command in again] == ["train", "evaluate"]


def test_grpo_in_the_world_of_the_folder(called, base_model, tmp_path) -> None:
    output = tmp_path / "world"
    for name in ("target", "draft"):
        shutil.copytree(base_model, output / name)
    (output / "work").mkdir()
    (output / "grpo").mkdir()
    (output / "scorers").mkdir()
    shutil.copy(output / "windows.parquet", output / "work" / "labelled.parquet")
    shutil.copytree(output / "scorer", output / "scorers" / "supervised")

    commands = called("run_grpo.sh", output, "actor.entropy_coeff=0.01", WINDOW_STEPS="3", ANSWER_STEPS="2")

    assert check(commands) == ["train", "train", "evaluate"]
    assert (output / "scorers" / "grpo-windows" / "config.json").is_file()
    rules = [text for text in commands[-1] if text.startswith("scorer:")]
    assert sorted(Path(rule).name for rule in rules) == ["grpo-answers", "grpo-windows", "supervised"]
