"""A real run of `verl-speculator grpo`: verl's trainer under Ray, vLLM as rollout, weights through shared memory."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.conftest import run_process
from tests.support.tiny import VOCAB_SIZE, WORDS, write_base_model
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return solution_str.count("w") / 10
"""
NUM_STEPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    write_base_model(folder / "base", head_dim=32)  # the least that attention on CPU takes
    config = MLPSpeculatorConfig(input_hidden_dim=32, vocab_size=VOCAB_SIZE, n_predict=3, inner_dim=32)
    speculator = MLPSpeculator(config)
    speculator.reset_parameters(torch.Generator().manual_seed(0))
    speculator.config.torch_dtype = "float32"
    speculator.save_pretrained(folder / "speculator")
    generator = random.Random(0)
    rows = [
        {
            "data_source": "words",
            "prompt": [{"role": "user", "content": " ".join(generator.choices(WORDS, k=4))}],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index},
        }
        for index in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "prompts.parquet")
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def run(world) -> Path:
    settings = [
        f"model.path={world}/base",
        f"speculator.path={world}/speculator",
        # So that it soon drafts what is accepted: the policy repeats itself at this temperature.
        "speculator.lr=0.03",
        "rollout.temperature=0.3",
        f"data.train_files={world}/prompts.parquet",
        f"reward.custom_reward_function.path={world}/reward.py",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=24",
        "rollout.n=4",
        "rollout.engine_kwargs.vllm.max_model_len=128",
        "actor.optim.lr=1e-2",
        "actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        f"trainer.total_training_steps={NUM_STEPS}",
        f"trainer.save_freq={NUM_STEPS}",
        f"trainer.test_freq={NUM_STEPS}",
        f"trainer.validation_data_dir={world}/validation",
        f"trainer.default_local_dir={world}/run",
    ]
    result = run_process(
        [sys.executable, "-m", "verl_speculator.cli", "grpo", *settings], RAY_USAGE_STATS_ENABLED="0", cwd=world
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-9000:]
    return world


@pytest.fixture(scope="module")
def logged(run) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"] for line in lines if line["metrics"]]


def test_what_vllm_accepts_is_what_the_monitor_finds_along_the_rollouts(logged):
    assert len(logged) == NUM_STEPS
    for metrics in logged:
        measured = metrics["actor/speculator/live_acceptance_length"]
        assert metrics["rollout/spec_acceptance_length"] == pytest.approx(measured, rel=0.02)
        assert metrics["training/rollout_probs_diff_max"] < 1e-3
    # From one that knows nothing to one that has learnt, in vLLM too.
    assert logged[-1]["rollout/spec_acceptance_length"] > logged[0]["rollout/spec_acceptance_length"] + 0.05


def test_the_first_step_compares_a_speculator_with_itself(logged):
    assert logged[0]["actor/speculator/acceptance_length_difference"] == 0
    assert logged[-1]["actor/speculator/acceptance_length_difference_low"] > 0
    assert logged[0]["rollout/kl_to_first_policy"] == pytest.approx(0, abs=1e-6)
    assert logged[-1]["rollout/kl_to_first_policy"] > 1e-4


def test_after_the_last_transfer_vllm_writes_what_the_trained_policy_writes(run):
    """Validation is greedy and drafted: its answers are those of Hugging Face with the weights that were saved."""
    folder = run / "run" / f"global_step_{NUM_STEPS}" / "actor" / "huggingface"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    expected = []
    for row in pq.read_table(run / "prompts.parquet").to_pylist():
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        written = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        expected.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    answers = (run / "validation" / f"{NUM_STEPS}.jsonl").read_text().splitlines()
    assert sorted(json.loads(answer)["output"] for answer in answers) == sorted(expected)


def test_the_checkpoint_holds_the_speculator_that_learnt(run):
    folder = run / "run" / f"global_step_{NUM_STEPS}" / "actor" / "speculator"
    before, after = (load_file(one / "model.safetensors") for one in (run / "speculator", folder))

    assert before.keys() == after.keys()
    assert not torch.equal(before["head.0.weight"], after["head.0.weight"])
