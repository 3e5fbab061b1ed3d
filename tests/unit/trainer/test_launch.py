from __future__ import annotations

import pytest

from verl_speculator.errors import ConfigError
from verl_speculator.trainer import launch


@pytest.fixture
def devices(monkeypatch):
    def have(number: int) -> None:
        monkeypatch.setattr(launch, "_count_devices", lambda: number)

    have(0)
    return have


def test_torchrun_command(devices, good_run, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    command, environment = launch.plan(good_run, num_processes=2, use_ray=False)
    assert "--nproc_per_node=2" in command
    assert command[command.index("verl_speculator.trainer.sft_trainer") + 1 :] == good_run
    assert environment["OMP_NUM_THREADS"] == "4"


def test_one_process_per_device(devices, good_run) -> None:
    assert "--nproc_per_node=1" in launch.plan(good_run, num_processes=None, use_ray=False)[0]
    devices(4)
    command, _ = launch.plan(good_run, num_processes=None, use_ray=False)
    assert "--nproc_per_node=4" in command


def test_ray_command(devices, good_run) -> None:
    command, _ = launch.plan(good_run, num_processes=2, use_ray=True)
    assert command[1:3] == ["-m", "verl_speculator.trainer.sft_trainer_ray"]
    assert command[-1] == "trainer.n_gpus_per_node=2"
    own = [*good_run, "trainer.n_gpus_per_node=4"]
    assert launch.plan(own, num_processes=None, use_ray=True)[0][-1] == "trainer.n_gpus_per_node=4"


def test_a_process_of_torchruns_becomes_the_trainer(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    command, _ = launch.plan(["a=1"], num_processes=None, use_ray=False)
    assert command[1:] == ["-m", "verl_speculator.trainer.sft_trainer", "a=1"]
    for num_processes, use_ray, option in ((2, False, "--nproc"), (None, True, "--ray")):
        with pytest.raises(ConfigError, match=f"{option} has no meaning under torchrun: leave it out"):
            launch.plan(["a=1"], num_processes=num_processes, use_ray=use_ray)


def test_processes_of_all_nodes_are_counted(devices, good_run) -> None:
    with pytest.raises(ConfigError, match="divisible by the 6 data-parallel ranks"):
        launch.plan([*good_run, "trainer.nnodes=3"], num_processes=2, use_ray=True)


@pytest.mark.parametrize(
    ("num_processes", "override", "reason"),
    [
        (0, "optim.lr=1", "--nproc must be at least 1, got 0"),
        (3, "optim.lr=1", "--nproc=3 is more than the 2 devices"),
        (2, "trainer.nnodes=2", "trainer.nnodes must be 1 here"),
        (2, "model.speculator.n_predict=0", "n_predict must be a positive integer"),
    ],
)
def test_what_cannot_start(devices, good_run, num_processes, override, reason) -> None:
    devices(2)
    with pytest.raises(ConfigError, match=reason):
        launch.plan([*good_run, override], num_processes=num_processes, use_ray=False)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("engine.strategy=fsdp", "engine.strategy=fsdp cannot run on CPU: use engine.strategy=fsdp2"),
        ("engine.param_offload=true", "engine.param_offload=true has no meaning on CPU"),
        ("engine.ulysses_sequence_parallel_size=2", "must be 1 on CPU"),
    ],
)
def test_what_cannot_start_on_cpu(devices, good_run, override, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        launch.plan([*good_run, override], num_processes=2, use_ray=False)
    devices(2)
    launch.plan([*good_run, override], num_processes=2, use_ray=False)
