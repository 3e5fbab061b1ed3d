"""EAGLE-3: loss and gradients against a loop over single sequences, files, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.support.eagle3_reference import Reference
from verl_speculator.algorithms import attention
from verl_speculator.algorithms.eagle3 import Eagle3Speculator, Eagle3SpeculatorConfig
from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.losses import Objective
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig, Speculator, SpeculatorConfig
from verl_speculator.serving.export import export_speculator

H, V, LAYERS = 32, 37, 8
FLAGS = {"norm_before_residual": False, "norm_before_fc": False, "norm_output": False}
CASES = [
    {},
    {"num_layers": 2, **FLAGS},
    {"draft_arch": "qwen3", "norm_before_fc": False, "fc_norm": True, "norm_output": False},
    {"norm_before_residual": False, "embed_requires_grad": True, "draft_vocab": True},
]


def base_config(**changes):
    sizes = {"vocab_size": V, "hidden_size": H, "intermediate_size": 40, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500.0}
    return AutoConfig.for_model("qwen2", **(sizes | heads | changes))


def t2d_mask() -> torch.Tensor:
    return torch.arange(V) % 3 != 1


def make_model(draft_vocab: bool = False, **arguments) -> Eagle3Speculator:
    torch.manual_seed(0)
    if draft_vocab:
        arguments["t2d"] = t2d_mask()
    model = Eagle3Speculator.from_training_args(base_config(), verifier_name_or_path="some/base", **arguments).double()
    model.load_verifier_weights(torch.randn(V, H), torch.randn(V, H) / 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name != "embed_tokens.weight":
                # Norms that are all ones would hide one that is left out.
                parameter.copy_(parameter.new_tensor(1.0) + 0.3 * torch.randn_like(parameter) if parameter.dim() == 1
                                else torch.randn_like(parameter) / parameter.shape[1] ** 0.5)  # fmt: skip
    return model


def make_batch(lengths=(11, 1, 5, 2, 17), num_states=3):
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths_B = torch.tensor(lengths)
    return {
        "hidden_states": random(1, total, num_states * H),
        "input_ids": torch.randint(V, (1, total), generator=generator),
        "document_ids": torch.arange(len(lengths)).repeat_interleave(lengths_B)[None],
        "loss_mask": (torch.rand(1, total, generator=generator) < 0.7).long(),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "verifier_last_hidden_states": random(1, total, H),
        "verifier_lm_head_weight": random(V, H) / 2,
    }


def reference_loss(model, batch, **settings):
    sums, weights = [], 0.0
    reference = Reference(model)
    for document in batch["document_ids"].unique():
        at = batch["document_ids"][0] == document
        keys = ("hidden_states", "input_ids", "loss_mask", "verifier_last_hidden_states")
        part, weight = reference.loss(
            *(batch[key][0, at] for key in keys), batch["verifier_lm_head_weight"], **settings
        )
        sums, weights = [*sums, part], weights + weight
    return torch.stack(sums).sum() / weights, weights


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("block", [3, 256], ids=["small blocks", "one block"])
@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_loss_and_gradients_are_those_of_single_sequences(arguments, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    model, batch = make_model(**arguments), make_batch()
    kinds = ("kl", "ce") if arguments.get("draft_vocab") else ("kl",)
    for kind in kinds:
        kwargs = {"ttt_steps": 4, "ttt_step_loss_decay": 0.7, "objective": Objective({kind: 1.0})}
        outputs, loss, metrics = model(**batch, **kwargs)
        expected, weights = reference_loss(model, batch, ttt_steps=4, decay=0.7, kind=kind)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert metrics["loss_total"].item() == pytest.approx(weights, rel=1e-6)
        assert metrics["loss_sum"].item() == pytest.approx(weights * loss.item(), rel=1e-5)
        assert [len(output) for output in outputs] == [int(metrics[f"loss_{k}_total"]) for k in range(4)]
        counted = model.count_trained(batch["input_ids"], batch["loss_mask"], batch["document_ids"], **kwargs)
        assert counted.item() == pytest.approx(weights)
        wanted, own = gradients(model, expected), gradients(model, model(**batch, **kwargs)[1])
        assert set(own) == set(wanted)
        assert ("embed_tokens.weight" in own) == bool(arguments.get("embed_requires_grad"))
        for name, grad in own.items():
            scale = wanted[name].abs().max().item()
            assert scale > 1e-4, name
            # transformers' norms compute in float32 whatever they are given.
            torch.testing.assert_close(grad, wanted[name], rtol=0, atol=3e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_parts_of_a_batch_add_up_to_the_whole():
    model, batch = make_model(), make_batch((9, 8))
    _, whole, metrics = model(**batch, ttt_steps=3)
    total = 0.0
    for part in (slice(0, 9), slice(9, 17)):
        cut = {key: value if "weight" in key else value[:, part] for key, value in batch.items()}
        _, loss, own = model(**cut, ttt_steps=3)
        total += loss.item() * own["loss_total"].item()
    assert total / metrics["loss_total"].item() == pytest.approx(whole.item(), rel=1e-6)


def test_a_batch_that_trains_nothing_has_a_loss_of_zero_and_every_gradient():
    model, batch = make_model(num_layers=2), make_batch((4, 1))
    batch["loss_mask"].zero_()
    _, loss, metrics = model(**batch)
    assert loss.item() == 0
    assert metrics["loss_total"] == 0
    assert all(grad.abs().max() == 0 for grad in gradients(model, loss).values())


def test_bfloat16_is_near_and_its_sums_are_float32():
    """What the rows count for is not rounded to bfloat16: with 1000 rows that alone would be an error of 0.4 %."""
    model, batch = make_model(norm_output=False), make_batch((200, 150, 120))
    _, exact, _ = model(**batch)
    model = model.bfloat16()
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    _, loss, metrics = model(**batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    rows = sum(metrics[f"loss_{k}_sum"].item() for k in range(3))
    assert rows / metrics["loss_total"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in gradients(model, loss).values())


def test_memory_does_not_hold_a_mask_of_all_tokens(monkeypatch):
    """The largest tensor of scores is a block's, not one of T x T."""
    sizes = []
    real = attention._scores
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(attention, "_scores", lambda *a: sizes.append((out := real(*a)).shape[-2:].numel()) or out)
    model, batch = make_model(), make_batch((40, 24, 8, 8, 8, 8))
    gradients(model, model(**batch)[1])
    assert max(sizes) <= 16 * (40 + 16)


