"""The adapters that come with the package: their settings, and that they hand on the models' and losses' numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from verl_speculator.adapters import LSTMSpeculatorAdapter, MLPSpeculatorAdapter, SpeculatorAdapter
from verl_speculator.adapters.settings import SHARED_DEFAULTS
from verl_speculator.errors import ConfigError, SpeculatorError
from verl_speculator.losses import Objective, PackedHiddenStates, speculator_loss
from verl_speculator.models import ArcticLSTMSpeculator, MLPSpeculator, MLPSpeculatorConfig

NARROW = {**SHARED_DEFAULTS, "n_predict": 3, "inner_dim": 8, "emb_dim": 8, "proj_dim": 8}
CASES = {
    "sum_rnn": (LSTMSpeculatorAdapter, NARROW),
    "sum_rnn untied": (LSTMSpeculatorAdapter, {**NARROW, "tie_weights": False, "scale_input": True}),
    "sum_lstm": (LSTMSpeculatorAdapter, {**NARROW, "method": "sum_lstm", "inner_dim": "8.12"}),
    "mlp": (MLPSpeculatorAdapter, NARROW),
    "mlp untied": (MLPSpeculatorAdapter, {**NARROW, "tie_weights": False}),
}


@pytest.fixture(params=CASES)
def adapter(request, base) -> SpeculatorAdapter:
    torch.manual_seed(0)
    adapter_class, settings = CASES[request.param]
    adapter = adapter_class(settings)
    adapter.speculator = adapter.build_speculator_module(base)
    return adapter


def test_builds_for_the_base_model(base) -> None:
    built = LSTMSpeculatorAdapter({**NARROW, "method": "sum_lstm"}).build_speculator_module(base)
    assert isinstance(built, ArcticLSTMSpeculator)
    config = built.config
    assert (config.input_hidden_dim, config.vocab_size, config.n_predict) == (12, 40, 3)
    assert (config.method, config.inner_dim) == ("sum_lstm", "8")
    assert config.base_model_name_or_path == "some/base"
    assert config.base_model_archs == ["Qwen2ForCausalLM"]
    mlp = MLPSpeculatorAdapter(NARROW).build_speculator_module(base)
    assert isinstance(mlp, MLPSpeculator)
    assert mlp.config.inner_dim == 8


def test_settings_left_out_have_the_defaults_of_the_guide(base) -> None:
    config = LSTMSpeculatorAdapter({"inner_dim": 8}).build_speculator_module(base).config
    assert (config.n_predict, config.emb_dim, config.method, config.tie_weights) == (5, "1024", "sum_rnn", True)


def test_logits_are_those_of_the_model_on_each_sequence(adapter, packed) -> None:
    """The model's own forward on one sequence at a time is the independent answer."""
    n_predict = adapter.speculator.n_predict
    logits = adapter.compute_speculator_logits(packed)
    assert logits.shape == (n_predict, packed.num_tokens, 40)
    bounds = packed.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        tokens = packed.input_ids[start:stop]
        for head in range(n_predict):
            # Head i at t reads x[t + 1 + i]: the positions at which that is in the sequence.
            length = stop - start - 1 - head
            if length < 1:
                continue
            padded = torch.cat([tokens[1:], tokens.new_zeros(n_predict + 1)])
            alone = adapter.speculator(
                packed.hidden_states[start : start + length].unsqueeze(0), padded[: length + n_predict].unsqueeze(0)
            )
            torch.testing.assert_close(logits[head, start : start + length], alone[head, 0])


def test_loss_is_the_objectives(adapter, packed) -> None:
    loss, metrics = adapter.compute_speculator_loss(packed)
    expected = speculator_loss(adapter.speculator, packed)
    torch.testing.assert_close(loss, expected.loss)
    assert metrics.keys() == expected.metrics.keys()
    loss.backward()
    parameters = list(adapter.get_optimizer_params())
    assert {id(parameter) for parameter in parameters} == {id(p) for p in adapter.speculator.parameters()}
    assert all(parameter.grad is not None for parameter in parameters)


