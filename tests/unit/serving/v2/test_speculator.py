"""Our speculator on Model Runner V2, given steps as the runner gives them."""

from __future__ import annotations

import importlib.util
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.serving.conftest import HEADS, HIDDEN, VOCAB
from verl_speculator.serving.draft_loop import DraftLoop
from verl_speculator.serving.served_chain import ServedChain
from verl_speculator.serving.speculative_config_hook import has_v2

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

SLOTS = 8


@pytest.fixture
def drafter(make_speculator) -> Any:
    if not has_v2():
        pytest.skip("this vLLM has no Model Runner V2 for us")
    from verl_speculator.serving.v2.speculator import ChainDrafter

    drafter = ChainDrafter.__new__(ChainDrafter)
    drafter.model = ServedChain(make_speculator("sum_lstm")[0])
    drafter.loop = DraftLoop(SLOTS, HEADS, HIDDEN, torch.float32, "cpu").draft_with(drafter.model)
    drafter.num_speculative_steps, drafter.draft_logits = HEADS, None
    drafter.counted = []
    drafter.guard = SimpleNamespace(count=lambda accepted, drafts: drafter.counted.append((accepted.tolist(), drafts)))
    return drafter


def test_rows_and_tokens_of_random_steps(drafter) -> None:
    """Against a loop over requests: prompts in chunks, and decoding with some of the drafts rejected."""
    generator = random.Random(0)
    for _ in range(30):
        batch = generator.randrange(1, SLOTS + 1)
        drafted = [generator.randrange(0, HEADS + 1) for _ in range(batch)]
        rejected = [generator.randrange(0, count + 1) for count in drafted]
        lengths = [generator.randrange(1, 9) if count == 0 else 1 + count for count in drafted]
        ends = np.cumsum([0, *lengths])
        slots = generator.sample(range(SLOTS), batch)
        hidden, last = torch.randn(int(ends[-1]) + 3, HIDDEN), torch.randint(VOCAB, (SLOTS, 1))
        given = SimpleNamespace(
            num_reqs=batch,
            # The runner's buffers are longer than the batch.
            query_start_loc=torch.tensor([*ends.tolist(), *[int(ends[-1])] * 2], dtype=torch.int32),
            idx_mapping=torch.tensor(slots),
            num_draft_tokens_per_req=np.array(drafted, dtype=np.int32) if any(drafted) else None,
        )
        sampled = torch.tensor([1 + count - gone for count, gone in zip(drafted, rejected, strict=True)])
        wanted = generator.randrange(1, HEADS + 1)
        drafts = drafter.propose(
            given, None, None, hidden, None, sampled, torch.tensor(rejected, dtype=torch.int32), last, None, None, None,
            num_speculative_tokens=wanted,
        )  # fmt: skip
        assert drafts.shape == (batch, HEADS)
        for i, slot in enumerate(slots):
            row = hidden[int(ends[i + 1]) - 1 - rejected[i]]
            expected = drafter.model.speculator.draft(row[None], last[slot], wanted)[0]
            assert torch.equal(drafts[i, :wanted], expected)
        kept = [count - gone for count, gone in zip(drafted, rejected, strict=True)]
        assert drafter.counted.pop() == (kept, sum(count > 0 for count in drafted))


def test_no_drafts_are_made_where_none_are_wanted(drafter, monkeypatch) -> None:
    monkeypatch.setattr(drafter.loop, "run", lambda *_: pytest.fail("drafted"))
    given = SimpleNamespace(num_reqs=2, num_draft_tokens_per_req=None)
    drafts = drafter.propose(
        given, None, None, None, None, torch.ones(2), None, None, None, None, None, num_speculative_tokens=0
    )
    assert drafts.shape == (2, HEADS)


def test_a_trial_run_counts_for_nothing(drafter) -> None:
    given = SimpleNamespace(
        num_reqs=2,
        query_start_loc=torch.tensor([0, 3, 5]),
        idx_mapping=torch.tensor([0, 1]),
        num_draft_tokens_per_req=None,
    )
    drafter.propose(
        input_batch=given, attn_metadata=None, slot_mappings={}, last_hidden_states=torch.randn(5, HIDDEN),
        aux_hidden_states=None, num_sampled=torch.ones(2), num_rejected=torch.zeros(2, dtype=torch.int32),
        last_sampled=torch.zeros(SLOTS, 1, dtype=torch.long), next_prefill_tokens=None, temperature=None, seeds=None,
        dp_sync_state=None, dummy_run=True, skip_attn_for_dummy_run=True, mm_inputs=None, is_profile=True,
    )  # fmt: skip
    assert drafter.counted == []


def test_sleep_finds_the_speculators_weights(drafter) -> None:
    """Under the names of `sleep_preserve_parameter_names`, where vLLM keeps what level 2 would discard."""
    from fnmatch import filter as matching

    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    runner = SimpleNamespace(speculator=drafter)
    worker = SimpleNamespace(get_draft_model=lambda: GPUModelRunner.get_draft_model(runner))
    found = Worker._get_sleep_parameters(worker, torch.nn.Linear(2, 2))
    kept = {name: found[name] for name in matching(found, "draft.*")}
    assert {id(one) for one in kept.values()} == {id(one) for one in drafter.model.parameters()}


def test_a_failed_capture_is_told_and_drafts_go_on(drafter, monkeypatch, caplog) -> None:
    from verl_speculator.serving.v2 import speculator

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(drafter.loop, "capture", fail)
    monkeypatch.setattr(speculator, "graph_capture", lambda device: None)
    drafter.device = torch.device("cuda")
    drafter.speculative_config = SimpleNamespace(num_speculative_tokens_per_batch_size=None)
    with monkeypatch.context() as patch:
        said: list[str] = []
        patch.setattr(speculator.logger, "exception", said.append)
        drafter.capture()
    assert said == ["The drafts could not be captured in CUDA graphs; they run without, which is slower."]
    assert drafter.loop.run(1, HEADS).shape == (1, HEADS)


def test_graphs_for_every_number_of_tokens_that_vllm_may_ask_for(drafter) -> None:
    drafter.max_num_reqs = 16
    for schedule, numbers in ((None, {HEADS}), ([(1, 4, 3), (5, 8, 1), (9, 16, 0)], {3, 1})):
        drafter.speculative_config = SimpleNamespace(num_speculative_tokens_per_batch_size=schedule)
        assert drafter._numbers_of_tokens() == numbers
