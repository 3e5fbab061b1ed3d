"""Saving and resuming a run, for one process per rank (torchrun) and for a driver of workers (Ray) alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.checkpoint import layout

_POSITION_FILE = "position.json"


@dataclass
class Position:
    """How far a run has come; ``samples`` counts those of the current epoch over all ranks."""

    global_step: int = 0
    epoch: int = 0
    samples: int = 0
    total_tokens: int = 0


class RunCheckpoints:
    """Writes checkpoints that appear whole or not at all, and finds the one to resume from.

    :param engine: has ``save_checkpoint(local_path=, global_step=)`` and ``load_checkpoint(path)``: an engine, or a
        group of workers that each have one
    :param is_writer: this process prepares and commits the folders; one of all processes does
    :param barrier: waits for the other processes that call the same methods
    """

    def __init__(self, config: DictConfig, engine: Any, *, is_writer: bool, barrier: Callable[[], None]) -> None:
        self._config = config
        self._engine = engine
        self._is_writer = is_writer
        self._barrier = barrier
        self._root = Path(config.trainer.default_local_dir)
        self.position = Position()
        if is_writer:
            layout.clean_up(self._root)
        barrier()

    def save(self) -> Path:
        """Write the checkpoint of :attr:`position`; its folder."""
        step = self.position.global_step
        staging = layout.staging_folder(self._root, step)
        if self._is_writer:
            layout.open_staging(self._root, step)
        self._barrier()
        self._engine.save_checkpoint(local_path=str(staging), global_step=step)
        if self._is_writer:
            (staging / layout.RESUME_FOLDER / _POSITION_FILE).write_text(json.dumps(asdict(self.position)))
            OmegaConf.save(self._config, staging / layout.RUN_CONFIG_FILE, resolve=True)
            layout.commit(self._root, step)
            layout.keep_newest(self._root, step, self._config.trainer.max_ckpt_to_keep)
            self._copy_to_hdfs(step)
        self._barrier()
        return layout.step_folder(self._root, step)

    def load_checkpoint(self) -> int:
        """Load what ``trainer.resume_mode`` asks for, if it is there; the step to go on from.

        The name is that of verl's handler, which its trainers call once they are built.
        """
        trainer = self._config.trainer
        folder = layout.find_resume_path(self._root, trainer.resume_mode, trainer.resume_from_path)
        if folder is None:
            return 0
        if self._is_writer:
            print(f"Resuming from {folder}")
        self._engine.load_checkpoint(str(folder))
        self.position = Position(**json.loads((folder / layout.RESUME_FOLDER / _POSITION_FILE).read_text()))
        return self.position.global_step

    def _copy_to_hdfs(self, step: int) -> None:
        target = self._config.trainer.default_hdfs_dir
        if target:
            from verl.utils import hdfs_io

            hdfs_io.makedirs(target, exist_ok=True)
            hdfs_io.copy(src=str(layout.step_folder(self._root, step)), dst=target, dirs_exist_ok=True)
