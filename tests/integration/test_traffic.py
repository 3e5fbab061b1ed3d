"""What a step sends on 512 ranks, counted with the engine itself, against the page that says so (docs/scaling.md)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.integration.conftest import REPOSITORY, own_stderr, run_process
from tests.support.tiny import tiny_tokenizer

pytestmark = pytest.mark.slow

RANKS, WIDTH, LENGTH = 512, 512, 32
CASES = {
    "plain": [],
    "soft_targets": ["model.speculator.objective=kl"],
    "within_a_machine": ["model.speculator_shard_size=8"],
    "stays_gathered": ["engine.reshard_after_forward=false"],
}


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("scale_model", REPOSITORY / "benchmarks" / "scale_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, dict[str, dict[str, int]]]:
    """Two rows on each rank, in micro-batches of one. Matrices of fewer rows than ranks would be filled up."""
    folder = tmp_path_factory.mktemp("traffic")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=WIDTH,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    shared = [
        f"model.path={folder}",
        *(f"model.speculator.{name}_dim={WIDTH}" for name in ("inner", "emb", "proj")),
        "model.speculator.method=sum_lstm",
        "model.speculator.tie_lstm_embs=true",
        "model.speculator.n_predict=3",
        "data.use_dynamic_bsz=false",
        "data.micro_batch_size_per_gpu=1",
    ]
    cases = folder / "cases.json"
    cases.write_text(json.dumps({name: [*shared, *own] for name, own in CASES.items()}))
    script = str(Path(__file__).with_name("traffic.py"))
    result = run_process([sys.executable, script, str(RANKS), str(cases), str(folder / "out.json")])
    assert result.returncode == 0, own_stderr(result.stderr)[-5000:]
    return json.loads((folder / "out.json").read_text())


def test_a_step_sends_what_the_page_counts(model, counted, monkeypatch) -> None:
    """A collective more, or a larger one, is more than the formula has."""
    monkeypatch.setattr(model, "BF16", 4)  # on a CPU everything is float32
    base = model.Base("tiny", WIDTH, 2, WIDTH, 8, 8, vocab=WIDTH)
    # Its norms have no part in the formulas of a page about thousands of millions.
    speculator = model.Speculator(WIDTH, 3, WIDTH, WIDTH)
    norms = 2 * 2 * WIDTH
    plain = model.Run(RANKS, RANKS, tokens=2 * LENGTH, micro_batch=LENGTH)
    runs = {
        "plain": plain,
        "soft_targets": dataclasses.replace(plain, soft_targets=True),
        "within_a_machine": dataclasses.replace(plain, shard=8),
        "stays_gathered": dataclasses.replace(plain, stays_gathered=True),
    }
    for name, run in runs.items():
        traffic = counted[name]["traffic"]
        # The base stays cut over all: the key is the speculator's.
        within, between = model.speculator_bytes(base, speculator, run)
        expected = {
            "gathered and reduced": within / (1 - 1 / run.shard)
            + model.base_bytes(base, dataclasses.replace(run, shard=RANKS)) / (1 - 1 / RANKS)
            + 2 * 4 * norms,
            "between groups": 0.0 if run.shard == RANKS else between / (2 * (1 - run.shard / RANKS)) + 4 * norms / 8,
        }
        found = {
            "gathered and reduced": sum(
                traffic[kind]["bytes"] for kind in ("_allgather_base_", "_reduce_scatter_base_")
            ),
            "between groups": traffic.get("allreduce_", {"bytes": 0})["bytes"],
        }
        assert found == pytest.approx(expected, rel=1e-9), name
        # Counts of trained positions, micro-batches and tokens; sums of the step; the norm of the gradient.
        assert traffic["small"]["calls"] <= 5, name


def test_collectives_do_not_multiply(counted) -> None:
    """In two micro-batches: two layers, embeddings and final norm each time, and the speculator once in a step."""
    calls = {name: {kind: seen["calls"] for kind, seen in case["traffic"].items()} for name, case in counted.items()}
    assert calls["plain"]["_allgather_base_"] == 2 * 4 + 1
    assert calls["soft_targets"]["_allgather_base_"] == 2 * 4 + 1 + 1
    assert calls["within_a_machine"]["allreduce_"] == 1
    assert calls["stays_gathered"]["_allgather_base_"] == 1
    assert {case["_reduce_scatter_base_"] for case in calls.values()} == {1}


def test_the_page_has_the_tables_of_the_script(model) -> None:
    page = (REPOSITORY / "docs" / "scaling.md").read_text()
    for table in model.tables().strip().split("\n\n"):
        assert table in page
