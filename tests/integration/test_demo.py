"""`make demo` with a small budget: the whole chain on a real language model."""

from __future__ import annotations

import json
import time

import pytest
from transformers import AutoTokenizer

from examples.demo.settings import BUDGETS
from tests.integration.conftest import REPOSITORY, run_process
from verl_speculator.models import Speculator

pytestmark = pytest.mark.slow


def test_demo_leaves_a_measured_speculator_and_reuses_it(tmp_path, warm_python) -> None:
    command = [str(warm_python), "-m", "examples.demo.run", "--budget", "small", "--output", str(tmp_path)]
    start = time.monotonic()
    first = run_process(command, cwd=REPOSITORY, timeout=1100)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    elapsed = time.monotonic() - start
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["identical_outputs"] is True
    assert summary["num_prompts"] == BUDGETS["small"].decoding.num_prompts
    assert summary["seconds"] == pytest.approx(sum(summary["seconds_per_stage"].values()), abs=0.3)  # each rounded
    assert elapsed / 2 < summary["seconds"] < elapsed
    assert set(summary["speedup_per_num_drafts"]) == {"1", "2", "3"}
    assert summary["speedup"] == max(summary["speedup_per_num_drafts"].values())
    evaluated = json.loads((tmp_path / "report" / "eval.json").read_text())
    rounds = [n for prompt in evaluated["speculators"][0]["prompts"] for n in prompt["accepted_per_round"]]
    assert summary["acceptance_length"] == pytest.approx(1 + sum(rounds) / len(rounds))
    # The base model wrote the first of the shipped answers anew, token for token.
    assert "1 written anew, and equal" in first.stdout
    page = (tmp_path / "report" / "index.html").read_text()
    assert "acceptance length" in first.stdout.lower()
    assert "train/acceptance_length" in (tmp_path / "work" / "speculator" / "metrics.jsonl").read_text()
    assert "Training" in page
    assert (tmp_path / "base" / "config.json").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "base").eos_token == "<|im_end|>"
    assert Speculator.from_pretrained(tmp_path / "speculator").n_predict > 1

    trained = (tmp_path / "speculator" / "model.safetensors").stat().st_mtime_ns
    second = run_process(command, cwd=REPOSITORY)
    assert second.returncode == 0, second.stderr[-3000:]
    assert (tmp_path / "speculator" / "model.safetensors").stat().st_mtime_ns == trained
    assert second.stdout.count("(done before)") == 4
