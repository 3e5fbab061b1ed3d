"""The adapter that drives every model that is no chain: its settings, its sums, and names that lead to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.adapters.conftest import HIDDEN_SIZE, VOCAB_SIZE
from verl_speculator.adapters import (
    AdapterNeeds,
    ChainSpeculatorAdapter,
    LSTMSpeculatorAdapter,
    MLPSpeculatorAdapter,
    ModelAdapter,
    build_speculator_adapter,
    load_adapter_class,
)
from verl_speculator.adapters.settings import SHARED_DEFAULTS
from verl_speculator.algorithms.eagle3 import Eagle3Speculator
from verl_speculator.errors import ConfigError, MissingFileError
from verl_speculator.losses import PackedHiddenStates

# As a run's configuration has them; two are given.
SETTINGS = {**SHARED_DEFAULTS, "target_layer_ids": [0, 2], "ttt_steps": 2}


@pytest.fixture
def base():
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.name_or_path = "some/base"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def build(base, **settings):
    adapter = build_speculator_adapter("eagle3", {**SETTINGS, **settings})
    adapter.speculator = adapter.build_speculator_module(base)
    if not next(adapter.speculator.parameters()).is_meta:
        assert adapter.starts_from_base
        matrices = base.get_input_embeddings().weight, base.get_output_embeddings().weight
        adapter.start_from_base(*matrices, torch.Generator())
    return adapter


def with_all(packed: PackedHiddenStates) -> PackedHiddenStates:
    lengths = packed.cu_seqlens.diff().tolist()
    return dataclasses.replace(
        packed,
        aux_hidden_states=torch.randn(packed.num_tokens, 2 * HIDDEN_SIZE, generator=torch.Generator().manual_seed(1)),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        lm_head_weight=torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2)),
    )


def test_names_lead_to_adapters() -> None:
    assert load_adapter_class("lstm") is LSTMSpeculatorAdapter
    assert load_adapter_class("mlp") is MLPSpeculatorAdapter
    for spec in ("eagle3", "verl_speculator.algorithms.eagle3.Eagle3Speculator"):
        found = load_adapter_class(spec)
        assert issubclass(found, ModelAdapter)
        assert found.speculator_class is Eagle3Speculator
    # A chain needs no adapter of its own either.
    example = Path(__file__).resolve().parents[3] / "examples" / "custom_adapter" / "gated_adapter.py"
    found = load_adapter_class({"path": str(example), "name": "GatedSpeculator"})
    assert issubclass(found, ChainSpeculatorAdapter)
    assert found.config_class.__name__ == "GatedSpeculatorConfig"
    with pytest.raises(ConfigError, match=r"Speculator is not registered: put @Speculator\.register"):
        load_adapter_class("verl_speculator.models.Speculator")
    with pytest.raises(ConfigError, match=r"must be a full dotted name .* eagle3, lstm, .*mlp.*; got 'eagel'"):
        load_adapter_class("eagel")


def test_it_is_built_from_its_base(base) -> None:
    adapter = build(base)
    config = adapter.speculator.config
    assert (config.n_predict, config.base_model_name_or_path) == (2, "some/base")
    assert config.base_architectures == ["LlamaForCausalLM"]
    assert torch.equal(adapter.speculator.embed_tokens.weight, base.model.embed_tokens.weight)
    assert torch.equal(adapter.speculator.lm_head.weight, base.lm_head.weight)
    trained = {id(parameter) for parameter in adapter.get_optimizer_params()}
    frozen = [name for name, p in adapter.speculator.named_parameters() if id(p) not in trained]
    assert frozen == ["embed_tokens.weight", "lm_head.weight"]
    assert adapter.needs == AdapterNeeds((0, 2), whole_sequences=True, target_head_weight=True, position_ids=True)
    assert not build(base, objective="ce").needs.target_head_weight


def test_ranks_other_than_the_first_build_it_without_storage(base, tmp_path) -> None:
    np.save(tmp_path / "t2d.npy", np.arange(VOCAB_SIZE) % 3 != 1)
    settings = {"draft_vocab_path": str(tmp_path / "t2d.npy")}
    first = build(base, **settings).speculator
    with torch.device("meta"):
        other = build(base, **settings).speculator
    assert all(tensor.is_meta for tensor in other.state_dict().values())
    shapes = [{name: (t.shape, t.dtype) for name, t in one.state_dict().items()} for one in (first, other)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("objective", [None, "ce", {"kl": 0.5, "lk": 0.5}])
def test_parts_of_a_batch_add_up(base, packed, objective) -> None:
    adapter, packed = build(base, objective=objective), with_all(packed)
    whole, sums = adapter.compute_speculator_loss(packed)
    counts = adapter.count_trained_positions(packed.input_ids, packed.loss_mask, packed.cu_seqlens)
    assert counts.item() == sums["loss_total"].item() > 0
    parts, summed = [], dict.fromkeys(sums, 0.0)
    for start, end in zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True):
        cut = {name: getattr(packed, name)[start:end] for name in (
            "hidden_states", "input_ids", "loss_mask", "aux_hidden_states", "position_ids")}  # fmt: skip
        part = dataclasses.replace(packed, **cut, cu_seqlens=torch.tensor([0, end - start]), head_counts=counts)
        loss, own = adapter.compute_speculator_loss(part)
        parts.append(loss)
        summed = {name: summed[name] + own[name].item() for name in own}
    assert torch.stack(parts).sum().item() == pytest.approx(whole.item(), rel=1e-5)
    metrics = adapter.summarize_metrics(summed)
    assert metrics["loss"] == pytest.approx(whole.item(), rel=1e-5)
    assert 1 <= metrics["acceptance_length"] <= 3
    assert set(metrics) >= {"loss_0", "loss_1", "full_acc_0", "cross_entropy_1", "overlap_1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ttt_step": 2},
            r"model\.speculator\.ttt_step is not a setting .* did you mean model\.speculator\.ttt_steps\?",
        ),
        ({"ttt_steps": 0}, r"model\.speculator\.ttt_steps must be a positive integer"),
        ({"n_predict": 3}, r"model\.speculator\.n_predict is not a setting of this speculator: leave it out"),
        ({"objective": "klll"}, r"model\.speculator\.objective: 'klll' is none of"),
        ({"fc_norm": True}, r"model\.speculator\.norm_before_fc and fc_norm exclude"),
    ],
)
def test_wrong_settings_name_their_key(settings, message) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        build_speculator_adapter("eagle3", {**SETTINGS, **settings})


def test_files_and_the_bases_layers(base) -> None:
    with pytest.raises(MissingFileError, match=r"^model\.speculator\.draft_vocab_path: there is no file"):
        build_speculator_adapter("eagle3", {**SETTINGS, "draft_vocab_path": "/absent.npy"})
    with pytest.raises(ConfigError, match=r"^model\.speculator\.target_layer_ids must be given for a base of 2 layers"):
        build(base, target_layer_ids=None)