def test_loss_is_the_mean_over_heads_of_the_cross_entropy(adapter, packed) -> None:
    """Straight from the logits, position by position."""
    logits = adapter.compute_speculator_logits(packed)
    bounds = packed.cu_seqlens.tolist()
    means = []
    for head in range(adapter.speculator.n_predict):
        losses = [
            torch.nn.functional.cross_entropy(logits[head, position], packed.input_ids[position + 2 + head])
            for start, stop in pairwise(bounds)
            for position in range(start, stop - 2 - head)
            if packed.loss_mask[position + 2 + head] == 1
        ]
        means.append(torch.stack(losses).mean())
    torch.testing.assert_close(adapter.compute_speculator_loss(packed)[0], torch.stack(means).mean())


def test_parts_add_up_to_the_whole(adapter, packed) -> None:
    whole, _ = adapter.compute_speculator_loss(packed)
    counts = adapter.count_trained_positions(packed.input_ids, packed.loss_mask, packed.cu_seqlens)
    parts = []
    bounds = packed.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        part = PackedHiddenStates(
            packed.hidden_states[start:stop],
            packed.input_ids[start:stop],
            packed.loss_mask[start:stop],
            torch.tensor([0, stop - start]),
            head_counts=counts,
        )
        parts.append(adapter.compute_speculator_loss(part)[0])
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_metrics_are_averaged_without_a_speculator(adapter, packed) -> None:
    loss, metrics = adapter.compute_speculator_loss(packed)
    sums = {name: value.item() for name, value in metrics.items()}
    averages = type(adapter)(adapter.settings).summarize_metrics(sums)
    assert averages["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {f"head_{i}/accuracy" for i in range(3)} <= averages.keys()
    assert averages["acceptance_length"] >= 1


@pytest.mark.parametrize("adapter_class", [LSTMSpeculatorAdapter, MLPSpeculatorAdapter])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_predict": 0}, r"^model\.speculator\.n_predict must be a positive integer"),
        (dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), "1024.x"), r"^model\.speculator\.inner_dim must be"),
        ({"tie_weights": 1}, r"^model\.speculator\.tie_weights must be true or false"),
        ({"scale_inputs": True}, r"^model\.speculator\.scale_inputs .* did you mean model\.speculator\.scale_input\?$"),
        (
            {"qqq": 1},
            r"^model\.speculator\.qqq is not a setting .*; it has draft_vocab_path, draft_vocab_size, emb_dim,",
        ),
        ({"vocab_size": 5}, r"^model\.speculator\.vocab_size is not a setting"),
        ({"torch_dtype": "int8"}, r"^model\.speculator\.torch_dtype must be"),
    ],
)
def test_wrong_settings(adapter_class, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter_class({**NARROW, **changes})


def test_wrong_settings_of_the_lstm() -> None:
    with pytest.raises(ConfigError, match=r"^model\.speculator\.tie_weights must be true for method 'sum_lstm'"):
        LSTMSpeculatorAdapter({**NARROW, "method": "sum_lstm", "tie_weights": False})


@pytest.mark.parametrize("changes", [{"method": "sum_lstm"}, {"tie_lstm_embs": True}, {"emb_dim": 16}])
def test_settings_that_mean_nothing_to_the_mlp(changes) -> None:
    with pytest.raises(ConfigError, match=f"^model.speculator.{next(iter(changes))} is not a setting"):
        MLPSpeculatorAdapter({**NARROW, **changes})


def test_shared_settings_at_their_defaults_mean_nothing_to_the_mlp(base) -> None:
    built = MLPSpeculatorAdapter({**SHARED_DEFAULTS, "inner_dim": 8}).build_speculator_module(base)
    assert built.config.to_dict()["inner_dim"] == 8


@pytest.mark.parametrize(
    ("objective", "weights"),
    [("kl", {"kl": 1.0}), ({"kl": 0.9, "lk": 0.1}, {"kl": 0.9, "lk": 0.1})],
)
def test_objective_comes_from_the_settings(base, packed, objective, weights) -> None:
    settings = {**NARROW, "objective": objective, "objective_temperature": 0.5, "head_loss_weights": {"decay": 0.5}}
    adapter = LSTMSpeculatorAdapter(settings)
    adapter.speculator = adapter.build_speculator_module(base)
    assert adapter.needs.target_head
    packed.lm_head_weight = torch.randn(40, packed.hidden_states.shape[1])
    loss, metrics = adapter.compute_speculator_loss(packed)
    expected = speculator_loss(
        adapter.speculator, packed, objective=Objective(weights, 0.5), head_loss_weights=[4.0, 2.0, 1.0]
    )
    torch.testing.assert_close(loss, expected.loss)
    summary = adapter.summarize_metrics({name: value.item() for name, value in metrics.items()})
    assert 0 < summary["head_2/overlap"] < 1
    assert summary["head_0/cross_entropy"] > 0


def test_hard_labels_need_nothing_of_the_target() -> None:
    assert not LSTMSpeculatorAdapter(NARROW).needs.target_head
    assert not LSTMSpeculatorAdapter({**NARROW, "head_loss_weights": "adaptive"}).needs.target_head


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "klll"}, r"model\.speculator\.objective: 'klll' is none of ce, .*; did you mean kl\?"),
        ({"objective": {"kl": -1}}, r"model\.speculator\.objective: the weight of kl must be 0 or a positive"),
        ({"objective": "kl", "objective_temperature": 0}, r"model\.speculator\.objective: the temperature must be"),
        ({"head_loss_weights": [1, 2]}, r"model\.speculator\.head_loss_weights must hold one weight per head \(3\)"),
        ({"objectiv": "kl"}, r"model\.speculator\.objectiv is not a setting .* did you mean .*\.objective\?"),
    ],
)
def test_wrong_objectives_name_their_key(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        MLPSpeculatorAdapter({**NARROW, **settings})


def test_a_draft_vocabulary_comes_from_a_file(base, tmp_path) -> None:
    kept = np.arange(40) % 3 == 0
    np.save(tmp_path / "t2d.npy", kept)
    adapter = LSTMSpeculatorAdapter({**NARROW, "draft_vocab_path": str(tmp_path / "t2d.npy")})
    speculator = adapter.build_speculator_module(base)
    assert speculator.config.draft_vocab_size == kept.sum()
    assert speculator.draft_ids.tolist() == kept.nonzero()[0].tolist()
    with torch.device("meta"):  # as ranks build it that get their weights from another
        assert adapter.build_speculator_module(base).head_weight(0).shape == (kept.sum(), 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_vocab_size": 0}, r"^model\.speculator\.draft_vocab_size must be a positive integer, not 0"),
        ({"draft_vocab_path": "/absent.npy"}, r"^model\.speculator\.draft_vocab_path: there is no file '/absent\.npy'"),
    ],
)
def test_wrong_draft_vocabularies(settings, message) -> None:
    with pytest.raises(SpeculatorError, match=message):
        MLPSpeculatorAdapter({**NARROW, **settings})


