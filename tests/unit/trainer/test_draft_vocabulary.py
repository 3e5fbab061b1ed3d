"""Which tokens a run counts and keeps, and what a run that goes on does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from verl_speculator.errors import ConfigError
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig
from verl_speculator.trainer.draft_vocabulary import FILE, choose_draft_vocabulary, count_trained_tokens, most_frequent

VOCAB = 12
# Token 9 is never trained, token 8 only where it is the first that follows a row's first token.
ROWS = [
    {"input_ids": torch.tensor([9, 8, 3, 3, 5, 9, 1]), "loss_mask": torch.tensor([0, 1, 1, 1, 1, 0, 1])},
    {"input_ids": torch.tensor([2, 9, 1, 5, 3, 7]), "loss_mask": torch.tensor([0, 0, 1, 1, 1, 1])},
    {"input_ids": torch.tensor([4]), "loss_mask": torch.tensor([1])},
]
COUNTS = {3: 3, 1: 2, 5: 2, 7: 1}


def _config(root: Path, **speculator):
    model = {"speculator": {"draft_vocab_size": None, "draft_vocab_path": None, **speculator}, "speculator_path": None}
    trainer = {"default_local_dir": str(root), "resume_mode": "auto", "resume_from_path": None}
    return OmegaConf.create({"model": model, "trainer": trainer, "data": {"num_workers": 0}})


def _checkpoint(root: Path, **settings) -> MLPSpeculator:
    speculator = MLPSpeculator(MLPSpeculatorConfig(input_hidden_dim=4, vocab_size=VOCAB, n_predict=2, **settings))
    speculator.save_pretrained(root / "global_step_2" / "speculator")
    (root / "global_step_2" / "resume").mkdir()
    return speculator


def test_tokens_that_the_first_head_learns_are_counted():
    counts = count_trained_tokens(ROWS, VOCAB)
    assert {token: count for token, count in enumerate(counts.tolist()) if count} == COUNTS


@pytest.mark.parametrize(
    ("size", "kept"),
    [(1, [3]), (2, [1, 3]), (3, [1, 3, 5]), (4, [1, 3, 5, 7]), (VOCAB, [1, 3, 5, 7]), (99, [1, 3, 5, 7])],
)
def test_the_most_frequent_are_kept(size, kept):
    assert most_frequent(count_trained_tokens(ROWS, VOCAB), size).tolist() == kept


def test_what_is_kept_is_written_to_the_runs_folder(tmp_path, capsys):
    settings = choose_draft_vocabulary(_config(tmp_path, draft_vocab_size=2), ROWS, VOCAB)
    assert settings == {"draft_vocab_size": 2, "draft_vocab_path": str(tmp_path / FILE)}
    assert np.load(tmp_path / FILE).nonzero()[0].tolist() == [1, 3]
    assert "2 of 12 tokens, 62.50% of the tokens that are trained" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("given", [{}, {"draft_vocab_size": 3, "draft_vocab_path": "t2d.npy"}], ids=str)
def test_nothing_is_counted_where_nothing_is_to_be_found_out(given, tmp_path):
    assert choose_draft_vocabulary(_config(tmp_path, **given), None, VOCAB) == {}
    trained = _config(tmp_path, draft_vocab_size=3)
    trained.model.speculator_path = "trained"
    assert choose_draft_vocabulary(trained, None, VOCAB) == {}


def test_a_run_that_goes_on_keeps_its_tokens(tmp_path):
    speculator = _checkpoint(tmp_path, draft_vocab_size=2)
    speculator.set_draft_ids(torch.tensor([6, 9]))
    speculator.save_pretrained(tmp_path / "global_step_2" / "speculator")
    settings = choose_draft_vocabulary(_config(tmp_path, draft_vocab_size=3), ROWS, VOCAB)
    assert settings["draft_vocab_size"] == 2
    assert np.load(tmp_path / FILE).nonzero()[0].tolist() == [6, 9]


def test_a_run_that_had_none_cannot_go_on_with_one(tmp_path):
    _checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"draft_vocab_size=3, but .*global_step_2 was trained without one"):
        choose_draft_vocabulary(_config(tmp_path, draft_vocab_size=3), ROWS, VOCAB)


def test_data_that_train_nothing(tmp_path):
    rows = [{"input_ids": torch.tensor([1, 2, 3]), "loss_mask": torch.tensor([0, 0, 0])}]
    with pytest.raises(ConfigError, match="have no token to train"):
        choose_draft_vocabulary(_config(tmp_path, draft_vocab_size=3), rows, VOCAB)
