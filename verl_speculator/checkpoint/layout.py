"""Where checkpoints lie, and how one appears all at once or not at all.

::

    <trainer.default_local_dir>/
        latest_checkpointed_iteration.txt      verl's name for the file that holds the newest step
        global_step_N/
            speculator/      config.json, model.safetensors, pytorch_model.bin
            huggingface/     the base model (joint training only)
            resume/          optimizer, scheduler, random states, data position
            run_config.yaml

A checkpoint is written to a hidden folder beside its final place and renamed when every process has finished.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError

SPECULATOR_FOLDER = "speculator"
BASE_FOLDER = "huggingface"
RESUME_FOLDER = "resume"
RUN_CONFIG_FILE = "run_config.yaml"
TRACKER_FILE = "latest_checkpointed_iteration.txt"

_STEP_FOLDER = re.compile(r"global_step_(\d+)")


def step_folder(root: str | os.PathLike[str], step: int) -> Path:
    return Path(root) / f"global_step_{step}"


def step_of(folder: str | os.PathLike[str]) -> int:
    match = _STEP_FOLDER.fullmatch(Path(folder).name)
    if match is None:
        raise ConfigError(f"trainer.resume_from_path must be a global_step_N folder, got {str(folder)!r}")
    return int(match.group(1))


def open_staging(root: str | os.PathLike[str], step: int) -> Path:
    """An empty folder in which to write the checkpoint of ``step``; what a killed run left there is removed."""
    staging = staging_folder(root, step)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def commit(root: str | os.PathLike[str], step: int) -> Path:
    """Move a finished staging folder to its final place and make it the newest checkpoint."""
    staging, final, replaced = staging_folder(root, step), step_folder(root, step), _replaced(root, step)
    _sync_tree(staging)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    staging.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    tracker = Path(root) / TRACKER_FILE
    written = tracker.with_suffix(".partial")
    written.write_text(str(step))
    os.replace(written, tracker)
    _sync(Path(root))
    return final


def keep_newest(root: str | os.PathLike[str], newest_step: int, keep: int | None) -> None:
    """Remove all but the ``keep`` newest checkpoints up to ``newest_step``; None or less than 1 keeps all."""
    if not keep or keep < 1:
        return
    older = [step for step in complete_steps(root) if step <= newest_step]
    for step in older[:-keep]:
        # Renamed first: a removal cut short must not leave something that looks like a checkpoint.
        doomed = _replaced(root, step)
        shutil.rmtree(doomed, ignore_errors=True)
        step_folder(root, step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clean_up(root: str | os.PathLike[str]) -> None:
    """Undo what a run killed in :func:`commit` left half done. One process calls this, before anything is read."""
    for leftover in Path(root).glob(".global_step_*"):
        name = leftover.name.removeprefix(".")
        final = leftover.with_name(name.rpartition(".")[0])
        if leftover.suffix == ".replaced" and not final.exists() and is_complete(leftover):
            leftover.rename(final)
        elif leftover.suffix in (".partial", ".replaced"):
            shutil.rmtree(leftover, ignore_errors=True)


def is_complete(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / SPECULATOR_FOLDER / "config.json").is_file() and (Path(folder) / RESUME_FOLDER).is_dir()


def complete_steps(root: str | os.PathLike[str]) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    matches = ((_STEP_FOLDER.fullmatch(path.name), path) for path in Path(root).glob("global_step_*"))
    return sorted(int(match.group(1)) for match, path in matches if match and is_complete(path))


def latest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that the tracker file names, else the one of the highest step, else None."""
    tracker = Path(root) / TRACKER_FILE
    if tracker.is_file():
        text = tracker.read_text().strip()
        if text.isdecimal() and is_complete(step_folder(root, int(text))):
            return step_folder(root, int(text))
    steps = complete_steps(root)
    return step_folder(root, steps[-1]) if steps else None


def find_resume_path(root: str | os.PathLike[str], mode: str, path: str | None) -> Path | None:
    """The checkpoint that ``trainer.resume_mode`` and ``trainer.resume_from_path`` ask for; None starts afresh."""
    if mode not in ("auto", "disable", "resume_path"):
        raise ConfigError(f"trainer.resume_mode must be auto, disable or resume_path, got {mode!r}")
    if mode == "disable":
        return None
    if path is None:
        if mode == "resume_path":
            raise ConfigError("trainer.resume_mode=resume_path needs trainer.resume_from_path")
        return latest_checkpoint(root)
    folder = Path(path).expanduser()
    step_of(folder)
    if not folder.is_dir():
        raise MissingFileError(f"trainer.resume_from_path: there is no folder {str(folder)!r}")
    if not is_complete(folder):
        raise CheckpointError(f"trainer.resume_from_path: {str(folder)!r} is no checkpoint of a speculator training run")
    return folder


def staging_folder(root: str | os.PathLike[str], step: int) -> Path:
    return Path(root) / f".global_step_{step}.partial"


def _replaced(root: str | os.PathLike[str], step: int) -> Path:
    return Path(root) / f".global_step_{step}.replaced"


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
