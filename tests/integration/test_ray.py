"""The Ray twin: two workers, the same numbers as torchrun."""

from __future__ import annotations

import pytest
import torch

from tests.integration.test_training import STEPS, Runs, metrics_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory, torchrun) -> Runs:
    return Runs(tmp_path_factory.mktemp("ray"), torchrun)


def test_ray_trains_like_torchrun_and_resumes(runs, verl_speculator) -> None:
    common = ["model.speculator.method=sum_lstm", "trainer.save_freq=2"]
    whole = f"trainer.total_training_steps={STEPS}"
    [reference] = runs.run(1, runs.overrides("torchrun", *common, whole))

    stopped = runs.overrides("ray", *common, "trainer.total_training_steps=4")
    first = verl_speculator("train", "--ray", "--nproc", "2", *stopped)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-6000:]
    second = verl_speculator("train", "--ray", "--nproc", "2", *runs.overrides("ray", *common, whole))
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-6000:]

    metrics = metrics_of(first.stdout) | metrics_of(second.stdout)
    assert sorted(metrics_of(second.stdout)) == [5, STEPS]
    for step in range(1, STEPS + 1):
        for name in ("train/loss", "train/grad_norm", "train/head_0/accuracy", "train/global_tokens"):
            assert metrics[step][name] == pytest.approx(reference[step][name], rel=1e-4)
    assert metrics[4]["val/loss"] > metrics[STEPS]["val/loss"]
    assert metrics[STEPS]["val/loss"] == pytest.approx(reference[STEPS]["val/loss"], rel=1e-4)
    for name, tensor in runs.weights("torchrun").items():
        torch.testing.assert_close(runs.weights("ray")[name], tensor, rtol=0, atol=5e-5)
