"""A draft vocabulary: what is drafted, what files hold, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.models import ArcticLSTMSpeculatorConfig, MLPSpeculatorConfig, Speculator
from verl_speculator.models.draft_vocabulary import given_draft_ids
from verl_speculator.models.serialization import SAFETENSORS_NAME, write_folder

VOCAB, IDS = 37, torch.tensor([0, 3, 4, 11, 30, 36])
SIZES = {"input_hidden_dim": 18, "vocab_size": VOCAB, "n_predict": 3}
DIMS = dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), 24)
CONFIGS = {
    "mlp": (MLPSpeculatorConfig, {"inner_dim": 24}),
    "mlp_untied": (MLPSpeculatorConfig, {"inner_dim": 24, "tie_weights": False}),
    "sum_rnn": (ArcticLSTMSpeculatorConfig, {**DIMS, "method": "sum_rnn"}),
    "sum_lstm": (ArcticLSTMSpeculatorConfig, {**DIMS, "method": "sum_lstm"}),
    "sum_lstm_alone": (ArcticLSTMSpeculatorConfig, {**DIMS, "method": "sum_lstm", "n_predict": 1}),
}


@pytest.fixture(params=CONFIGS)
def reduced(request):
    config_class, settings = CONFIGS[request.param]
    speculator = Speculator.from_config(config_class(**{**SIZES, **settings}, draft_vocab_size=len(IDS)))
    speculator.reset_parameters(torch.Generator().manual_seed(0))
    speculator.set_draft_ids(IDS)
    return speculator


def _inputs(n_predict):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, 18, generator=generator)
    return hidden, torch.randint(VOCAB, (2, 5 + n_predict), generator=generator)


def test_only_its_rows_have_logits(reduced):
    assert {head.weight.shape[0] for head in reduced.head} == {len(IDS)}
    hidden, tokens = _inputs(reduced.n_predict)
    logits = reduced(hidden, tokens)
    assert logits.shape == (reduced.n_predict, 2, 5, VOCAB)
    read = reduced.embed_all([tokens[:, i : i + 5] for i in range(reduced.n_predict)])
    for i, output in enumerate(reduced.unroll(hidden, read)):
        for token in range(VOCAB):
            found = (token == IDS).nonzero()
            row = F.linear(output, reduced.head_weight(i)[found[0]]).squeeze(-1) if len(found) else None
            expected = torch.full((2, 5), -torch.inf) if row is None else row
            torch.testing.assert_close(logits[i, ..., token], expected)


def test_drafts_are_tokens_of_the_base(reduced):
    hidden, tokens = _inputs(reduced.n_predict)
    drafts = reduced.draft(hidden[:, 0], tokens[:, 0], reduced.n_predict)
    assert torch.isin(drafts, IDS).all()
    read, expected = [tokens[:, 0]], []
    for i in range(reduced.n_predict):
        padded = torch.stack([*read, *[read[0]] * (reduced.n_predict - i)], dim=1)
        expected.append(reduced(hidden[:, :1], padded)[i, :, 0].argmax(-1))
        read.append(expected[-1])
    assert torch.equal(drafts, torch.stack(expected, dim=1))
    # The same by way of the logits over all tokens, as sampling asks for them.
    chosen = reduced.draft(hidden[:, 0], tokens[:, 0], reduced.n_predict, lambda logits: logits.argmax(-1))
    assert torch.equal(chosen, drafts)


def test_files_hold_offsets_as_speculators_does(reduced, tmp_path):
    reduced.save_pretrained(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / SAFETENSORS_NAME)
    assert tensors["d2t"].dtype == torch.int64
    assert (tensors["d2t"] + torch.arange(len(IDS))).tolist() == IDS.tolist()
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["draft_vocab_size"], values["vocab_size"]) == (len(IDS), VOCAB)
    assert {t.dtype for name, t in tensors.items() if name != "d2t"} == {torch.bfloat16}
    loaded = Speculator.from_pretrained(tmp_path)
    assert torch.equal(loaded.draft_ids, IDS)
    assert loaded.config == reduced.config


def test_files_without_one_do_not_mention_it(tmp_path):
    Speculator.from_config(MLPSpeculatorConfig(**SIZES, inner_dim=24)).save_pretrained(tmp_path)
    assert "draft_vocab_size" not in json.loads((tmp_path / "config.json").read_text())
    assert "d2t" not in load_file(tmp_path / SAFETENSORS_NAME)


@pytest.mark.parametrize("d2t", [[0, 2, 2, 8, 26, 32], [-1, 2, 2, 8, 26, 31], [0, 2, 0, 8, 26, 31]], ids=str)
def test_files_that_lead_nowhere_are_refused(d2t, tmp_path):
    config_class, settings = CONFIGS["mlp"]
    speculator = Speculator.from_config(config_class(**{**SIZES, **settings}, draft_vocab_size=len(IDS)))
    tensors = speculator.export_state_dict() | {"d2t": torch.tensor(d2t)}
    write_folder(tmp_path, speculator.config.to_dict(), tensors)
    with pytest.raises(CheckpointError, match="d2t must lead to ascending token ids below 37"):
        Speculator.from_pretrained(tmp_path)


def test_ids_of_both_vocabularies(reduced):
    tokens = torch.arange(VOCAB).reshape(1, -1)
    found = reduced.to_draft_ids(tokens)[0].tolist()
    assert found == [IDS.tolist().index(token) if token in IDS.tolist() else -1 for token in range(VOCAB)]
    assert torch.equal(reduced.to_target_ids(torch.arange(len(IDS))), IDS)


@pytest.mark.parametrize("size", [0, VOCAB + 1, True, "8"])
def test_sizes_that_cannot_be(size):
    with pytest.raises(ConfigError, match="draft_vocab_size must be"):
        MLPSpeculatorConfig(**SIZES, draft_vocab_size=size)


def test_what_a_run_is_given(tmp_path):
    file = tmp_path / "t2d.npy"
    np.save(file, np.isin(np.arange(VOCAB), IDS))
    assert torch.equal(given_draft_ids(None, None, str(file), VOCAB), IDS)
    assert torch.equal(given_draft_ids(len(IDS), None, str(file), VOCAB), IDS)
    assert given_draft_ids(None, None, None, VOCAB) is None
    with pytest.raises(ConfigError, match="draft_vocab_size is 5 and draft_vocab_path has 6 tokens"):
        given_draft_ids(5, None, str(file), VOCAB)
    with pytest.raises(ConfigError, match="draft_vocab_path must hold one boolean for each of 40 tokens"):
        given_draft_ids(None, None, str(file), 40)
    with pytest.raises(ConfigError, match="draft_vocab_size needs draft_vocab_path"):
        given_draft_ids(5, None, None, VOCAB)
    with pytest.raises(MissingFileError, match="draft_vocab_path: there is no file"):
        given_draft_ids(None, None, str(tmp_path / "absent.npy"), VOCAB)
