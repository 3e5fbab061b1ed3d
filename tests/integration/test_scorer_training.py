"""Real GRPO steps of a scorer with verl under Ray: windows and whole answers, resumed exactly."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.conftest import run_process
from tests.support.windows import make_window, write_window_file
from verl_speculator.scorer.model import AutoModelForSPDScoring, read_config

pytestmark = pytest.mark.slow


def write_draft(base: Path, folder: Path) -> Path:
    """The target a little beside itself."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(base_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer")
    generator = random.Random(0)
    windows = []
    for prompt in range(16):
        context = [generator.randrange(3, 380) for _ in range(generator.randrange(4, 9))]
        drafts = [generator.randrange(3, 380) for _ in range(3)]
        # The first mismatch is harmful where its draft is an even token: something to learn.
        correct = [drafts[0] % 2, -1, int(generator.random() < 0.5)]
        targets = [drafts[0] + 1, drafts[1], drafts[2] + 1, 5]
        windows.append(make_window(context, drafts, targets, prompt_index=prompt, correct=correct))
    return folder, write_window_file(folder / "windows.parquet", windows), write_draft(base_model, folder / "draft")


@pytest.fixture(scope="module")
def runs(world, base_model):
    folder, windows, draft = world
    shared = [
        f"data.train_files={windows}",
        f"rollout.target_model_path={base_model}",
        "data.train_batch_size=4",
        "rollout.n=4",
        "rollout.max_new_tokens=8",
        "actor.optim.lr=0.02",
        "model.scorer.inner_dim=8",
        "trainer.save_freq=1",
    ]
    of_windows = ["actor.use_kl_loss=true", "actor.entropy_coeff=0.01", "rollout.score_momentum=0.5"]
    on_windows = [*shared, *of_windows, "trainer.total_training_steps=3"]
    resumed = [
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={folder}/whole/global_step_2",
    ]
    closed_loop = ["rollout.closed_loop=true", f"rollout.draft_model_path={draft}", "rollout.num_draft_tokens=3"]
    all_runs = [
        [*on_windows, f"trainer.default_local_dir={folder}/whole", "trainer.test_freq=3"],
        [*on_windows, f"trainer.default_local_dir={folder}/resumed", *resumed],
        [*shared, *closed_loop, f"trainer.default_local_dir={folder}/closed", "trainer.total_training_steps=2"],
    ]
    (folder / "runs.json").write_text(json.dumps(all_runs))
    result = run_process(
        [sys.executable, str(Path(__file__).with_name("scorer_runs.py")), str(folder / "runs.json")],
        timeout=1100,  # three starts of Ray, on a machine that runs other tests
        RAY_USAGE_STATS_ENABLED="0",
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-8000:]
    return folder, result.stdout


def curves(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["metrics"] for line in lines if line["metrics"]}


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"global_step_{step}" / "actor" / "scorer" / "model.safetensors")


def test_three_steps_change_the_head_and_log_what_they_did(runs):
    folder, _ = runs
    logged = curves(folder / "whole")

    assert sorted(logged) == [1, 2, 3]
    assert not torch.equal(
        weights(folder / "whole", 1)["head.out.weight"], weights(folder / "whole", 3)["head.out.weight"]
    )
    for metrics in logged.values():
        assert 0 < metrics["scorer/mismatch_accept_rate"] < 1
        assert metrics["scorer/accuracy"] <= metrics["scorer/strict_accuracy"] == 1
        assert metrics["scorer/tokens_per_target_call"] >= 1
        assert metrics["actor/grad_norm"] > 0
        # What the rollout drew from is what verl computes of the same rows.
        assert metrics["training/rollout_probs_diff_max"] < 1e-5
    assert logged[1]["actor/entropy"] > 0.5
    assert logged[1]["actor/kl_loss"] == pytest.approx(0, abs=1e-7)
    assert logged[3]["actor/kl_loss"] > 1e-6
    assert "val-scorer/mismatch_accept_rate" in logged[3]
    saved = read_config(folder / "whole/global_step_3/actor/scorer")
    assert saved.score_mean != 0
    assert 0 < saved.score_scale != 1


def test_a_resumed_run_goes_on_exactly(runs):
    folder, _ = runs
    whole, resumed = (weights(folder / name, 3) for name in ("whole", "resumed"))

    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    states = [(folder / name / "global_step_3" / "scorer_state.json").read_text() for name in ("whole", "resumed")]
    assert states[0] == states[1]
    one, other = curves(folder / "whole")[3], curves(folder / "resumed")[3]
    assert one["scorer/reward"] == other["scorer/reward"]


def test_whole_answers_train_the_head_that_decodes(runs, base_model):
    folder, _ = runs
    logged = curves(folder / "closed")

    assert sorted(logged) == [1, 2]
    assert logged[1]["scorer/mismatch_accept_rate"] == pytest.approx(0.5, abs=0.3)
    assert logged[1]["scorer/cost_price"] > 0
    assert logged[2]["training/rollout_probs_diff_max"] < 1e-5
    actor = AutoModelForSPDScoring.from_pretrained(folder / "closed/global_step_2/actor/scorer", str(base_model))
    assert actor.head.out.weight.abs().max() > 0
