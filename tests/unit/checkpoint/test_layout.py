"""A checkpoint appears whole or not at all, wherever a run is killed."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from verl_speculator.checkpoint import layout
from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.models.serialization import find_folder

CONTENTS = {
    "speculator/config.json": "{}",
    "speculator/model.safetensors": "weights",
    "resume/optimizer/__0_0.distcp": "optimizer",
    "resume/scheduler.pt": "scheduler",
    "run_config.yaml": "config",
}


class Killed(BaseException):
    """Nothing may catch it, as nothing catches SIGKILL."""


def stage(root: Path, step: int, mark: str = "") -> None:
    staging = layout.open_staging(root, step)
    for name, text in CONTENTS.items():
        file = staging / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text} {step} {mark}")


def save(root: Path, step: int, mark: str = "", keep: int | None = None) -> None:
    stage(root, step, mark)
    layout.commit(root, step)
    layout.keep_newest(root, step, keep)


def mark_of(folder: Path) -> str:
    """Which save a checkpoint is of; fails if it is not whole."""
    layout.check_intact(folder)
    texts = {name: (folder / name).read_text() for name in CONTENTS}
    assert all(texts[name].startswith(CONTENTS[name]) for name in CONTENTS)
    assert len({text.split(" ", 1)[1] for text in texts.values()}) == 1
    return texts["run_config.yaml"].removeprefix("config ").strip()


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Kill before the given call (from 0) of anything that changes the file system."""
    calls = 0

    def dying(real: Callable) -> Callable:
        def run(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls - 1 == call:
                raise Killed
            return real(*args, **kwargs)

        return run

    # shutil.rmtree removes through these, file by file; a write can be cut off when the file is there and still empty.
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))

    real_write = Path.write_text

    def write_text(self: Path, text: str, *args, **kwargs) -> int:
        real_write(self, "")
        return dying(real_write)(self, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)


