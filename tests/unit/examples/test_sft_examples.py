"""The scripts of `examples/sft`: the data they write, what they call, and what they say about mistakes."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig, OmegaConf

from verl_speculator.data.chats import check_chat_file

CHECKOUT = Path(__file__).resolve().parents[3]
README = CHECKOUT / "README.md"
SFT = CHECKOUT / "examples" / "sft"
TRAIN_SCRIPT = SFT / "speculator" / "run_speculator_training.sh"
GSM8K_SCRIPT = SFT / "gsm8k" / "run_qwen_05_speculator.sh"
GSM8K_RAY_SCRIPT = SFT / "gsm8k" / "run_qwen_05_speculator_ray.sh"
GSM8K_MEGATRON_SCRIPT = SFT / "gsm8k" / "run_qwen_05_speculator_megatron.sh"
GSM8K_ENGINE_SCRIPT = SFT / "gsm8k" / "run_qwen_05_speculator_engine.sh"
SCRIPTS = [TRAIN_SCRIPT, GSM8K_SCRIPT, GSM8K_RAY_SCRIPT, GSM8K_MEGATRON_SCRIPT]

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def run_python(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SFT / "gsm8k" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def call_main(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As `run_python`, in this process: a process of its own takes a second."""
    sys.path.insert(0, str(SFT / "gsm8k"))
    try:
        module = importlib.import_module(name)
    finally:
        sys.path.pop(0)
    command = list(map(str, arguments))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = module.main(command)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def messages_in(file: Path) -> list[list[dict[str, str]]]:
    assert check_chat_file(str(file), "messages", "data.train_files") > 0
    return pq.read_table(file).column("messages").to_pylist()


def write_lines(file: Path, rows: list[object]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# Data preparation


def test_gsm8k_from_local_files(tmp_path: Path) -> None:
    row = {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24 clips\n#### 24"}
    files = [write_lines(tmp_path / f"{split}.jsonl", [row] * count) for split, count in (("a", 3), ("b", 2))]
    result = call_main("prepare_gsm8k", "--train", files[0], "--test", files[1], "--output", tmp_path / "data")
    assert result.returncode == 0, result.stderr
    train, test = (messages_in(tmp_path / "data" / f"{split}.parquet") for split in ("train", "test"))
    assert (len(train), len(test)) == (3, 2)
    question, answer = train[0]
    assert question["role"] == "user"
    assert question["content"].startswith("Half of 48? ")
    assert answer == {"role": "assistant", "content": "48/2 = 24 clips\n#### 24"}


def test_gsm8k_goes_where_training_looks_by_default(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    result = run_python("prepare_gsm8k.py", "--train", file, "--test", file, HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "data" / "gsm8k").iterdir()} == {"train.parquet", "test.parquet"}


def test_gsm8k_rows_of_another_shape_end_in_one_sentence(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "q"}])
    result = call_main("prepare_gsm8k", "--train", file, "--test", file, "--output", tmp_path / "out")
    assert_one_error(result, "line 1, has no text in a column 'question', only prompt")
    assert_one_error(call_main("prepare_gsm8k", "--train", file), "--train and --test go together")


# Shell scripts


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A folder to put on PATH, whose `verl-speculator` and `torchrun` print what they were called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("verl-speculator", "torchrun"):
        file = folder / name
        file.write_text(f'#!/bin/sh\necho {name}\nfor a in "$@"; do echo "$a"; done\n')
        file.chmod(0o755)
    return folder