def test_draft_vocabularies_that_do_not_fit(base, tmp_path) -> None:
    np.save(tmp_path / "t2d.npy", np.ones(7, dtype=bool))
    with pytest.raises(ConfigError, match=r"^model\.speculator\.draft_vocab_path must hold one boolean for each of 40"):
        MLPSpeculatorAdapter({**NARROW, "draft_vocab_path": str(tmp_path / "t2d.npy")}).build_speculator_module(base)
    with pytest.raises(ConfigError, match=r"^model\.speculator\.draft_vocab_size needs draft_vocab_path"):
        MLPSpeculatorAdapter({**NARROW, "draft_vocab_size": 7}).build_speculator_module(base)


def test_a_chain_with_rows_for_all_tokens_has_no_draft_vocabulary(base, tmp_path, monkeypatch) -> None:
    np.save(tmp_path / "t2d.npy", np.arange(40) < 9)
    monkeypatch.setattr(MLPSpeculatorConfig, "head_rows", 40)
    adapter = MLPSpeculatorAdapter({**NARROW, "draft_vocab_path": str(tmp_path / "t2d.npy")})
    with pytest.raises(ConfigError, match=r"draft_vocab_size: the head of a MLPSpeculator has 40 rows"):
        adapter.build_speculator_module(base)
