"""The configurations over which the model tests run."""

import itertools

import pytest
import torch

from verl_speculator.models import ArcticLSTMSpeculatorConfig, MLPSpeculatorConfig, Speculator

HIDDEN, VOCAB, N_PREDICT = 18, 37, 3
BOOLS = (False, True)
EQUAL_WIDTHS = [("24", "24", "24"), ("24.24", "24.24", "24.24"), ("24.20", "24", "24.24.24")]
# inner, emb, proj: each step between stacks and inside each stack differs in at least one entry.
DIFFERENT_WIDTHS = [("16.32", "16.32", "16.32"), ("32", "16", "32"), ("24", "24", "16.20"), ("20.28.24", "12", "40.16")]


def mlp_configs():
    for tie, scale, width in itertools.product(BOOLS, BOOLS, (0, 24)):
        yield MLPSpeculatorConfig(**_common(tie, scale), inner_dim=width)


def arctic_configs(widths, tie_options=BOOLS):
    for (inner, emb, proj), tie, scale in itertools.product(widths, tie_options, BOOLS):
        dims = {"inner_dim": inner, "emb_dim": emb, "proj_dim": proj}
        yield ArcticLSTMSpeculatorConfig(**_common(tie, scale), **dims, method="sum_rnn")
        if tie:
            for tie_embs in BOOLS:
                yield ArcticLSTMSpeculatorConfig(
                    **_common(tie, scale), **dims, method="sum_lstm", tie_lstm_embs=tie_embs
                )


def reference_configs():
    """Those that the reference implementations can run."""
    lstm_runs = {("24", "24", "24"), ("24.24", "24.24", "24.24")}
    for config in arctic_configs(EQUAL_WIDTHS):
        if config.method == "sum_rnn" or (config.inner_dim, config.emb_dim, config.proj_dim) in lstm_runs:
            yield config
    yield from mlp_configs()


def all_configs():
    yield from mlp_configs()
    yield from arctic_configs(EQUAL_WIDTHS + DIFFERENT_WIDTHS)
    yield MLPSpeculatorConfig(input_hidden_dim=HIDDEN, vocab_size=VOCAB, n_predict=1)
    for method in ("sum_rnn", "sum_lstm"):
        dims = dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), 24)
        yield ArcticLSTMSpeculatorConfig(input_hidden_dim=HIDDEN, vocab_size=VOCAB, n_predict=1, method=method, **dims)


def describe(config):
    values = config.to_dict()
    kind = values.get("method", "mlp")
    dims = [str(values[name]) for name in ("inner_dim", "emb_dim", "proj_dim") if name in values]
    flags = [name for name in ("tie_weights", "scale_input", "tie_lstm_embs") if values.get(name)]
    return "-".join([kind, f"n{config.n_predict}", *dims, *flags])


def pytest_generate_tests(metafunc):
    for fixture, configs in (("any_config", all_configs), ("reference_config", reference_configs)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, list(configs()), ids=describe)


@pytest.fixture
def make_speculator():
    """Builds a speculator whose norm weights and biases are random too, so that a mistake there shows."""

    def make(config, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        speculator = Speculator.from_config(config).to(dtype)
        speculator.reset_parameters(generator)
        with torch.no_grad():
            for parameter in speculator.parameters():
                if parameter.dim() == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
        return speculator

    return make


@pytest.fixture
def make_inputs():
    """Hidden states [2, 5, H] and tokens [2, 5 + n_predict]."""

    def make(config, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(2, 5, config.input_hidden_dim, generator=generator).to(dtype)
        return hidden, torch.randint(0, config.vocab_size, (2, 5 + config.n_predict), generator=generator)

    return make


def _common(tie, scale):
    return {
        "base_model_name_or_path": "base",
        "input_hidden_dim": HIDDEN,
        "vocab_size": VOCAB,
        "n_predict": N_PREDICT,
        "tie_weights": tie,
        "scale_input": scale,
    }