def run_script(
    script: Path | str, *arguments: str, path: Path, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{path}:/usr/bin:/bin", **environment}
    return subprocess.run([str(script), *arguments], capture_output=True, text=True, env=env, cwd=cwd, check=False)


@pytest.mark.parametrize("script", [*SCRIPTS, GSM8K_ENGINE_SCRIPT, SFT / "common.sh"], ids=lambda script: script.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name == "common.sh" or script.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("script", [*SCRIPTS, GSM8K_ENGINE_SCRIPT], ids=lambda script: script.name)
@pytest.mark.parametrize(
    "arguments", [[], ["2"], ["0", "out"], ["two", "out"], ["2", "data.train_files=a.parquet"], ["2", "--help"]]
)
def test_wrong_arguments_show_the_usage(script: Path, arguments: list[str], recorder: Path, tmp_path: Path) -> None:
    result = run_script(script, *arguments, path=recorder, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"usage: {script.name} NPROC SAVE_PATH [key=value ...]\n"


@pytest.mark.parametrize("where", ["own folder", "elsewhere"])
def test_training_script_hands_everything_on(where: str, recorder: Path, tmp_path: Path) -> None:
    own = where == "own folder"
    script = f"./{TRAIN_SCRIPT.name}" if own else TRAIN_SCRIPT
    overrides = ["model.partial_pretrain=BASE", "model.speculator.inner_dim=1024.2048", "optim.lr=5e-5"]
    cwd = TRAIN_SCRIPT.parent if own else tmp_path
    result = run_script(script, "2", "./speculator-lstm", *overrides, path=recorder, cwd=cwd)
    assert result.returncode == 0, result.stderr
    expected = ["verl-speculator", "train", "--nproc", "2", "trainer.default_local_dir='./speculator-lstm'", *overrides]
    assert result.stdout.splitlines() == expected


def test_training_script_finds_the_environment_of_the_checkout(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    copied = checkout / TRAIN_SCRIPT.relative_to(CHECKOUT)
    copied.parent.mkdir(parents=True)
    for source in (TRAIN_SCRIPT, SFT / "common.sh"):
        target = checkout / source.relative_to(CHECKOUT)
        target.write_text(source.read_text())
        target.chmod(0o755)
    result = run_script(copied, "1", "out", path=tmp_path, cwd=tmp_path)
    assert_one_error(result, "verl-speculator is neither on PATH nor in the checkout's .venv")
    command = checkout / ".venv" / "bin" / "verl-speculator"
    command.parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\necho found\n")
    command.chmod(0o755)
    assert run_script(copied, "1", "out", path=tmp_path, cwd=tmp_path).stdout == "found\n"


def test_a_folder_name_with_odd_characters_survives_hydra(recorder: Path, tmp_path: Path) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    folder = "it's, a {folder}\\ = here"
    result = run_script(TRAIN_SCRIPT, "1", folder, path=recorder, cwd=tmp_path)
    override = OverridesParser.create().parse_override(result.stdout.splitlines()[-1])
    assert override.value() == folder


def test_gsm8k_scripts_differ_in_the_launcher_only(recorder: Path, tmp_path: Path) -> None:
    data = {"DATA_DIR": str(tmp_path)}
    plain, ray = (
        run_script(script, "2", "out", "optim.lr=1e-3", path=recorder, cwd=tmp_path, **data).stdout.splitlines()
        for script in (GSM8K_SCRIPT, GSM8K_RAY_SCRIPT)
    )
    assert plain[:5] == ["torchrun", "--standalone", "--nproc_per_node=2", "-m", "verl_speculator.trainer.sft_trainer"]
    assert ray[:5] == ["verl-speculator", "train", "--ray", "--nproc", "2"]
    names = [[line for line in lines[5:] if "experiment_name" not in line] for lines in (plain, ray)]
    assert names[0] == names[1]
    assert f"data.train_files='{tmp_path}/train.parquet'" in plain
    assert plain[-1] == "optim.lr=1e-3"


def test_gsm8k_on_megatron_differs_in_the_engine_only(recorder: Path, tmp_path: Path) -> None:
    def settings(script: Path, **environment: str) -> list[str]:
        lines = run_script(script, "4", "out", path=recorder, cwd=tmp_path, **environment).stdout.splitlines()
        return [line for line in lines if "experiment_name" not in line]

    def sizes(tensor: int, pipeline: int) -> list[str]:
        keys = ("engine.tensor_model_parallel_size", "engine.pipeline_model_parallel_size")
        return ["engine=megatron", "optim=megatron", f"{keys[0]}={tensor}", f"{keys[1]}={pipeline}"]

    plain = settings(GSM8K_SCRIPT)
    assert settings(GSM8K_MEGATRON_SCRIPT) == [*plain[:5], *sizes(1, 1), *plain[5:]]
    assert settings(GSM8K_MEGATRON_SCRIPT, TP="2", PP="4") == [*plain[:5], *sizes(2, 4), *plain[5:]]


@pytest.mark.parametrize("script", [GSM8K_SCRIPT, GSM8K_MEGATRON_SCRIPT], ids=lambda script: script.name)
def test_gsm8k_script_on_several_machines(script: Path, recorder: Path, tmp_path: Path) -> None:
    machine = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host-0"}
    lines = run_script(script, "4", "out", path=recorder, cwd=tmp_path, **machine).stdout.splitlines()
    addressed = ["--nnodes=2", "--node_rank=1", "--master_addr=host-0", "--master_port=29500", "--nproc_per_node=4"]
    assert lines[1:6] == addressed
    result = run_script(script, "4", "out", path=recorder, cwd=tmp_path, NNODES="2")
    assert result.returncode != 0
    assert "NODE_RANK" in result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_settings_in_scripts_exist(script: Path, recorder: Path, tmp_path: Path) -> None:
    from verl_speculator.trainer.config.compose import load_config

    lines = run_script(script, "2", str(tmp_path / "out"), path=recorder, cwd=tmp_path).stdout.splitlines()
    config = load_config([line for line in lines if "=" in line and not line.startswith("--")])
    assert config.trainer.default_local_dir == str(tmp_path / "out")


@pytest.mark.parametrize("speculator_type", ["lstm", "mlp", "eagle3", "dflash"])
@pytest.mark.parametrize("engine", ["fsdp", "megatron"])
def test_any_speculator_on_either_engine(
    speculator_type: str, engine: str, recorder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl_speculator import cli
    from verl_speculator.trainer.config.compose import engine_name, load_config

    variables = {"TYPE": speculator_type, "ENGINE": engine, "DATA_DIR": str(tmp_path)}
    arguments = ("2", str(tmp_path / "out"), "--lr", "1e-3", "trainer.seed=3")
    lines = run_script(GSM8K_ENGINE_SCRIPT, *arguments, path=recorder, cwd=tmp_path, **variables).stdout.splitlines()
    found: list[list[str]] = []
    monkeypatch.setattr("verl_speculator.trainer.launch.launch", lambda overrides, **_: found.append(overrides))
    assert cli.main(lines[1:]) == 0
    config = load_config(found[0])
    assert engine_name(config) == engine
    assert config.model.speculator_adapter == speculator_type
    assert config.data.val_files == str(tmp_path / "test.parquet")
    assert (config.optim.lr, config.trainer.seed) == (1e-3, 3)


# README


ON_MEGATRON = ["engine=megatron", "optim=megatron"]


@pytest.mark.parametrize(
    ("page", "groups", "at_least"), [(README, [], 30), (CHECKOUT / "docs" / "training.md", ON_MEGATRON, 10)]
)
def test_tables_give_the_configuration_its_real_defaults(page: Path, groups: list[str], at_least: int) -> None:
    from verl_speculator.trainer.config.compose import load_config

    tables = re.findall(r"^\| key \| default \| meaning \|\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    rows = re.findall(r"^\| `([a-z_]+\.[a-z_.]+)` \| `([^`]+)` \|", "".join(tables), re.MULTILINE)
    assert len(rows) >= at_least
    # A page's tables are of its engine, or of FSDP.
    configs = [load_config(groups), load_config([])]
    for key, said in rows:
        node = OmegaConf.select(next(config for config in configs if has_key(config, key)), key)
        node = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        default = OmegaConf.to_container(OmegaConf.create(f"value: {said}"))["value"]
        if key in ("data.train_files", "trainer.default_local_dir"):
            default, node = (os.path.abspath(os.path.expanduser(path)) for path in (default, node))
        assert node == default, key


def has_key(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    return name in (OmegaConf.select(config, parent) or {})


@pytest.mark.slow
def test_the_python_code_of_the_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.tiny import VOCAB_SIZE, write_base_model
    from verl_speculator.models import ArcticLSTMSpeculator, ArcticLSTMSpeculatorConfig

    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    config = ArcticLSTMSpeculatorConfig(
        input_hidden_dim=32, vocab_size=VOCAB_SIZE, n_predict=3, inner_dim=8, emb_dim=8, proj_dim=8
    )
    ArcticLSTMSpeculator(config).save_pretrained(tmp_path / "checkpoint" / "speculator")
    code = code.replace("Qwen/Qwen2.5-0.5B-Instruct", str(write_base_model(tmp_path / "base")))
    code = code.replace("speculator-qwen/global_step_1000", str(tmp_path / "checkpoint"))
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    assert list(names["drafts"].shape) == [1, 3]
    assert names["result"].acceptance_length >= 1


def assert_one_error(result: subprocess.CompletedProcess[str], said: str) -> None:
    assert result.returncode == 2
    assert re.fullmatch(rf"error: .*{said}.*\n", result.stderr), result.stderr
