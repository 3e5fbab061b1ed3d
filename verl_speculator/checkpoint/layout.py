"""Where checkpoints lie, and how one appears all at once or not at all.

    <trainer.default_local_dir>/
        latest_checkpointed_iteration.txt      verl's name for the file that holds the newest step
        best_checkpoint.txt                    the global_step_N that did best in validation, where a run looks for it
        global_step_N/
            speculator/      config.json, model.safetensors, pytorch_model.bin: what is served
            huggingface/     the base model (joint training only)
            resume/          what training goes on from: weights in their training type, optimizer, scheduler, random
                             states, data position; checksums of speculator/ and resume/
            run_config.yaml

A checkpoint is written to a hidden folder beside its final place. When every process has finished, a commit record
with its step is written, the folder is renamed and the record becomes the tracker file. A run killed after the record
was written has a checkpoint that is complete, and `clean_up` ends the commit; one killed before has none.

What only takes up room (an old checkpoint, what a killed run left) may be impossible to remove at the moment: network
file systems keep a file that somebody has open. This is a warning and no error, and the next run tries again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from itertools import count
from pathlib import Path

from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.models.serialization import BEST_FILE, SUBFOLDER

BASE_FOLDER = "huggingface"
RESUME_FOLDER = "resume"
RUN_CONFIG_FILE = "run_config.yaml"
CHECKSUMS_FILE = f"{RESUME_FOLDER}/checksums.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"

# Of torch.distributed.checkpoint, which earlier versions wrote.
_PICKLED_METADATA = f"{RESUME_FOLDER}/optimizer/.metadata"
_COMMIT_RECORD = ".commit"
_STEP_FOLDER = re.compile(r"global_step_(\d+)")
_READ_SIZE = 1 << 22

log = logging.getLogger(__name__)


def step_folder(root: str | os.PathLike[str], step: int) -> Path:
    return Path(root) / f"global_step_{step}"


def staging_folder(root: str | os.PathLike[str], step: int) -> Path:
    return Path(root) / f".global_step_{step}.partial"


def step_of(folder: str | os.PathLike[str]) -> int:
    match = _STEP_FOLDER.fullmatch(Path(folder).name)
    if match is None:
        raise ConfigError(f"trainer.resume_from_path must be a global_step_N folder, got {str(folder)!r}")
    return int(match.group(1))


def open_staging(root: str | os.PathLike[str], step: int) -> Path:
    """An empty folder in which to write the checkpoint of `step`; what a killed run left there is removed."""
    staging = staging_folder(root, step)
    if staging.exists():
        _remove(_move_aside(staging))
    staging.mkdir(parents=True)
    return staging


def commit(root: str | os.PathLike[str], step: int) -> Path:
    """Move a finished staging folder to its final place and make it the newest checkpoint."""
    staging, record = staging_folder(root, step), Path(root) / _COMMIT_RECORD
    _write_checksums(staging)
    _sync_tree(staging)
    record.write_text(str(step))
    _sync(record)
    _sync(Path(root))
    _finish_commit(root, step)
    return step_folder(root, step)


def clean_up(root: str | os.PathLike[str]) -> None:
    """Finish or undo what a killed run left half done. One process calls this, before anything is read."""
    record = Path(root) / _COMMIT_RECORD
    step = _read_step(record)
    if step is not None:
        _finish_commit(root, step)
    record.unlink(missing_ok=True)
    for leftover in Path(root).glob(".global_step_*"):
        _remove(leftover)


def mark_best(root: str | os.PathLike[str], step: int) -> None:
    """Name the checkpoint that `Speculator.from_pretrained` finds for the run's folder."""
    partial = Path(root) / f".{BEST_FILE}.partial"
    partial.write_text(f"{step_folder(root, step).name}\n")
    os.replace(partial, Path(root) / BEST_FILE)


def keep_newest(root: str | os.PathLike[str], newest_step: int, keep: int | None, best_step: int | None = None) -> None:
    """Remove all but the `keep` newest checkpoints up to `newest_step`, and the best; None or less than 1 keeps all."""
    if not keep or keep < 1:
        return
    older = [step for step in complete_steps(root) if step <= newest_step and step != best_step]
    for step in older[:-keep]:
        _remove(_move_aside(step_folder(root, step)))


