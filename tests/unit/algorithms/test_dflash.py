"""DFlash: loss and gradients against a loop over single sequences, files, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.dflash_reference import Reference
from tests.unit.algorithms.test_eagle3 import H, V, base_config, gradients, make_batch, t2d_mask
from verl_speculator.algorithms import attention
from verl_speculator.algorithms.dflash import DFlashSpeculator
from verl_speculator.algorithms.dflash.model import _picked
from verl_speculator.errors import CheckpointError, ConfigError
from verl_speculator.losses import Objective
from verl_speculator.models import Speculator
from verl_speculator.serving.export import export_speculator

SIZE = 4


def make_model(draft_vocab: bool = False, **arguments) -> DFlashSpeculator:
    torch.manual_seed(0)
    arguments = {"num_layers": 2, "block_size": SIZE, "mask_token_id": 5, **arguments}
    if draft_vocab:
        arguments["t2d"] = t2d_mask()
    model = DFlashSpeculator.from_training_args(base_config(), verifier_name_or_path="some/base", **arguments).double()
    model.load_verifier_weights(torch.randn(V, H), torch.randn(V, H) / 3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Norms that are all ones would hide one that is left out.
                parameter.copy_(parameter.new_tensor(1.0) + 0.3 * torch.randn_like(parameter) if parameter.dim() == 1
                                else torch.randn_like(parameter) / parameter.shape[1] ** 0.5)  # fmt: skip
    return model


def reference_loss(model, batch, picked, **settings):
    sums, weights = [], 0.0
    reference = Reference(model)
    for document in batch["document_ids"].unique():
        at = batch["document_ids"][0] == document
        keys = ("hidden_states", "input_ids", "loss_mask", "verifier_last_hidden_states")
        part, weight = reference.loss(
            *(batch[key][0, at] for key in keys), batch["verifier_lm_head_weight"], picked[at], **settings
        )
        sums, weights = [*sums, part], weights + weight
    return torch.stack(sums).sum() / weights, weights


@pytest.mark.parametrize("block", [3, 256], ids=["small blocks", "one block"])
@pytest.mark.parametrize(
    ("arguments", "fraction"),
    [({}, 1.0), ({"num_layers": 1, "target_layer_ids": [0, 3]}, 0.5), ({"draft_vocab": True}, 1.0)],
)
def test_loss_and_gradients_are_those_of_single_sequences(arguments, fraction, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    model, batch = make_model(**arguments), make_batch(num_states=len(arguments.get("target_layer_ids", (0, 1, 2))))
    # With everything picked, what picks plays no part; else it must pick some, and not all.
    _, _, metrics = model(**batch, anchor_fraction=fraction)
    offsets = torch.tensor([0, 11, 12, 17, 19, 36])
    picked = _picked(batch["input_ids"][0], offsets, fraction)
    assert picked.all() if fraction == 1.0 else 8 < picked.sum() < 28
    for kind in ("kl", "ce") if arguments.get("draft_vocab") else ("kl",):
        kwargs = {"anchor_fraction": fraction, "decay_gamma": 2.0, "objective": Objective({kind: 1.0})}
        outputs, loss, metrics = model(**batch, **kwargs)
        expected, weights = reference_loss(model, batch, picked, gamma=2.0, kind=kind)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert metrics["loss_total"].item() == pytest.approx(weights, rel=1e-6)
        assert metrics["loss_sum"].item() == pytest.approx(weights * loss.item(), rel=1e-5)
        assert [len(output) for output in outputs] == [int(metrics[f"loss_{k}_total"]) for k in range(SIZE - 1)]
        counted = model.count_trained(batch["input_ids"], batch["loss_mask"], batch["document_ids"], **kwargs)
        assert counted.item() == pytest.approx(weights)
        wanted, own = gradients(model, expected), gradients(model, model(**batch, **kwargs)[1])
        assert set(own) == set(wanted)
        assert not {"embed_tokens.weight", "lm_head.weight"} & set(own)
        for name, grad in own.items():
            scale = wanted[name].abs().max().item()
            assert scale > 1e-4, name
            # transformers' norms compute in float32 whatever they are given.
            torch.testing.assert_close(grad, wanted[name], rtol=0, atol=3e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_parts_of_a_batch_add_up_to_the_whole():
    model, batch = make_model(), make_batch((9, 8))
    _, whole, metrics = model(**batch, anchor_fraction=0.5)
    parts = []
    for document in range(2):
        at = batch["document_ids"][0] == document
        part = {k: v[:, at] if k != "verifier_lm_head_weight" else v for k, v in batch.items()}
        _, loss, part_metrics = model(**part, anchor_fraction=0.5)
        parts.append(loss * part_metrics["loss_total"])
    torch.testing.assert_close(whole * metrics["loss_total"], sum(parts), rtol=1e-6, atol=0)


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (2, 1)])
def test_nothing_to_train(lengths):
    model, batch = make_model(), make_batch(lengths)
    _, loss, metrics = model(**batch)
    assert loss.item() == metrics["loss_total"].item() == 0
    assert all(grad.eq(0).all() for grad in gradients(model, loss).values())


def test_the_form_in_files(tmp_path):
    model = make_model(draft_vocab=True).float()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["DFlashSpeculator"]
    assert written["speculators_model_type"] == "dflash"
    assert written["aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert (written["block_size"], written["mask_token_id"], written["sample_from_anchor"]) == (SIZE, 5, False)
    assert written["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == SIZE - 1
    assert written["transformer_layer_config"]["model_type"] == "qwen3"
    # The base's, which its own configuration does not say; transformers would take 128 then, and vLLM this.
    assert written["transformer_layer_config"]["head_dim"] == H // 4
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"fc.weight", "hidden_norm.weight", "norm.weight", "lm_head.weight", "embed_tokens.weight", "d2t"} < names
    assert "layers.1.self_attn.k_norm.weight" in names
    loaded = Speculator.from_pretrained(tmp_path)
    assert type(loaded) is DFlashSpeculator
    assert loaded.config == model.config
    batch = {k: v.float() if v.is_floating_point() else v for k, v in make_batch().items()}
    assert torch.equal(loaded(**batch)[1], model(**batch)[1])

    (tmp_path / "config.json").write_text(json.dumps(written | {"sample_from_anchor": True}))
    with pytest.raises(CheckpointError, match="sample_from_anchor must be false"):
        Speculator.from_pretrained(tmp_path)


def test_its_native_form(tmp_path):
    model = make_model(target_layer_ids=[0, 3]).float()
    model.save_pretrained(tmp_path / "own")
    out = export_speculator(tmp_path / "own", tmp_path / "out", "dflash")
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert config["architectures"] == ["DFlashDraftModel"]
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("qwen3", H, 2)
    assert config["block_size"] == SIZE
    assert config["dflash_config"] == {"mask_token_id": 5, "target_layer_ids": [-1, 2]}
    assert tensors.keys() == model.state_dict().keys() - {"embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(tensors["fc.weight"], model.fc.weight)

    make_model(draft_vocab=True).float().save_pretrained(tmp_path / "reduced")
    with pytest.raises(ConfigError, match="DFlash's own form has no draft vocabulary"):
        export_speculator(tmp_path / "reduced", tmp_path / "no", "dflash")
    with pytest.raises(ConfigError, match="--format eagle3 is for that algorithm, not for a DFlashSpeculator"):
        export_speculator(tmp_path / "own", tmp_path / "no", "eagle3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 1}, r"^block_size must be at least 2: the first of a block is known"),
        ({"anchor_fraction": 0}, r"^anchor_fraction must be a number above 0 and up to 1, not 0"),
        ({"anchor_fraction": 1.5}, r"^anchor_fraction must be"),
        ({"decay_gamma": -1}, r"^decay_gamma must be a number above 0, not -1"),
        ({"objective": "kll"}, r"objective: 'kll' is none of"),
        ({"num_layers": 0}, r"^num_layers must be a positive integer"),
        ({"target_layer_ids": [3, 1]}, r"^target_layer_ids must be a list of layers in ascending order"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        DFlashSpeculator.get_trainer_kwargs(settings)


def test_the_mask_token():
    assert DFlashSpeculator.from_training_args(base_config(pad_token_id=7)).config.mask_token_id == 7
    assert DFlashSpeculator.from_training_args(base_config(pad_token_id=None)).config.mask_token_id == V - 1
    with pytest.raises(ConfigError, match=r"^mask_token_id must be a token of the base, below 37"):
        make_model(mask_token_id=V)


def test_a_block_of_another_size_than_the_drafts():
    with pytest.raises(ConfigError, match=r"^block_size must be 3, one more than the tokens drafted"):
        dataclasses.replace(make_model().config, n_predict=2)