def test_metrics_tell_right_drafts():
    """With the loss mask full and a base that says the text, drafts are right where logits say so."""
    model, batch = make_model(draft_vocab=True), make_batch((9, 12))
    batch["loss_mask"].fill_(1)
    outputs, _, metrics = model(**batch, ttt_steps=2)
    drafted = [model.target_logits(output).argmax(-1) for output in outputs]
    rows, accepted = 0, 0
    for start, end in ((0, 9), (9, 21)):
        for t in range(start, end - 2):
            first = bool(drafted[0][rows] == batch["input_ids"][0, t + 2])
            second = t < end - 3 and bool(drafted[1][rows - (start > 0)] == batch["input_ids"][0, t + 3])
            accepted += first + (first and second)
            rows += 1
    assert metrics["acceptance_length_total"] == rows
    assert metrics["acceptance_length_sum"] == rows + accepted
    assert metrics["full_acc_0_sum"] <= accepted


# Files


def test_files_are_those_of_speculators(tmp_path):
    model = make_model(draft_vocab=True, num_layers=2, norm_before_fc=False, fc_norm=True).float()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    layer_config = written.pop("transformer_layer_config")
    assert written == {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": "some/base", "architectures": []},
        },
        "draft_vocab_size": int(t2d_mask().sum()),
        "target_hidden_size": H,
        "eagle_aux_hidden_state_layer_ids": [2, LAYERS // 2, LAYERS - 3],
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": True,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    assert layer_config["model_type"] == "llama"
    assert layer_config["num_hidden_layers"] == 2
    assert layer_config["rope_parameters"]["rope_theta"] == 500.0

    attention_names = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    first = [*attention_names, *mlp, "input_layernorm", "post_attention_layernorm"]
    modules = [f"layers.{i}.{name}" for i in range(2) for name in first]
    modules += ["layers.0.hidden_norm", "fc", "fc_norm.0", "fc_norm.1", "fc_norm.2", "norm", "lm_head", "embed_tokens"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == {f"{name}.weight" for name in modules} | {"d2t", "t2d"}
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (H, 2 * H)
    assert tensors["layers.1.self_attn.q_proj.weight"].shape == (H, H)
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].dtype == torch.bool
    ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
    assert torch.equal(ids, t2d_mask().nonzero().squeeze(1))

    loaded = Speculator.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is Eagle3Speculator
    assert loaded.config == SpeculatorConfig.from_pretrained(tmp_path) == model.config
    assert not loaded.lm_head.weight.requires_grad
    batch = make_batch()
    torch.testing.assert_close(loaded(**batch)[1], model.double()(**batch)[1])


def test_the_bases_weights_are_missed_at_once_when_nobody_gave_them():
    model = Eagle3Speculator.from_training_args(base_config(), t2d=t2d_mask())
    assert model.embed_tokens.weight.isnan().all()
    rows = torch.randn(V, H)
    model.load_verifier_weights(rows + 1, rows)
    assert torch.equal(model.embed_tokens.weight, rows + 1)
    assert torch.equal(model.lm_head.weight, rows[t2d_mask()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ttt_steps": 0}, "ttt_steps must be a positive integer"),
        ({"ttt_step_loss_decay": 0}, "ttt_step_loss_decay must be a number above 0"),
        ({"draft_arch": "gpt2"}, "draft_arch must be llama or qwen3"),
        ({"fc_norm": True}, "norm_before_fc and fc_norm exclude each other"),
        ({"target_layer_ids": [1, 1]}, "target_layer_ids must be a list of layers in ascending order"),
        ({"target_layer_ids": [2, 0]}, "target_layer_ids must be a list of layers in ascending order"),
        ({"target_layer_ids": [0, 9]}, f"from 0 to {LAYERS}, the base's number of layers; not"),
        ({"draft_vocab_size": 10}, "draft_vocab_size needs draft_vocab_path"),
        ({"draft_vocab_size": 10, "t2d": t2d_mask()}, "draft_vocab_size is 10 and draft_vocab_path has 25 tokens"),
        ({"t2d": torch.ones(5, dtype=torch.bool)}, f"one boolean for each of {V} tokens"),
    ],
)
def test_settings_that_cannot_work(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Eagle3Speculator.from_training_args(base_config(), **arguments)


def test_small_bases_need_their_layers_named():
    with pytest.raises(ConfigError, match="target_layer_ids must be given for a base of 4 layers"):
        Eagle3Speculator.from_training_args(base_config(num_hidden_layers=4))


def test_draft_vocabulary_from_a_file(tmp_path):
    file = tmp_path / "t2d.npy"
    np.save(file, t2d_mask().numpy())
    arguments = {"draft_vocab_path": str(file), "draft_vocab_size": 25}
    model = Eagle3Speculator.from_training_args(base_config(), **arguments)
    assert torch.equal(model.draft_ids, t2d_mask().nonzero().squeeze(1))
    assert Eagle3Speculator.get_trainer_kwargs(arguments)[0]["objective"].weights == {"kl": 1.0}
    file.write_text("no array")
    with pytest.raises(ConfigError, match=r"t2d.npy' is no .npy file of booleans"):
        Eagle3Speculator.get_trainer_kwargs(arguments)
    with pytest.raises(MissingFileError, match=r"draft_vocab_path: there is no file '/absent.npy'"):
        Eagle3Speculator.get_trainer_kwargs({"draft_vocab_path": "/absent.npy"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer_layer_config": None}, "transformer_layer_config is missing"),
        ({"draft_vocab_size": V + 1}, rf"draft_vocab_size must be at most vocab_size \({V}\)"),
        ({"eagle_aux_hidden_state_layer_ids": []}, "must be a list of layers in ascending order"),
        ({"eagle_aux_hidden_state_layer_ids": None}, "eagle_aux_hidden_state_layer_ids is missing"),
        ({"target_hidden_size": 64}, "transformer_layer_config.hidden_size must be the base's hidden size"),
        ({"norm_output": "yes"}, "norm_output must be true or false"),
    ],
)
def test_files_that_are_not_usable(tmp_path, change, message):
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        Speculator.from_pretrained(tmp_path)


def test_sliding_windows_are_refused():
    config = make_model().config.to_dict()
    config["transformer_layer_config"]["layer_types"] = ["sliding_attention"]
    with pytest.raises(ConfigError, match="sliding_attention: not supported"):
        Eagle3SpeculatorConfig.from_dict(config)


@pytest.mark.parametrize("arguments", [{}, {"num_layers": 2, "draft_vocab": True, **FLAGS}], ids=str)
def test_its_native_form(arguments, tmp_path):
    model = make_model(**arguments).float()
    model.save_pretrained(tmp_path / "own")
    out = export_speculator(tmp_path / "own", tmp_path / "out", "eagle3")
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("llama", H, len(model.layers))
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["draft_vocab_size"] == len(tensors["lm_head.weight"])
    for name in FLAGS:
        assert config[name] == getattr(model.config, name)
    assert torch.equal(tensors["midlayer.self_attn.q_proj.weight"], model.layers[0].self_attn.q_proj.weight)
    assert ("layers.1.mlp.up_proj.weight" in tensors) == (len(model.layers) > 1)
    assert not any(name.startswith("layers.0.") for name in tensors)


def test_what_has_no_native_form(tmp_path):
    make_model(draft_arch="qwen3").float().save_pretrained(tmp_path / "own")
    with pytest.raises(ConfigError, match="has the layers of a llama, and these are a qwen3's"):
        export_speculator(tmp_path / "own", tmp_path / "out", "eagle3")
    MLPSpeculator(MLPSpeculatorConfig(input_hidden_dim=8, vocab_size=9)).save_pretrained(tmp_path / "mlp")
    with pytest.raises(ConfigError, match="--format eagle3 is for that algorithm, not for a MLPSpeculator"):
        export_speculator(tmp_path / "mlp", tmp_path / "out", "eagle3")
