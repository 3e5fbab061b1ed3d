"""`config.json` in and out, and one clear sentence for every value that cannot work."""

import pytest

from verl_speculator.errors import ConfigError
from verl_speculator.models import (
    ArcticLSTMSpeculatorConfig,
    MLPSpeculatorConfig,
    SpeculatorConfig,
    SpeculatorConfigBase,
)
from verl_speculator.models.config import parse_width

BASE = {"base_model_name_or_path": "base", "input_hidden_dim": 48, "vocab_size": 211}


def test_defaults():
    lstm, mlp = ArcticLSTMSpeculatorConfig(**BASE), MLPSpeculatorConfig(**BASE)
    assert (lstm.n_predict, lstm.scale_input, lstm.tie_weights, lstm.tie_lstm_embs) == (5, False, True, False)
    assert (lstm.inner_widths, lstm.emb_widths, lstm.proj_widths) == ((1024,), (1024,), (1024,))
    assert lstm.method == "sum_rnn"
    assert mlp.inner_dim == mlp.input_hidden_dim == 48


def test_lstm_file_format():
    config = ArcticLSTMSpeculatorConfig(
        **BASE, n_predict=4, inner_dim="40.60", emb_dim=40, method="sum_lstm", tie_lstm_embs=True
    )
    assert config.to_dict() == {
        "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "base_model_name_or_path": "base",
        "input_hidden_dim": 48,
        "inner_dim": "40.60",
        "emb_dim": "40",
        "proj_dim": "1024",
        "vocab_size": 211,
        "n_predict": 4,
        "n_candidates": 4,
        "top_k_tokens_per_head": [1, 1, 1, 1],
        "scale_input": False,
        "tie_weights": True,
        "tie_lstm_embs": True,
        "method": "sum_lstm",
        "torch_dtype": "bfloat16",
    }


def test_mlp_file_format():
    config = MLPSpeculatorConfig(**BASE, n_predict=3, inner_dim=32, base_model_archs=["LlamaForCausalLM"])
    assert config.to_dict() == {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "base_model_name_or_path": "base",
        "emb_dim": 48,
        "inner_dim": 32,
        "vocab_size": 211,
        "n_predict": 3,
        "n_candidates": 3,
        "top_k_tokens_per_head": [1, 1, 1],
        "scale_input": False,
        "tie_weights": True,
        "torch_dtype": "bfloat16",
        "base_model_archs": ["LlamaForCausalLM"],
    }


def test_round_trip(any_config):
    values = any_config.to_dict()
    assert SpeculatorConfig.from_dict(values) == any_config
    assert "hidden_size" not in values


@pytest.mark.parametrize("architecture", ["MLPSpeculatorPreTrainedModel", "ArcticMLPSpeculatorPreTrainedModel"])
@pytest.mark.parametrize("inner", [{}, {"inner_dim": 0}, {"inner_dim": None}])
def test_mlp_files_of_other_projects(architecture, inner):
    values = {
        "architectures": architecture,
        "emb_dim": 48,
        "vocab_size": 211,
        "n_predict": 3,
        "top_k_tokesns_per_head": [1, 1, 1],
        "transformers_version": "4.38.2",
        "dtype": "float16",
        **inner,
    }
    config = SpeculatorConfig.from_dict(values)
    assert isinstance(config, MLPSpeculatorConfig)
    assert (config.input_hidden_dim, config.inner_dim, config.torch_dtype) == (48, 48, "float16")


def test_subclass_needs_no_architecture_but_checks_one():
    assert MLPSpeculatorConfig.from_dict({**BASE, "tie_weights": True}) == MLPSpeculatorConfig(**BASE)
    with pytest.raises(ConfigError, match=r"^architectures must hold MLPSpeculatorPreTrainedModel"):
        MLPSpeculatorConfig.from_dict(ArcticLSTMSpeculatorConfig(**BASE).to_dict())


@pytest.mark.parametrize("architectures", [None, "LlamaForCausalLM", [], ["MLPSpeculatorPreTrainedModel", "B"], 3])
def test_unknown_architectures(architectures):
    with pytest.raises(ConfigError, match=r"^architectures must hold one of .*MLPSpeculatorPreTrainedModel"):
        SpeculatorConfig.from_dict({**BASE, "architectures": architectures})


def test_missing_and_misspelt_keys():
    with pytest.raises(ConfigError, match=r"^vocab_size is missing"):
        MLPSpeculatorConfig.from_dict({"input_hidden_dim": 48})
    with pytest.raises(ConfigError, match=r"^n_predcit is not a speculator setting; n_predict is"):
        MLPSpeculatorConfig.from_dict({**BASE, "n_predcit": 3})


@pytest.mark.parametrize("value", [0, -1, "x", True, 2.5, None])
@pytest.mark.parametrize("name", ["n_predict", "vocab_size", "input_hidden_dim"])
def test_counts_are_positive_integers(name, value):
    for config_class in (MLPSpeculatorConfig, ArcticLSTMSpeculatorConfig):
        with pytest.raises(ConfigError, match=f"^{name} must be a positive integer"):
            config_class(**{**BASE, name: value})


