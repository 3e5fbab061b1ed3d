"""Our speculator on Model Runner V2, given steps as the runner gives them."""

from __future__ import annotations

import gc
import importlib.util
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.serving.conftest import HEADS, HIDDEN, VOCAB
from verl_speculator.serving import base_state, served_chain
from verl_speculator.serving.acceptance_guard import AcceptanceGuard
from verl_speculator.serving.draft_loop import DraftLoop
from verl_speculator.serving.served_chain import ServedChain
from verl_speculator.serving.speculative_config_hook import ATTRIBUTE, has_v2

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


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: numbers read from it, and results whose size it decides."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.REFUSED), name
        to = (kwargs or {}).get("device")
        assert name != "_to_copy" or to is None, f"a copy to {to}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "settings"), [("mlp", {}), ("sum_rnn", {"draft_vocab_size": 11}), ("sum_lstm", {})])
def test_a_step_never_waits_for_the_device(kind: str, settings, drafter, make_speculator) -> None:
    drafter.loop.draft_with(ServedChain(make_speculator(kind, **settings)[0]))
    drafter.guard = AcceptanceGuard(torch.device("cpu"))
    given = SimpleNamespace(
        num_reqs=2,
        query_start_loc=torch.tensor([0, 4, 5], dtype=torch.int32),
        idx_mapping=torch.tensor([3, 1]),
        num_draft_tokens_per_req=np.array([HEADS, 0], dtype=np.int32),
    )
    sampled, rejected = torch.tensor([2, 1]), torch.tensor([2, 0], dtype=torch.int32)
    hidden, last = torch.randn(5, HIDDEN), torch.zeros(SLOTS, 1, dtype=torch.long)
    with NoWaiting():
        drafter.propose(given, None, None, hidden, None, sampled, rejected, last, None, None, None)
    assert drafter.guard.drafts == 1


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


class Pool:
    """Stands for the memory in which vLLM loads weights: gone in sleep, and back only from level 1."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors]
        self.storages = list({storage.data_ptr(): storage for storage in storages}.values())
        self.kept: list[torch.UntypedStorage] = []

    def suspend(self, level: int) -> None:
        self.kept = [storage.clone() for storage in self.storages] if level == 1 else []
        for storage in self.storages:
            storage.fill_(255)

    def resume(self, tags: list[str] | None) -> None:
        for storage, kept in zip(self.storages, self.kept, strict=bool(self.kept)):
            storage.copy_(kept)


def all_tensors() -> list[torch.Tensor]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(("kind", "settings"), [("sum_lstm", {}), ("sum_rnn", {"draft_vocab_size": 11})])
def test_drafts_after_sleep_are_those_before(level: int, kind: str, settings, drafter, make_speculator, monkeypatch):
    """By vLLM's own `sleep` and `wake_up`; all that loading has left behind is lost, but what they save and restore."""
    from fnmatch import filter as matching

    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    speculator, folder = make_speculator(kind, **settings)
    if settings:
        speculator.set_draft_ids(torch.arange(11) * 3)
        speculator.save_pretrained(folder)
    model_config = SimpleNamespace(dtype=torch.float32, enable_nccl_comm_suspend=False)
    drafter.device = torch.device("cpu")
    drafter.vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(**{ATTRIBUTE: SimpleNamespace(folder=lambda cache_dir: folder)}),
        model_config=model_config,
        load_config=SimpleNamespace(download_dir=None),
    )
    drafter.speculative_config = drafter.vllm_config.speculative_config
    monkeypatch.setattr(served_chain, "_shard", lambda speculator: None)
    monkeypatch.setattr(base_state, "find_state", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *_: (0, 0))
    before = all_tensors()
    known = set(map(id, before))
    drafter.model = drafter.load_draft_model(torch.nn.Linear(1, 1), set())
    pool = Pool([tensor for tensor in all_tensors() if id(tensor) not in known])
    weights = {parameter.untyped_storage().data_ptr() for parameter in drafter.model.parameters()}
    assert weights <= {storage.data_ptr() for storage in pool.storages}, "weights lie where sleep frees memory"

    class SleepingWorker(Worker):
        sleep_mode_backend = pool

        def __init__(self) -> None:
            self.vllm_config = drafter.vllm_config
            self.model_runner = SimpleNamespace(model=torch.nn.Linear(2, 2), speculator=drafter)
            self._sleep_saved_buffers, self._sleep_saved_draft_buffers = {}, {}
            self._sleep_saved_parameters: dict[str, torch.Tensor] = {}

        def get_draft_model(self) -> torch.nn.Module:
            return GPUModelRunner.get_draft_model(self.model_runner)

        def _save_sleep_parameters(self, model: torch.nn.Module) -> None:
            # vLLM's own passes over what lies in the CPU's memory.
            found = self._get_sleep_parameters(model)
            self._sleep_saved_parameters = {name: found[name].clone() for name in matching(found, "draft.*")}

        def synchronize_device(self) -> None: ...

    drafter.loop.hidden.normal_()
    drafter.loop.token.random_(VOCAB)
    expected = drafter.loop.run(SLOTS, HEADS).clone()
    worker = SleepingWorker()
    worker.sleep(level)
    assert all(parameter.isnan().all() for parameter in drafter.model.parameters())
    worker.wake_up()
    drafter.loop.drafts.zero_()
    assert torch.equal(drafter.loop.run(SLOTS, HEADS), expected)
    assert expected.unique().numel() > 2


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
