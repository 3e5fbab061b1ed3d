from __future__ import annotations

import pytest

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.entry import run_trainer


def test_trains_with_the_checked_configuration(good_run) -> None:
    configs = []
    assert run_trainer(lambda config: configs.append(config) or True, good_run, world_size=2) == 0
    assert configs[0].model.speculator.inner_dim == 16


def test_a_run_that_a_scheduler_has_stopped_does_not_count_as_done(good_run) -> None:
    assert run_trainer(lambda config: False, good_run, world_size=2) == 143


def test_ranks_share_one_message_about_the_configuration(good_run, capsys) -> None:
    wrong = [*good_run, "optim.lr=-1"]
    for rank in (1, 0):
        assert run_trainer(pytest.fail, wrong, world_size=2, rank=rank, local_rank=rank) == 2
    assert capsys.readouterr().err == "error: optim.lr must be a positive number, got -1\n"


def test_each_machine_says_what_it_finds(good_run, capsys) -> None:
    """As where only the first one has the data."""
    absent = [*good_run, "data.train_files=absent.parquet"]
    for local_rank in (1, 0):
        assert run_trainer(pytest.fail, absent, world_size=4, rank=2 + local_rank, local_rank=local_rank) == 2
    err = capsys.readouterr().err
    assert err.startswith("error on rank 2: data.train_files: 'absent.parquet' does not exist")
    assert len(err.splitlines()) == 1


def test_an_error_of_one_rank_is_not_lost(good_run, capsys) -> None:
    def train(config) -> None:
        raise ConfigError("only here")

    assert run_trainer(train, good_run, world_size=2, rank=1) == 2
    assert capsys.readouterr().err == "error on rank 1: only here\n"


def test_an_error_of_a_ray_worker_is_one_sentence(good_run, capsys) -> None:
    class RayTaskError(ConfigError):
        """As Ray makes it: of the cause's type, with a traceback for a text."""

        cause = ConfigError("too wide")

    def train(config) -> None:
        raise RayTaskError("Traceback\n  ...\n")

    assert run_trainer(train, good_run, world_size=2) == 2
    assert capsys.readouterr().err == "error: too wide\n"


def test_ray_counts_workers_from_the_configuration(good_run, capsys) -> None:
    overrides = [*good_run, "trainer.nnodes=3"]
    assert run_trainer(lambda config: None, overrides, world_size=None) == 2
    assert "divisible by the 3 data-parallel ranks" in capsys.readouterr().err