def is_complete(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / SUBFOLDER / "config.json").is_file() and (Path(folder) / RESUME_FOLDER).is_dir()


def check_intact(folder: str | os.PathLike[str]) -> None:
    """Read every file that resuming needs and compare it with what was written.

    Raises:
        CheckpointError: one is missing, cut short or changed.
    """
    if (Path(folder) / _PICKLED_METADATA).exists():
        raise CheckpointError(
            f"{folder} was written by an earlier version, and reading its optimizer state could run code in it: "
            f"start from its weights with model.speculator_path={folder} and another trainer.default_local_dir"
        )
    advice = f"remove {folder} to go on from the checkpoint before it"
    try:
        expected = json.loads((Path(folder) / CHECKSUMS_FILE).read_text())
        files = [(name, int(size), int(crc)) for name, (size, crc) in expected.items()]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{Path(folder) / CHECKSUMS_FILE} is missing or damaged; {advice}") from error
    for name, size, crc in files:
        file = Path(folder) / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {advice}")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {size}; {advice}")
        if _crc32(file) != crc:
            raise CheckpointError(f"{file} is damaged, its contents have changed since it was written; {advice}")


def complete_steps(root: str | os.PathLike[str]) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    matches = ((_STEP_FOLDER.fullmatch(path.name), path) for path in Path(root).glob("global_step_*"))
    return sorted(int(match.group(1)) for match, path in matches if match and is_complete(path))


def latest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that was committed last; without a record of that the one of the highest step, if any."""
    for name in (_COMMIT_RECORD, TRACKER_FILE):
        step = _read_step(Path(root) / name)
        if step is not None and is_complete(step_folder(root, step)):
            return step_folder(root, step)
    steps = complete_steps(root)
    return step_folder(root, steps[-1]) if steps else None


def find_resume_path(root: str | os.PathLike[str], mode: str, path: str | None) -> Path | None:
    """The checkpoint that `trainer.resume_mode` and `trainer.resume_from_path` ask for; None starts afresh."""
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
        raise CheckpointError(
            f"trainer.resume_from_path: {str(folder)!r} is no complete checkpoint; "
            f"one has the folders {SUBFOLDER} and {RESUME_FOLDER}"
        )
    return folder


def _read_step(file: Path) -> int | None:
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else None


def _finish_commit(root: str | os.PathLike[str], step: int) -> None:
    """The part of a commit that can be done again from any point at which it was cut off."""
    staging, final = staging_folder(root, step), step_folder(root, step)
    if staging.exists():
        replaced = _move_aside(final) if final.exists() else None
        staging.rename(final)
        if replaced is not None:
            _remove(replaced)
    os.replace(Path(root) / _COMMIT_RECORD, Path(root) / TRACKER_FILE)
    _sync(Path(root))


def _move_aside(folder: Path) -> Path:
    """Renamed before it is removed: a removal cut short must not leave something that looks like a checkpoint."""
    names = (folder.with_name(f".{folder.name.lstrip('.')}.old{number}") for number in count())
    return folder.rename(next(name for name in names if not name.exists()))


def _remove(folder: Path) -> None:
    failures: list[BaseException] = []
    # One file that stays must not keep the others.
    shutil.rmtree(folder, onerror=lambda function, path, error: failures.append(error[1]))
    if failures:
        log.warning("%s could not be removed (%s), and takes up room until the next run", folder, failures[0])


def _write_checksums(folder: Path) -> None:
    files = (file for part in (SUBFOLDER, RESUME_FOLDER) for file in sorted((folder / part).rglob("*")))
    sums = {str(file.relative_to(folder)): (file.stat().st_size, _crc32(file)) for file in files if file.is_file()}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=2) + "\n")


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_READ_SIZE):
            crc = zlib.crc32(block, crc)
    return crc


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # A file's contents must be on the disk before a checkpoint counts; not every file system does it for folders.
        if not path.is_dir():
            raise
        log.warning("the folder %s could not be flushed to disk (%s)", path, error)
    finally:
        os.close(descriptor)
