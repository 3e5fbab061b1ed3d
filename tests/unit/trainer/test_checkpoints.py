"""A run's folder belongs to one run at a time, all its processes see it, and one of them decides."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from verl_speculator.checkpoint import layout
from verl_speculator.errors import CheckpointError, ConfigError
from verl_speculator.trainer import checkpoints
from verl_speculator.trainer.checkpoints import LOCK_FILE, Position, RunCheckpoints
from verl_speculator.trainer.config.compose import load_config
from verl_speculator.trainer.processes import Processes, comes_to_sight
from verl_speculator.trainer.resuming import ORIGIN_FILE, describe_origin


class Alone(Processes):
    """One process, with workers of which some do not see the folder."""

    is_first = True

    def __init__(self, *blind: int) -> None:
        self.blind = list(blind)

    def from_first(self, value: Any) -> Any:
        return value

    def is_any(self, flag: bool) -> bool:
        return flag

    def largest(self, value: float) -> float:
        return value

    def that_miss(self, file: Path) -> list[int]:
        assert file.is_file()
        return self.blind


class Second(Alone):
    """A process that sees nothing of the first one's folder, and is told what that one has decided."""

    is_first = False

    def __init__(self, told: queue.Queue) -> None:
        self.told = told

    def from_first(self, value: Any) -> Any:
        return self.told.get(timeout=5)

    def that_miss(self, file: Path) -> list[int]:
        return []


class First(Alone):
    def __init__(self, told: queue.Queue) -> None:
        super().__init__()
        self.told = told

    def from_first(self, value: Any) -> Any:
        self.told.put(value)
        return value


class Engine:
    """Writes and reads one number, as a model would."""

    def __init__(self) -> None:
        self.number = 0
        self.loaded: list[str] = []

    def save_checkpoint(self, local_path: str, global_step: int) -> None:
        for part, name in (("speculator", "config.json"), ("resume", "state.json")):
            (Path(local_path) / part).mkdir(exist_ok=True)
            (Path(local_path) / part / name).write_text(str(self.number))

    def load_checkpoint(self, path: str) -> None:
        self.loaded.append(path)
        self.number = int((Path(path) / "resume" / "state.json").read_text())


@pytest.fixture
def config(good_run, tmp_path) -> DictConfig:
    (tmp_path / "checkpoints").mkdir()
    return load_config(good_run)


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch) -> None:
    lock = checkpoints.lock
    monkeypatch.setattr(checkpoints, "lock", lambda root: lock(root, patience_s=0))


def test_saves_and_goes_on(config, tmp_path, capsys) -> None:
    engine = Engine()
    run = RunCheckpoints(config, engine, Alone())
    assert run.load_checkpoint() == 0
    engine.number, run.position = 7, Position(global_step=3, epoch=1, samples=12, total_tokens=99)
    assert run.save() == tmp_path / "checkpoints" / "global_step_3"
    run.close()
    later = RunCheckpoints(config, Engine(), Alone())
    assert later.load_checkpoint() == 3
    assert later.position == Position(3, 1, 12, 99)
    assert f"Resuming from {tmp_path / 'checkpoints' / 'global_step_3'}" in capsys.readouterr().out
    origin = json.loads((tmp_path / "checkpoints" / "global_step_3" / ORIGIN_FILE).read_text())
    assert origin == describe_origin(config)
    hidden = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")}
    assert hidden == {LOCK_FILE}


def test_a_second_run_in_the_same_folder_is_refused(config, tmp_path) -> None:
    root = tmp_path / "checkpoints"
    first = RunCheckpoints(config, Engine(), Alone())
    staging = layout.open_staging(root, 5)
    with pytest.raises(ConfigError) as caught:
        RunCheckpoints(config, Engine(), Alone())
    assert str(caught.value) == (
        f"trainer.default_local_dir: another run, process {os.getpid()} on {socket.gethostname()}, is writing to "
        f"{str(root)!r}: wait for its end or give another folder"
    )
    assert staging.is_dir(), "what the first run is writing must not be cleaned up"
    first.close()
    RunCheckpoints(config, Engine(), Alone()).close()


def test_a_killed_run_holds_nothing(config, tmp_path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom verl_speculator.trainer.checkpoints import lock\n"
        "held = lock(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "checkpoints")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"another run, process {other.pid} on "):
            RunCheckpoints(config, Engine(), Alone())
        other.send_signal(signal.SIGKILL)
        other.wait(10)
    RunCheckpoints(config, Engine(), Alone()).close()


def test_a_file_system_without_locks_is_a_warning(config, monkeypatch, caplog) -> None:
    def flock(*args) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    RunCheckpoints(config, Engine(), Alone()).close()
    assert "cannot be locked (Function not implemented)" in caplog.text


def test_a_folder_that_not_all_processes_see_is_refused(config, tmp_path) -> None:
    with pytest.raises(ConfigError) as caught:
        RunCheckpoints(config, Engine(), Alone(2, 3))
    assert str(caught.value) == (
        f"trainer.default_local_dir: what is written to {str(tmp_path / 'checkpoints')!r} is not seen by rank 2, 3: "
        "give a folder that all machines share"
    )
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {LOCK_FILE}


def test_a_file_that_comes_late_is_waited_for(tmp_path) -> None:
    timer = threading.Timer(0.3, (tmp_path / "late").touch)
    timer.start()
    assert comes_to_sight(tmp_path / "late", patience_s=20)
    assert not comes_to_sight(tmp_path / "never", patience_s=0)


@pytest.fixture
def pair(config, tmp_path) -> tuple[RunCheckpoints, Callable[[], RunCheckpoints]]:
    """The first process's object, and how the second one's is made; that one's folder is empty."""
    told: queue.Queue = queue.Queue()
    elsewhere = config.copy()
    elsewhere.trainer.default_local_dir = str(tmp_path / "elsewhere")
    return RunCheckpoints(config, Engine(), First(told)), lambda: RunCheckpoints(elsewhere, Engine(), Second(told))


def test_one_process_decides_from_where_to_go_on(config, pair, tmp_path) -> None:
    first, make_second = pair
    first.position.global_step = 4
    first.save()
    second = make_second()
    # What was said about the save is not for the one that has come later.
    second._processes.told.get(), second._processes.told.get()
    assert first.load_checkpoint() == second.load_checkpoint() == 4
    assert second._engine.loaded == [str(tmp_path / "checkpoints" / "global_step_4")]
    assert not (tmp_path / "elsewhere").exists(), "the second process writes nothing"


def test_an_error_of_the_one_that_decides_ends_all(config, pair, tmp_path) -> None:
    first, make_second = pair
    second = make_second()
    config.trainer.resume_from_path = str(tmp_path / "global_step_9")
    (tmp_path / "global_step_9").mkdir()
    with pytest.raises(CheckpointError, match="is no complete checkpoint"):
        first.load_checkpoint()
    with pytest.raises(SystemExit) as leave:
        second.load_checkpoint()
    assert leave.value.code == 2