def is_killed(call: int, act: Callable[[Path], None], root: Path) -> bool:
    """Whether ``act`` comes as far as the given call, where it is killed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(monkeypatch, call)
        try:
            act(root)
        except Killed:
            return True
    return False


def kill_everywhere(tmp_path: Path, prepare: Callable[[Path], None], act: Callable[[Path], None]) -> Iterator[Path]:
    """Roots on which ``act`` was killed at every point, and at last one on which it was not."""
    for call in count():
        root = tmp_path / f"killed_at_{call}"
        prepare(root)
        killed = is_killed(call, act, root)
        yield root
        if not killed:
            return


def test_first_save_killed_anywhere(tmp_path) -> None:
    seen = []
    for root in kill_everywhere(tmp_path, Path.mkdir, lambda root: save(root, 10)):
        layout.clean_up(root)
        latest = layout.latest_checkpoint(root)
        seen.append(latest is not None)
        if latest is not None:
            assert mark_of(latest) == "10"
        assert {path.name for path in root.iterdir()} <= {"global_step_10", layout.TRACKER_FILE}
    assert len(seen) > 20
    assert seen == sorted(seen), "once a checkpoint is there, no later kill may lose it"
    assert seen[0] is False
    assert seen[-1] is True


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_later_save_killed_anywhere(tmp_path, keep) -> None:
    def prepare(root: Path) -> None:
        save(root, 10)
        save(root, 20)

    seen = []
    for root in kill_everywhere(tmp_path, prepare, lambda root: save(root, 30, keep=keep)):
        layout.clean_up(root)
        latest = layout.latest_checkpoint(root)
        assert latest is not None
        seen.append(mark_of(latest))
        for step in layout.complete_steps(root):
            assert mark_of(layout.step_folder(root, step)) == str(step)
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
    assert seen == sorted(seen)
    assert {"20", "30"} == set(seen)


def test_saving_a_step_again_killed_anywhere(tmp_path) -> None:
    """As after going back with resume_from_path: a later step is there already, and is not the last checkpoint."""

    def prepare(root: Path) -> None:
        for step in (10, 20, 30):
            save(root, step, "old")
        save(root, 10, "new")

    seen = []
    for root in kill_everywhere(tmp_path, prepare, lambda root: save(root, 20, "new")):
        layout.clean_up(root)
        latest = layout.latest_checkpoint(root)
        assert latest is not None
        seen.append(mark_of(latest))
        assert mark_of(layout.step_folder(root, 20)) in ("20 old", "20 new")
    assert [seen[0], seen[-1]] == ["10 new", "20 new"]
    assert seen == sorted(seen)


def test_killed_again_while_cleaning_up(tmp_path) -> None:
    """Whatever a first kill left, a second one in the clean-up loses nothing."""
    first = kill_everywhere(tmp_path / "first", lambda root: save(root, 10), lambda root: save(root, 20))
    for number, left in enumerate(first):
        after_one = shutil.copytree(left, tmp_path / "expected" / str(number))
        layout.clean_up(after_one)
        expected = layout.latest_checkpoint(after_one)
        assert expected is not None

        def prepare(root: Path, left: Path = left) -> None:
            shutil.copytree(left, root)

        for root in kill_everywhere(tmp_path / "second" / str(number), prepare, layout.clean_up):
            layout.clean_up(root)
            latest = layout.latest_checkpoint(root)
            assert latest is not None
            assert mark_of(latest) == mark_of(expected)


@pytest.fixture
def stuck(monkeypatch) -> Callable[[], None]:
    """From the call on no file named `scheduler.pt` can be removed, as if another machine had it open over NFS."""
    unlink = os.unlink

    def refuse(path, *args, **kwargs) -> None:
        if Path(path).name == "scheduler.pt":
            raise OSError(errno.EBUSY, "Device or resource busy")
        unlink(path, *args, **kwargs)

    return lambda: monkeypatch.setattr(os, "unlink", refuse)


def test_what_cannot_be_removed_does_not_end_a_run(tmp_path, stuck, monkeypatch, caplog) -> None:
    for step in (10, 20):
        save(tmp_path, step, "old")
    stage(tmp_path, 30, "unfinished")
    stuck()
    save(tmp_path, 20, "new", keep=1)
    save(tmp_path, 30, "new", keep=1)
    assert layout.complete_steps(tmp_path) == [30]
    assert mark_of(layout.step_folder(tmp_path, 30)) == "30 new"
    assert "could not be removed ([Errno 16] Device or resource busy)" in caplog.text
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name in ("scheduler.pt", "config.json")]
    assert [path.name for path in left if ".old" in str(path)] == ["scheduler.pt"] * 4, "the rest goes all the same"
    layout.clean_up(tmp_path)
    assert mark_of(layout.latest_checkpoint(tmp_path)) == "30 new"
    monkeypatch.undo()
    layout.clean_up(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"global_step_30", layout.TRACKER_FILE}


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_folder_that_cannot_be_flushed_is_no_error_and_a_file_is(tmp_path, monkeypatch, caplog, what) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) is (what == "folder"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if what == "file":
        with pytest.raises(OSError, match="Invalid argument"):
            save(tmp_path, 10)
        assert layout.latest_checkpoint(tmp_path) is None
        return
    save(tmp_path, 10)
    assert mark_of(layout.latest_checkpoint(tmp_path)) == "10"
    assert "could not be flushed to disk" in caplog.text


def test_keeps_the_newest(tmp_path) -> None:
    for step in (5, 10, 20, 100):
        save(tmp_path, step, keep=2)
    assert layout.complete_steps(tmp_path) == [20, 100]
    layout.keep_newest(tmp_path, 100, None)
    layout.keep_newest(tmp_path, 100, 0)
    assert layout.complete_steps(tmp_path) == [20, 100]


def test_the_best_is_kept_and_found(tmp_path) -> None:
    for step in (5, 10, 20):
        save(tmp_path, step)
    layout.mark_best(tmp_path, 20)
    layout.mark_best(tmp_path, 5)
    layout.keep_newest(tmp_path, 20, 1, best_step=5)
    assert layout.complete_steps(tmp_path) == [5, 20]
    assert find_folder(tmp_path) == tmp_path / "global_step_5" / "speculator"
    layout.clean_up(tmp_path)
    assert find_folder(tmp_path) == tmp_path / "global_step_5" / "speculator"


def test_steps_after_the_one_gone_back_to_are_kept(tmp_path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, keep=1)
    assert layout.complete_steps(tmp_path) == [15, 20, 30]
    assert layout.latest_checkpoint(tmp_path) == tmp_path / "global_step_15"


def test_latest_without_a_tracker_file(tmp_path) -> None:
    assert layout.latest_checkpoint(tmp_path / "absent") is None
    for step in (9, 10):
        save(tmp_path, step)
    (tmp_path / layout.TRACKER_FILE).unlink()
    assert layout.latest_checkpoint(tmp_path) == tmp_path / "global_step_10"


def test_latest_when_the_last_was_removed(tmp_path) -> None:
    for step in (9, 10):
        save(tmp_path, step)
    shutil.rmtree(tmp_path / "global_step_10")
    assert layout.latest_checkpoint(tmp_path) == tmp_path / "global_step_9"


def test_what_is_no_checkpoint_is_left_alone(tmp_path) -> None:
    save(tmp_path, 10)
    for name in ("global_step_x", "global_step_30", "other", ".hidden"):
        (tmp_path / name).mkdir()
    layout.clean_up(tmp_path)
    layout.keep_newest(tmp_path, 30, 1)
    assert {"global_step_x", "global_step_30", "other", ".hidden", "global_step_10"} <= set(os.listdir(tmp_path))
    assert layout.latest_checkpoint(tmp_path) == tmp_path / "global_step_10"


def test_staging_starts_empty(tmp_path) -> None:
    stage(tmp_path, 10)
    assert list(layout.open_staging(tmp_path, 10).iterdir()) == []


@pytest.mark.parametrize("name", [name for name in CONTENTS if "/" in name])
def test_damage_is_found(tmp_path, name) -> None:
    save(tmp_path, 10)
    file = tmp_path / "global_step_10" / name
    text = file.read_text()
    layout.check_intact(file.parents[len(Path(name).parts) - 1])
    for damaged in (text[:-1], text[:-1] + "?", None):
        file.unlink() if damaged is None else file.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"is missing|bytes instead of|is damaged") as caught:
            layout.check_intact(tmp_path / "global_step_10")
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "[]", '{"a": 1}', '{"a": ["x", "y"]}'])
def test_damaged_checksums(tmp_path, text) -> None:
    save(tmp_path, 10)
    file = tmp_path / "global_step_10" / layout.CHECKSUMS_FILE
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(CheckpointError, match=r"checksums\.json is missing or damaged"):
        layout.check_intact(tmp_path / "global_step_10")


def test_resume_path(tmp_path) -> None:
    assert layout.find_resume_path(tmp_path, "auto", None) is None
    for step in (10, 20):
        save(tmp_path, step)
    earlier = tmp_path / "global_step_10"
    assert layout.find_resume_path(tmp_path, "auto", None) == tmp_path / "global_step_20"
    assert layout.find_resume_path(tmp_path, "disable", None) is None
    for mode in ("auto", "resume_path"):
        assert layout.find_resume_path(tmp_path, mode, str(earlier)) == earlier


def test_resume_path_that_cannot_be(tmp_path) -> None:
    with pytest.raises(ConfigError, match="resume_mode must be auto, disable or resume_path"):
        layout.find_resume_path(tmp_path, "always", None)
    with pytest.raises(ConfigError, match=r"needs trainer\.resume_from_path"):
        layout.find_resume_path(tmp_path, "resume_path", None)
    with pytest.raises(ConfigError, match="must be a global_step_N folder"):
        layout.find_resume_path(tmp_path, "auto", str(tmp_path))
    with pytest.raises(MissingFileError, match="there is no folder"):
        layout.find_resume_path(tmp_path, "auto", str(tmp_path / "global_step_1"))
    (tmp_path / "global_step_2").mkdir()
    with pytest.raises(CheckpointError, match="is no complete checkpoint"):
        layout.find_resume_path(tmp_path, "auto", str(tmp_path / "global_step_2"))
