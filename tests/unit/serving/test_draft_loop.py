"""The loop over a step's drafts, plain and in CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.serving.conftest import HEADS, HIDDEN, VOCAB
from verl_speculator.serving.draft_loop import DraftLoop
from verl_speculator.serving.served_chain import ServedChain


def make_loop(chain: ServedChain, max_batch: int, choose: Any = None) -> DraftLoop:
    weight = chain.speculator.head_weight(0)
    return DraftLoop(max_batch, HEADS, HIDDEN, weight.dtype, weight.device).draft_with(chain, choose)


def random_inputs(loop: DraftLoop, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(batch, HIDDEN, generator=generator).to(loop.hidden)
    token = torch.randint(VOCAB, (batch,), generator=generator).to(loop.token)
    loop.hidden[:batch], loop.token[:batch] = hidden, token
    return hidden, token


@pytest.mark.parametrize("kind", ["mlp", "sum_rnn", "sum_lstm"])
def test_drafts_of_any_batch(kind: str, make_speculator) -> None:
    speculator = make_speculator(kind)[0].eval()
    loop = make_loop(ServedChain(speculator), 6)
    generator = torch.Generator().manual_seed(0)
    for batch, num_tokens in ((1, HEADS), (6, HEADS), (3, 2), (2, 1)):
        expected = speculator.draft(*random_inputs(loop, batch, generator), num_tokens)
        assert torch.equal(loop.run(batch, num_tokens), expected)
        assert torch.equal(loop.drafts[:batch, :num_tokens], expected)


@pytest.mark.parametrize(
    ("max_batch", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (300, [1, 2, 4, 8, 16, 32, 64, 128, 256])]
)
def test_sizes_to_capture(max_batch: int, sizes: list[int], make_speculator) -> None:
    assert make_loop(ServedChain(make_speculator()[0]), max_batch).sizes == sizes


def test_tokens_may_be_chosen_otherwise(make_speculator) -> None:
    speculator = make_speculator("sum_lstm")[0].eval()
    seen = []

    def choose(batch: int):
        def second(logits: torch.Tensor, head_index: int) -> torch.Tensor:
            assert len(logits) == batch
            seen.append(head_index)
            return logits.topk(2).indices[:, 1]

        return second

    loop = make_loop(ServedChain(speculator), 4, choose)
    inputs = random_inputs(loop, 3, torch.Generator().manual_seed(0))
    expected = speculator.draft(*inputs, HEADS, choose=lambda logits: logits.topk(2).indices[:, 1])
    assert torch.equal(loop.run(3, HEADS), expected)
    assert seen == list(range(HEADS))


def test_what_drafts_may_come_later_and_changes_no_buffer(make_speculator) -> None:
    """vLLM discards what was allocated while weights were loaded, when it sleeps deeply."""
    loop = DraftLoop(4, HEADS, HIDDEN, torch.float32, "cpu")
    buffers = {name: value.data_ptr() for name, value in vars(loop).items() if isinstance(value, torch.Tensor)}
    assert len(buffers) == 3
    loop.draft_with(ServedChain(make_speculator()[0]))
    loop.run(4, HEADS)
    assert buffers == {name: value.data_ptr() for name, value in vars(loop).items() if isinstance(value, torch.Tensor)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["mlp", "sum_rnn", "sum_lstm"])
def test_graphs_draft_the_same_with_new_weights_too(kind: str, make_speculator) -> None:
    speculator = make_speculator(kind)[0].cuda().eval()
    loop = make_loop(ServedChain(speculator), 6)
    loop.capture({HEADS, 1})
    assert set(loop.graphs) == {(size, number) for size in (1, 2, 4, 6) for number in (1, HEADS)}
    generator = torch.Generator().manual_seed(0)
    for round_number in range(2):
        for batch in (1, 2, 3, 6, 1):
            for number in (HEADS, 1, 2):
                inputs = random_inputs(loop, batch, generator)
                assert torch.equal(loop.run(batch, number), speculator.draft(*inputs, number)), (round_number, batch)
        loop.chain.load_weights(
            (name, torch.randn(tensor.shape)) for name, tensor in speculator.export_state_dict().items()
        )
