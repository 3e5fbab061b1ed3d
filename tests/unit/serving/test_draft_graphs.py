"""CUDA graphs of the draft loop give the drafts of the plain loop."""

from __future__ import annotations

import pytest
import torch

from tests.unit.serving.conftest import HEADS, HIDDEN, VOCAB
from verl_speculator.serving.draft_graphs import DraftGraphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["mlp", "sum_rnn", "sum_lstm"])
def test_same_drafts(kind: str, make_speculator) -> None:
    speculator = make_speculator(kind)[0].cuda().eval()
    graphs = DraftGraphs(speculator, max_batch=6, num_tokens=HEADS)
    assert graphs.sizes == [1, 2, 4, 8]
    generator = torch.Generator().manual_seed(0)
    kept = []
    for batch in (1, 2, 3, 6, 8, 9, 1):
        hidden = torch.randn(batch, HIDDEN, generator=generator).cuda()
        token = torch.randint(VOCAB, (batch,), generator=generator).cuda()
        drafted, expected = (draft(hidden, token, HEADS) for draft in (graphs.draft, speculator.draft))
        kept.append((drafted, expected))
        assert torch.equal(graphs.draft(hidden, token, 1), speculator.draft(hidden, token, 1))
    for drafted, expected in kept:
        assert torch.equal(drafted, expected), "a later replay must not change earlier drafts"
