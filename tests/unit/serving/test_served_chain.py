"""A vocabulary matrix in shards drafts what the whole one does; weights are replaced in place."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.serving.conftest import HEADS, HIDDEN, VOCAB
from verl_speculator.errors import CheckpointError
from verl_speculator.models import ChainSpeculator
from verl_speculator.serving import base_state, served_chain
from verl_speculator.serving.served_chain import ServedChain, VocabularyShard, load_served_chain
from verl_speculator.serving.speculative_config_hook import ATTRIBUTE

SETTINGS = {
    "mlp": {},
    "mlp untied": {"tie_weights": False},
    "sum_rnn drafts": {"draft_vocab_size": 11},
    "sum_lstm": {"scale_input": True},
}


class Ranks:
    """`gather` for threads that stand for ranks: each waits for what the others have."""

    def __init__(self, size: int) -> None:
        self.parts: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def gather(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def gather(part: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = part
            self.barrier.wait()
            whole = torch.cat(self.parts, dim=-1)
            self.barrier.wait()
            return whole

        return gather


def make(name: str, make_speculator) -> tuple[ChainSpeculator, Any]:
    speculator, folder = make_speculator(name.partition(" ")[0], **SETTINGS[name])
    if speculator.draft_ids is not None:
        speculator.set_draft_ids(torch.tensor([0, 2, 3, 7, 11, 13, 20, 21, 30, 34, 36]))
        speculator.save_pretrained(folder)
    return speculator.eval(), folder


def on_ranks(size: int, folder: Any, run: Callable[[ServedChain], Any]) -> list[Any]:
    ranks = Ranks(size)

    def one(rank: int) -> Any:
        speculator = ChainSpeculator.from_pretrained(folder)
        shard = VocabularyShard(rank, size, speculator.config.head_rows, ranks.gather(rank))
        return run(ServedChain(speculator, shard=shard))

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(size)]]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_rank_drafts_what_the_whole_matrix_does(name: str, size: int, make_speculator) -> None:
    speculator, folder = make(name, make_speculator)
    generator = torch.Generator().manual_seed(0)
    hidden, token = torch.randn(40, HIDDEN, generator=generator), torch.randint(VOCAB, (40,), generator=generator)
    rows = []

    def draft(chain: ServedChain) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append(len(chain.speculator.head_weight(0)))
        third = chain.draft(hidden, token, HEADS, choose=lambda logits, head_index: logits.topk(3).indices[:, 2])
        return chain.draft(hidden, token, HEADS), third

    expected = speculator.draft(hidden, token, HEADS)
    expected_third = speculator.draft(hidden, token, HEADS, choose=lambda logits: logits.topk(3).indices[:, 2])
    for drafted, third in on_ranks(size, folder, draft):
        assert torch.equal(drafted, expected)
        assert torch.equal(third, expected_third)
    assert sum(rows) == speculator.config.head_rows, "no row is held twice"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_new_weights_lie_where_the_old_ones_did(name: str, size: int, make_speculator) -> None:
    old, folder = make(name, make_speculator)
    new = ChainSpeculator.from_config(old.config).eval()
    new.reset_parameters(torch.Generator().manual_seed(7))
    if new.draft_ids is not None:
        new.set_draft_ids(torch.arange(11) * 3)
    weights = {f"speculator.{name}": tensor for name, tensor in new.export_state_dict().items()}
    hidden, token = torch.randn(9, HIDDEN), torch.arange(9)

    def reload(chain: ServedChain) -> torch.Tensor:
        places = {name: tensor.data_ptr() for name, tensor in chain.state_dict().items()}
        names = list(weights)
        loaded = set()
        for bucket in (names[:2], names[2:]):
            loaded |= chain.load_weights((name, weights[name]) for name in bucket)
        assert loaded == {name.removeprefix("speculator.") for name in names}
        assert places == {name: tensor.data_ptr() for name, tensor in chain.state_dict().items()}
        return chain.draft(hidden, token, HEADS)

    reloaded = on_ranks(size, folder, reload) if size > 1 else [reload(ServedChain(old))]
    for drafted in reloaded:
        assert torch.equal(drafted, new.draft(hidden, token, HEADS))


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("head.0.weight", (VOCAB + 1, 24), rf"do not fit its config.json: head.0.weight \[{VOCAB + 1}, 24\]"),
        ("lm_head.weight", (VOCAB, 24), "has unexpected tensors: lm_head.weight"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(name: str, shape, sentence: str, make_speculator) -> None:
    speculator, _ = make("mlp", make_speculator)
    before = speculator.export_state_dict()
    with pytest.raises(CheckpointError, match=sentence):
        ServedChain(speculator).load_weights({"ln.0.weight": torch.zeros(24), name: torch.zeros(shape)}.items())
    for key, tensor in speculator.export_state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_draft_ids_that_cannot_be_are_refused(make_speculator) -> None:
    speculator, _ = make("sum_rnn drafts", make_speculator)
    with pytest.raises(CheckpointError, match="d2t must lead to ascending token ids below 37"):
        ServedChain(speculator).load_weights([("d2t", torch.full((11,), 30))])


def test_states_of_a_base_that_normalises_late(make_speculator) -> None:
    speculator, _ = make("mlp", make_speculator)
    norm = torch.nn.RMSNorm(HIDDEN)
    chain = ServedChain(speculator, to_state=norm)
    hidden, token = 5 * torch.randn(6, HIDDEN), torch.arange(6)
    assert torch.equal(chain.draft(hidden, token, HEADS), speculator.draft(norm(hidden), token, HEADS))
    assert not any("norm" in name for name, _ in chain.named_modules()), "it stays the base's"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_computes_in_the_type_of_the_bases_states(dtype, make_speculator, monkeypatch, caplog) -> None:
    """Which is `model_config.dtype` for a quantised base too, whatever its weights are held in."""
    speculator, folder = make("sum_lstm", make_speculator)
    served = SimpleNamespace(folder=lambda cache_dir: folder)
    vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(**{ATTRIBUTE: served}),
        model_config=SimpleNamespace(dtype=dtype),
        load_config=SimpleNamespace(download_dir=None),
    )
    monkeypatch.setattr(served_chain, "_shard", lambda speculator: None)
    monkeypatch.setattr(base_state, "find_state", lambda *_: None)
    with caplog.at_level(logging.INFO):
        chain = load_served_chain(vllm_config, torch.nn.Linear(1, 1), torch.device("cpu"))
    assert {parameter.dtype for parameter in chain.parameters()} == {dtype}
    assert f"Drafting with the ArcticLSTMSpeculator in {folder} (3 heads" in caplog.text
    hidden = torch.randn(64, HIDDEN).to(dtype)
    expected = speculator.draft(hidden.float(), torch.arange(64) % VOCAB, 1)
    agree = (chain.draft(hidden, torch.arange(64) % VOCAB, 1) == expected).float().mean()
    assert agree > 0.9
