from __future__ import annotations

from verl_speculator.models import ArcticLSTMSpeculator, ArcticLSTMSpeculatorConfig
from verl_speculator.trainer.tuning import Search, Trial, draft_weights, write_report


def test_what_a_round_of_drafts_reads() -> None:
    """Each head: the projection of what it is given, and the vocabulary matrix; the embedding is one row."""
    config = ArcticLSTMSpeculatorConfig(
        input_hidden_dim=24, vocab_size=100, n_predict=3, inner_dim="16", emb_dim="16", proj_dim="16"
    )
    expected = (24 * 16 + 2 * 16 * 16) + 3 * 16 * 100
    assert draft_weights(ArcticLSTMSpeculator(config)) == expected


def test_the_report_has_the_winner_first(tmp_path) -> None:
    trials = [Trial([f"optim.lr={lr}", "a=b c"], "folder", 2.0, 0.25, 1.6) for lr in (1e-3, 1e-4)]
    text = write_report(trials, Search(("data.train_files=x.parquet",), {}, {}), tmp_path, 4)
    assert text.splitlines()[2] == "| 1 | 0.001 | b c | 2.000 | 0.250 | 1.600 |"
    winner = "verl-speculator train --nproc 4 data.train_files=x.parquet optim.lr=0.001 'a=b c'"
    assert text.splitlines()[-1] == winner
    assert (tmp_path / "tune.md").read_text() == text
