"""Starting from the base: the closest fit of its matrices, as large as fresh weights; its own rows where they fit."""

import pytest
import torch

from verl_speculator.models import (
    ArcticLSTMSpeculator,
    ArcticLSTMSpeculatorConfig,
    MLPSpeculator,
    MLPSpeculatorConfig,
    Speculator,
)
from verl_speculator.models.base_start import BaseRows

VOCAB, HIDDEN = 61, 18
SIZES = {"input_hidden_dim": HIDDEN, "vocab_size": VOCAB, "n_predict": 3}


def _base(seed: int) -> torch.Tensor:
    """Rows of falling variance with a large mean, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0.5, -1.5, HIDDEN)
    mixing = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator)).Q
    return (torch.randn(VOCAB, HIDDEN, generator=generator) * scales) @ mixing + 3


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _distances(rows: torch.Tensor) -> torch.Tensor:
    """Between all rows, in units of the rows' size: what neither a mean, nor a rotation, nor a scale changes."""
    centred = (rows - rows.mean(0)).double()
    return torch.cdist(centred, centred) / centred.norm()


@pytest.mark.parametrize("width", [1, 5, 12])
def test_a_narrow_fit_is_the_closest_of_its_rank(width):
    base = _base(0)
    fitted, to_width = BaseRows(base).fit(width, _generator())
    centred = (base - base.mean(0)).double()
    # What it does to rows it does to any vector: up to its size.
    turned = centred.float() @ to_width.T
    torch.testing.assert_close(turned / turned.norm(), fitted / fitted.norm(), rtol=1e-4, atol=1e-5)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    closest = u[:, :width] * s[:width]
    torch.testing.assert_close(_distances(fitted), _distances(closest), rtol=1e-4, atol=1e-6)
    assert fitted.square().mean().item() == pytest.approx(1)
    columns = fitted.square().mean(0)
    assert columns.max() < 12 * columns.min(), "no column has all the energy"


@pytest.mark.parametrize("width", [HIDDEN, 25])
def test_a_wide_one_loses_nothing(width):
    base = _base(0)
    fitted, _ = BaseRows(base).fit(width, _generator())
    torch.testing.assert_close(_distances(fitted), _distances(base), rtol=1e-4, atol=1e-6)


def test_where_widths_agree_rows_are_the_bases():
    base = _base(0)
    centred = base - base.mean(0)
    fitted, to_width = BaseRows(base.bfloat16()).fit(HIDDEN, _generator())
    assert torch.equal(to_width / to_width[0, 0], torch.eye(HIDDEN))
    torch.testing.assert_close(fitted, centred / centred.square().mean().sqrt(), rtol=0.05, atol=0.02)


def _speculators():
    widths = {"inner_dim": "12", "emb_dim": "10", "proj_dim": "14"}
    yield "mlp", MLPSpeculator(MLPSpeculatorConfig(**SIZES, inner_dim=12))
    yield "mlp_untied", MLPSpeculator(MLPSpeculatorConfig(**SIZES, inner_dim=12, tie_weights=False))
    yield "sum_rnn", ArcticLSTMSpeculator(ArcticLSTMSpeculatorConfig(**SIZES, **widths))
    alike = dict.fromkeys(widths, 12)
    yield "sum_lstm_alike", ArcticLSTMSpeculator(ArcticLSTMSpeculatorConfig(**SIZES, **alike, method="sum_lstm"))
    yield "sum_lstm", ArcticLSTMSpeculator(ArcticLSTMSpeculatorConfig(**SIZES, **widths, method="sum_lstm"))
    drafts = MLPSpeculator(MLPSpeculatorConfig(**SIZES, inner_dim=12, draft_vocab_size=20))
    drafts.set_draft_ids(torch.arange(1, VOCAB, 3))
    yield "mlp_drafts", drafts


@pytest.mark.parametrize(
    ("name", "speculator"), _speculators(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_tables_of_a_speculator(name, speculator: Speculator):
    speculator.reset_parameters(torch.Generator().manual_seed(1))
    fresh = speculator.export_state_dict()
    embed_tokens, lm_head = _base(0), _base(1)
    speculator.start_from_base(embed_tokens, lm_head, _generator())
    started = speculator.export_state_dict()
    tables = {key for key in started if started[key].dim() == 2 and len(started[key]) in (VOCAB, 20)}
    first = {"sum_rnn": set(), "sum_lstm": set(), "sum_lstm_alike": {"cell_proj.0.weight"}}.get(name, {"proj.0.weight"})
    of_head = lm_head if speculator.draft_ids is None else lm_head[speculator.draft_ids]
    assert any("emb" in key for key in tables)
    assert any("head" in key for key in tables)
    for key, tensor in started.items():
        if key in first:
            # Head 0 sees of the hidden state what its vocabulary matrix can tell apart.
            head = started["head.0.weight"]
            centred = of_head - of_head.mean(0)
            seen = centred @ tensor.T
            torch.testing.assert_close(seen / seen.norm(), head / head.norm(), rtol=1e-3, atol=1e-5)
            continue
        if key not in tables:
            assert torch.equal(tensor, fresh[key]), key
            continue
        # As large as they are drawn, so that norms, states and logits begin as they do without a base.
        assert tensor.square().mean().sqrt().item() == pytest.approx(fresh[key].square().mean().sqrt().item(), rel=0.15)
        of_base = embed_tokens if "emb" in key else lm_head
        if len(tensor) == 20:
            of_base = of_base[speculator.draft_ids]
        expected, _ = BaseRows(of_base).fit(tensor.shape[1], _generator())
        torch.testing.assert_close(_distances(tensor), _distances(expected), rtol=1e-3, atol=1e-5)
    if name.startswith("sum_lstm"):
        gates = [started[f"{gate}_emb.0.weight"] for gate in ("forget", "input", "output", "cell")]
        assert not torch.allclose(gates[0], gates[3]), "gates that all read the same would learn the same"


def test_logits_begin_at_a_sane_size():
    """Of hidden states of any size: those of a real base have entries of 1 to 50."""
    speculator = MLPSpeculator(MLPSpeculatorConfig(**SIZES, inner_dim=12, scale_input=True))
    speculator.start_from_base(_base(0), _base(1), _generator())
    hidden = 20 * torch.randn(4, 6, HIDDEN, generator=_generator())
    logits = speculator(hidden, torch.randint(VOCAB, (4, 9), generator=_generator()))
    assert 0.2 < logits.std(-1).mean() < 2


def test_the_same_generator_gives_the_same_start():
    twice = []
    for _ in range(2):
        speculator = MLPSpeculator(MLPSpeculatorConfig(**SIZES, inner_dim=12))
        speculator.start_from_base(_base(0), _base(1), _generator())
        twice.append(speculator.head_weight(0).detach())
    assert torch.equal(*twice)
