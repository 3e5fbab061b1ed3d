"""The loop around steps: when it stops, what it profiles, and in which order Ray gets the rows."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.checkpoints import Position
from verl_speculator.trainer.loop import SpeculatorTrainingLoop
from verl_speculator.trainer.sft_trainer_ray import SpeculatorSFTRayTrainer


class Steps(SpeculatorTrainingLoop):
    """A loop of four steps an epoch over nothing, that writes down what it does."""

    def __init__(self, *, steps: int = 4, at: int = 0, profile: tuple[int, int] = (-1, -1), **trainer: Any) -> None:
        self.did: list[str] = []
        settings = {"val_before_train": False, "val_only": False, "default_local_dir": "runs", "logger": []}
        settings |= {"early_stop_patience": None, **trainer}
        self.config = OmegaConf.create(
            {"trainer": {"project_name": "p", "experiment_name": "e", **settings}, "data": {}}
        )
        self.model_config = SimpleNamespace(
            speculator_adapter="verl_speculator.adapters.LSTMSpeculatorAdapter", speculator={"n_predict": 2}
        )
        self.start_profile_step, self.end_profile_step = profile
        self.training_client = SimpleNamespace(
            start_profile=lambda: self.did.append("profile"), stop_profile=lambda: self.did.append("end of profile")
        )
        self.processes = SimpleNamespace(is_any=lambda flag: flag, largest=lambda value: value)
        self.ckpt_handler = SimpleNamespace(position=Position(at), save=self._save, close=lambda: None)
        self.train_sampler = SimpleNamespace(set_epoch=lambda epoch: None, skip_once=lambda samples: None)
        self.train_dataloader, self.val_dataloader = [{}] * 4, [{}] * 3
        self.steps_per_epoch, self.global_batch_size, self.total_training_steps = 4, 1, steps
        self.save_freq = self.test_freq = 100
        self.sigterm_at: str | None = None

    def _save(self) -> Path:
        self.did.append(f"save {self.ckpt_handler.position.global_step}")
        return Path("folder")

    def _tensordict(self, batch: Any) -> Any:
        from verl.utils import tensordict_utils as tu

        return tu.get_tensordict({"input_ids": torch.zeros(1, 1)}, {})

    def _get_batch_seqlens(self, data: Any) -> list[int]:
        return [1]

    def _do(self, what: str) -> None:
        self.did.append(what)
        if what == self.sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def train_batch(self, batch: Any) -> None:
        self._do(f"step {self.ckpt_handler.position.global_step}")

    def infer_batch(self, batch: Any) -> None:
        self._do("validate")

    def data_shard(self) -> tuple[int, int]:
        return 0, 1

    def data_parallel_size(self) -> int:
        return 1

    def is_logging(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("at", "finished", "done"),
    [
        (None, True, ["step 1", "step 2", "validate", "validate", "validate", "save 2"]),
        ("step 1", False, ["step 1", "save 1"]),
        # The last step's checkpoint is the whole run.
        ("step 2", True, ["step 1", "step 2", "save 2"]),
        ("validate", True, ["step 1", "step 2", "validate", "save 2"]),
    ],
)
def test_sigterm_saves_and_stops(at, finished, done) -> None:
    loop = Steps(steps=2)
    loop.sigterm_at = at
    before = signal.getsignal(signal.SIGTERM)
    assert loop.fit() is finished
    assert loop.did == done
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("accepted", "saved", "best"),
    [
        # Every best one is saved, and the last one, from which nothing goes on.
        ([1.5, 2.0, 2.0, 1.9], [1, 2, 4], 2),
        ([2.0, 1.0, 2.1, 1.0, 1.0], [1, 3, 5], 3),
        ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1, 2, 3, 4, 5, 6], 6),
    ],
)
def test_stops_when_validation_gains_nothing(accepted, saved, best, monkeypatch) -> None:
    loop = Steps(steps=6, early_stop_patience=2)
    loop.test_freq = 1
    monkeypatch.setattr(loop, "_validate", lambda step: accepted[step - 1])
    assert loop.fit() is True
    assert [did for did in loop.did if did.startswith("save")] == [f"save {step}" for step in saved]
    assert loop.ckpt_handler.position.best_step == best
    assert loop.ckpt_handler.position.global_step == len(accepted)
    # The same command again.
    loop.did = []
    assert loop.fit() is True
    assert loop.did == []


def test_an_early_stop_needs_something_to_stop_by(monkeypatch) -> None:
    loop = Steps(steps=6, early_stop_patience=2)
    loop.test_freq = 1
    with pytest.raises(ConfigError, match=r"early_stop_patience: validation measures no acceptance length"):
        loop.fit()


def test_a_finished_run_trains_no_further_and_says_so(monkeypatch, capsys) -> None:
    loop = Steps(steps=2, at=2)
    monkeypatch.setattr(loop, "_say", print)
    assert loop.fit() is True
    assert loop.did == []
    assert capsys.readouterr().out == (
        "Nothing to train: this run ended with step 2, its results are in runs; to train longer raise "
        "trainer.total_epochs, trainer.total_training_steps or, where it was set, trainer.early_stop_patience\n"
    )


@pytest.mark.parametrize(
    ("interval", "at", "done"),
    [
        ((2, 3), 0, ["step 1", "profile", "step 2", "step 3", "end of profile", "step 4"]),
        # Before anything that comes after the last step.
        ((4, 4), 0, ["step 1", "step 2", "step 3", "profile", "step 4", "end of profile"]),
        ((3, 9), 0, ["step 1", "step 2", "profile", "step 3", "step 4", "end of profile"]),
        ((1, 3), 2, ["profile", "step 3", "end of profile", "step 4"]),
        ((1, 2), 2, ["step 3", "step 4"]),
        ((-1, -1), 0, ["step 1", "step 2", "step 3", "step 4"]),
    ],
)
def test_a_profile_ends_with_its_last_step(interval, at, done) -> None:
    loop = Steps(profile=interval, at=at)
    loop.ckpt_handler.position.samples = at
    loop.fit()
    steps = [what for what in loop.did if what.startswith("step") or what.endswith("profile")]
    assert steps == done
    if interval == (4, 4):
        assert loop.did.index("end of profile") < loop.did.index("validate")


@pytest.mark.parametrize("balance", [False, True])
def test_ray_balances_the_work_of_its_ranks(balance) -> None:
    from verl.utils import tensordict_utils as tu

    lengths = [100, 90, 4, 3, 2, 1, 80, 2]
    rows = torch.nested.as_nested_tensor([torch.full((n,), i) for i, n in enumerate(lengths)], layout=torch.jagged)
    got = {}

    def train(batch: Any) -> Any:
        got["rows"] = [int(row[0]) for row in batch["input_ids"].unbind()]
        return SimpleNamespace(get=lambda: tu.get_tensordict({}, {"metrics": {}}))

    trainer = object.__new__(SpeculatorSFTRayTrainer)
    engine = {"ulysses_sequence_parallel_size": 1}
    workers = {"n_gpus_per_node": 2, "nnodes": 1, "balance_batch": balance}
    trainer.config = OmegaConf.create({"trainer": workers, "engine": engine})
    trainer.training_client = SimpleNamespace(train_batch=train)
    trainer.train_batch(tu.get_tensordict({"input_ids": rows}, {"temperature": 1.0}))
    assert sorted(got["rows"]) == list(range(8))
    work = [sum(lengths[row] for row in half) for half in (got["rows"][:4], got["rows"][4:])]
    assert (abs(work[0] - work[1]) < 100) is balance
    assert balance or got["rows"] == list(range(8))
