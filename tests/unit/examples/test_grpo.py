"""The world of `make demo-grpo` and its figures; a run under Ray is tests/integration/test_grpo.py."""

from __future__ import annotations

import random
from itertools import pairwise

import pyarrow.parquet as pq
import pytest

from examples.grpo.reward import LAST_WORD, STYLE, WORDS, chains, compute_score
from examples.grpo.run import grpo_progress, summarize_run, table
from examples.grpo.settings import BUDGETS, RUNS
from examples.grpo.world import RARE, VOCABULARY, speak, tokenizer, write_prompts
from verl_speculator.reports.curves import Curves
from verl_speculator.reports.following import FROZEN, LIVE, ROLLOUT


def test_chains_lead_through_all_words_and_differ():
    for topic in range(4):
        for chain in chains(topic):
            word, seen = WORDS[0], set()
            while word not in seen:
                seen.add(word)
                word = chain[word]
            assert seen == {*WORDS}
    usual, rare = chains(0)
    assert sum(usual[word] == rare[word] for word in WORDS) < 8


def test_the_policy_speaks_in_the_rare_style_as_seldom_as_it_should():
    words = speak(2, "w0", 20000, random.Random(0))
    _, rare = chains(2)
    share = sum(rare[one] == other for one, other in pairwise(words)) / (len(words) - 1)

    # What is any word, or usual, is now and then the rare one too.
    assert share == pytest.approx(RARE, abs=0.03)
    assert compute_score(STYLE, " ".join(words), "2") == pytest.approx(share)


def test_the_weak_reward_looks_at_the_last_word():
    assert compute_score(LAST_WORD, "w1 w3 w4", "0") == 1.0
    assert compute_score(LAST_WORD, "w4 w4 w3", "0") == 0.0
    assert compute_score(LAST_WORD, "", "0") == 0.0


def test_prompts_are_verls_and_words_are_tokens(tmp_path):
    write_prompts(tmp_path / "prompts.parquet", 5, 0, STYLE)
    rows = pq.read_table(tmp_path / "prompts.parquet").to_pylist()

    assert [row["data_source"] for row in rows] == [STYLE] * 5
    ids = tokenizer().apply_chat_template(rows[0]["prompt"], tokenize=True, return_dict=False)
    topic, word = rows[0]["prompt"][0]["content"].split()[1:]
    assert [VOCABULARY[token] for token in ids] == ["topic", topic, word]
    assert topic == f"t{rows[0]['reward_model']['ground_truth']}"


def test_figures_are_those_of_the_first_and_the_last_quarter():
    values = {LIVE: 2.0, FROZEN: 1.0, ROLLOUT: 3.0}
    curves = Curves("run", {name: {step: value * step for step in range(1, 9)} for name, value in values.items()})
    found = summarize_run(curves)

    assert found["steps"] == 8
    assert found["live_acceptance_length"] == {"first_quarter": 3.0, "last_quarter": 15.0}
    assert found["rollout_acceptance_length"] == {"first_quarter": 4.5, "last_quarter": 22.5}
    assert found["kl_to_first_policy"] is None
    assert table({"following": found}).splitlines()[1].split() == ["following", "7.50", "15.00", "22.50", "–", "–"]


def test_progress_is_read_from_the_trackers_line():
    line = f"step:3 - {LIVE}:2.5 - critic/score/mean:0.25 - {FROZEN}:1.5"
    assert grpo_progress(line) == "step 3  live 2.50  frozen 1.50  reward 0.25"
    assert grpo_progress("something else") is None


def test_every_budget_names_runs_that_there_are():
    for budget in BUDGETS.values():
        assert {*budget.runs} <= {*RUNS}