@pytest.mark.parametrize("value", ["", "1024.x", "0", 0, -1, "-1", "1024..2", ".5", "5.", "1024.0", 1024.5, True, None])
@pytest.mark.parametrize("name", ["inner_dim", "emb_dim", "proj_dim"])
def test_widths(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be "):
        ArcticLSTMSpeculatorConfig(**BASE, **{name: value})


@pytest.mark.parametrize("value", ["", "32.32", "x", -1, True, False, 2.5, None])
def test_mlp_width(value):
    with pytest.raises(ConfigError, match=r"^inner_dim must be "):
        MLPSpeculatorConfig(**BASE, inner_dim=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sum_gru"}, "^method must be 'sum_rnn' or 'sum_lstm', not 'sum_gru'"),
        ({"method": ["sum_rnn"]}, "^method must be 'sum_rnn' or 'sum_lstm'"),
        ({"method": "sum_lstm", "tie_weights": False}, "^tie_weights must be true for method 'sum_lstm'"),
        ({"tie_weights": "true"}, "^tie_weights must be true or false"),
        ({"scale_input": 1}, "^scale_input must be true or false"),
        ({"tie_lstm_embs": None}, "^tie_lstm_embs must be true or false"),
        ({"torch_dtype": "int8"}, "^torch_dtype must be 'bfloat16' or"),
        ({"base_model_name_or_path": None}, "^base_model_name_or_path must be a model name or a path"),
        ({"base_model_archs": "LlamaForCausalLM"}, "^base_model_archs must be a list"),
    ],
)
def test_other_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        ArcticLSTMSpeculatorConfig(**{**BASE, **changes})


@pytest.mark.parametrize(("name", "most"), [("n_predict", 256), ("vocab_size", 2**24), ("input_hidden_dim", 2**20)])
def test_counts_have_bounds(name, most):
    """Before: a speculator of 10^9 heads was being built for as long as anybody waited."""
    MLPSpeculatorConfig(**{**BASE, "inner_dim": 8, name: most})
    for value in (most + 1, 10**9, 10**40):
        with pytest.raises(ConfigError, match=f"^{name} must be at most {most}, not [0-9.]+$"):
            MLPSpeculatorConfig(**{**BASE, name: value})


@pytest.mark.parametrize("value", [2**20 + 1, 10**30, "9" * 30, "9" * 6000, "1" + ".1" * 16, "8." * 5000 + "8"])
@pytest.mark.parametrize("config_class", [MLPSpeculatorConfig, ArcticLSTMSpeculatorConfig])
def test_widths_have_bounds(config_class, value):
    with pytest.raises(ConfigError, match=r"^inner_dim must be .{10,200}$"):
        config_class(**BASE, inner_dim=value)


@pytest.mark.parametrize("architectures", [[["A"]], [{}], {"A": 1}, [None]])
def test_architectures_of_the_wrong_type(architectures):
    with pytest.raises(ConfigError, match=r"^architectures must hold one of "):
        SpeculatorConfig.from_dict({**BASE, "architectures": architectures})


def test_parse_width():
    assert parse_width(8, "w") == parse_width("8", "w") == (8,)
    assert parse_width("8.16.4", "w") == (8, 16, 4)


def test_base_of_another_size():
    config = MLPSpeculatorConfig(**BASE)
    config.check_fits_base(48, 211)
    with pytest.raises(ConfigError, match=r"^the one was trained for hidden size 48 .* has 64; .* on \(base\)$"):
        config.check_fits_base(64, 211, "the one")
    with pytest.raises(ConfigError, match="trained for vocabulary size 211 and the base model has 212"):
        config.check_fits_base(48, 212)


@pytest.mark.parametrize("config_class", [MLPSpeculatorConfig, ArcticLSTMSpeculatorConfig])
@pytest.mark.parametrize("values", [BASE, {**BASE, "tie_weights": None}])
def test_a_file_that_does_not_say_whether_weights_are_tied_has_them_untied(config_class, values):
    assert config_class.from_dict(values) == config_class(**BASE, tie_weights=False)


def test_the_base_has_only_what_every_speculator_has():
    class OtherConfig(SpeculatorConfig):
        architectures = ("Other",)

    config = OtherConfig(**BASE)
    assert config.to_dict() == {
        "architectures": ["Other"],
        "model_type": "speculator",
        **BASE,
        "n_predict": 5,
        "torch_dtype": "bfloat16",
    }
    assert SpeculatorConfig.from_dict(config.to_dict()) == config


def test_a_configuration_saves_itself(any_config, tmp_path):
    any_config.save(tmp_path / "new")
    assert SpeculatorConfigBase.from_pretrained(tmp_path / "new") == any_config
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["config.json"]
