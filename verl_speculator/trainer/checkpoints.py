"""A run's folder: held by one run at a time, seen by all its processes, saved to and resumed from."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from verl_speculator.checkpoint import layout
from verl_speculator.errors import ConfigError
from verl_speculator.trainer.processes import Processes
from verl_speculator.trainer.resuming import ORIGIN_FILE, describe_origin

LOCK_FILE = ".lock"
_POSITION_FILE = f"{layout.RESUME_FOLDER}/position.json"

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass
class Position:
    """How far a run has come; `samples` counts those of the current epoch over all ranks.

    The last three are for a run that stops early: the best validation, its step, and how many have followed it.
    """

    global_step: int = 0
    epoch: int = 0
    samples: int = 0
    total_tokens: int = 0
    best_value: float | None = None
    best_step: int = 0
    validations_since_best: int = 0

    def note_validation(self, value: float) -> bool:
        """Whether a validation of this step with this result, of which more is better, is the best so far."""
        is_best = self.best_value is None or value > self.best_value
        if is_best:
            self.best_value, self.best_step, self.validations_since_best = value, self.global_step, 0
        else:
            self.validations_since_best += 1
        return is_best


class RunCheckpoints:
    """Writes checkpoints that appear whole or not at all, and finds the one to resume from.

    What there is one of, a decision or a file, is made by the first process, and the others take what came of it.

    Args:
        config: the run's configuration.
        engine: has `save_checkpoint(local_path=, global_step=)` and `load_checkpoint(path)`: an engine, or a group of
            workers that each have one.
        processes: those that each make one of these objects.

    Attributes:
        position: how far the run has come.

    Raises:
        ConfigError: another run holds the folder, or a process does not see it. Only the first process raises it; the
            others leave with the same exit status.
    """

    def __init__(self, config: DictConfig, engine: Any, processes: Processes) -> None:
        self._config = config
        self._engine = engine
        self._processes = processes
        self._root = Path(config.trainer.default_local_dir)
        self._lock: IO[str] | None = None
        self.position = Position()
        probe = processes.on_first(self._take_folder)
        blind = processes.that_miss(probe)
        processes.on_first(lambda: self._check_shared(probe, blind))

    def save(self) -> Path:
        """Write the checkpoint of `position`; its folder."""
        step = self.position.global_step
        staging = self._processes.on_first(lambda: layout.open_staging(self._root, step))
        # Ends when every process has written its part.
        self._engine.save_checkpoint(local_path=str(staging), global_step=step)
        return self._processes.on_first(lambda: self._commit(staging, step))

    def load_checkpoint(self) -> int:
        """Load what `trainer.resume_mode` asks for, if it is there; the step to go on from.

        The name is that of verl's handler, which its trainers call once they are built.
        """
        trainer = self._config.trainer
        folder = self._processes.on_first(
            lambda: layout.find_resume_path(self._root, trainer.resume_mode, trainer.resume_from_path)
        )
        if folder is None:
            return 0
        if self._processes.is_first:
            print(f"Resuming from {folder}")
        self._engine.load_checkpoint(str(folder))
        position = self._processes.on_first(lambda: json.loads((folder / _POSITION_FILE).read_text()))
        self.position = Position(**position)
        return self.position.global_step

    def close(self) -> None:
        """Leave the folder to other runs."""
        if self._lock is not None:
            self._lock.close()

    def _take_folder(self) -> Path:
        # First: cleaning up would remove what another run is just writing.
        self._lock = lock(self._root)
        layout.clean_up(self._root)
        # Before training: the files may change while it goes on.
        self._origin = describe_origin(self._config)
        # A name that nobody has asked for yet, so that no file system remembers it as missing.
        probe = self._root / f".seen_by_all_{uuid.uuid4().hex}"
        probe.touch()
        return probe

    def _check_shared(self, probe: Path, blind: list[int]) -> None:
        probe.unlink(missing_ok=True)
        if blind:
            raise ConfigError(
                f"trainer.default_local_dir: what is written to {str(self._root)!r} is not seen by rank "
                f"{', '.join(map(str, blind))}: give a folder that all machines share"
            )

    def _commit(self, staging: Path, step: int) -> Path:
        (staging / _POSITION_FILE).write_text(json.dumps(asdict(self.position)))
        (staging / ORIGIN_FILE).write_text(json.dumps(self._origin, indent=2) + "\n")
        OmegaConf.save(self._config, staging / layout.RUN_CONFIG_FILE, resolve=True)
        folder = layout.commit(self._root, step)
        best = self.position.best_step if self.position.best_value is not None else None
        if best == step:
            layout.mark_best(self._root, step)
        layout.keep_newest(self._root, step, self._config.trainer.max_ckpt_to_keep, best)
        return folder


def lock(root: Path, patience_s: float = 10) -> IO[str]:
    """Hold a run's folder until the returned file is closed or this process has ended, however it ends.

    Args:
        root: the folder, which must be there.
        patience_s: how long to wait for a run that is just ending.

    Raises:
        ConfigError: another run, here or on another machine, holds it.
    """
    # Not a file that says who is there: a killed process, here or elsewhere, takes its lock with it. Linux carries
    # flock over NFS. The file itself stays, since removing it would part those that hold it from those that ask.
    stream = (root / LOCK_FILE).open("a+")
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                log.warning("%s cannot be locked (%s): see to it that no other run uses it", root, error.strerror)
                return stream
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            stream.seek(0)
            raise ConfigError(
                f"trainer.default_local_dir: another run, {stream.read().strip() or 'of an unknown process'}, is "
                f"writing to {str(root)!r}: wait for its end or give another folder"
            ) from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        return stream
