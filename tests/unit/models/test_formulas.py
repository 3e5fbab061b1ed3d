"""Logits against the published formulas, written out here a second time on the tensors of an exported checkpoint."""

import math

import torch
from torch.nn import functional as F

from verl_speculator.models import MLPSpeculatorConfig


def rms(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def norm(w, name, x):
    return rms(x) * w[f"{name}.weight"] + w[f"{name}.bias"]


def mix_factor(n_predict, width):
    sw = 0.5 ** (0.5 / n_predict)
    return math.sqrt((1 - sw**2) * width / 2) / sw


def first_state(config, hidden):
    return rms(hidden) / math.sqrt(2) if config.scale_input else hidden


def mlp_logits(config, w, hidden, tokens):
    s, a, logits = first_state(config, hidden), mix_factor(config.n_predict, config.inner_dim), []
    for i in range(config.n_predict):
        x = tokens[:, i : i + hidden.shape[1]]
        s = gelu(norm(w, f"ln.{i}", s @ w[f"proj.{i}.weight"].T + a * w[f"emb.{i}.weight"][x]))
        logits.append(s @ w[f"head.{i}.weight"].T)
    return torch.stack(logits)


def input_stack(w, name, first, depth):
    x = first
    for layer in range(1, depth):
        x = gelu(norm(w, f"{name}.{3 * layer - 2}", x)) @ w[f"{name}.{3 * layer}.weight"].T
    return x


def rnn_logits(config, w, hidden, tokens):
    depths = {name: str(getattr(config, name)).count(".") + 1 for name in ("emb_dim", "proj_dim", "inner_dim")}
    s, logits = first_state(config, hidden), []
    a = mix_factor(config.n_predict, int(str(config.emb_dim).split(".")[-1]))
    for i in range(config.n_predict):
        own, proj = (0, min(i, 1)) if config.tie_weights else (i, i)
        x = w[f"emb.{own}.0.weight"][tokens[:, i : i + hidden.shape[1]]]
        x = input_stack(w, f"emb.{own}", x, depths["emb_dim"])
        s = input_stack(w, f"proj.{proj}", s @ w[f"proj.{proj}.0.weight"].T, depths["proj_dim"]) + a * x
        s = norm(w, f"ln.{own}.0", s)
        for layer in range(1, depths["inner_dim"]):
            s = norm(w, f"ln.{own}.{3 * layer}", gelu(s) @ w[f"ln.{own}.{3 * layer - 1}.weight"].T)
        s = gelu(s)
        logits.append(s @ w[f"head.{i}.weight"].T)
    return torch.stack(logits)


def lstm_logits(config, w, hidden, tokens):
    s, cell, logits = first_state(config, hidden), 0.0, []
    a = mix_factor(config.n_predict, int(str(config.emb_dim).split(".")[-1]))
    for i in range(config.n_predict):
        x = tokens[:, i : i + hidden.shape[1]]
        f, inp, g, o = (
            s @ w[f"{gate}_proj.{min(i, 1)}.weight"].T + a * w[f"{gate}_emb.0.weight"][x]
            for gate in ("forget", "input", "cell", "output")
        )
        cell = cell * torch.sigmoid(f) + gelu(norm(w, "cell_ln.0", g)) * torch.sigmoid(inp)
        s = gelu(norm(w, "state_ln.0", cell)) * torch.sigmoid(o)
        logits.append(s @ w[f"head.{i}.weight"].T)
    return torch.stack(logits)


def formula_for(config):
    if isinstance(config, MLPSpeculatorConfig):
        return mlp_logits
    return lstm_logits if config.method == "sum_lstm" else rnn_logits


def test_logits_and_gradient_follow_the_formulas(reference_config, make_speculator, make_inputs):
    speculator = make_speculator(reference_config, torch.float64)
    hidden, tokens = make_inputs(reference_config, torch.float64)
    exported = speculator.export_state_dict()
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    logits, expected = (
        speculator(ours, tokens),
        formula_for(reference_config)(reference_config, exported, theirs, tokens),
    )
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    F.cross_entropy(logits.flatten(0, -2), tokens[:, :5].repeat(logits.shape[0], 1).flatten()).backward()
    F.cross_entropy(expected.flatten(0, -2), tokens[:, :5].repeat(logits.shape[0], 1).flatten()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_every_exported_tensor_is_one_that_the_formula_reads(reference_config, make_speculator, make_inputs):
    weights = make_speculator(reference_config).export_state_dict()
    read = set()

    class Recorder(dict):
        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

    formula_for(reference_config)(reference_config, Recorder(weights), *make_inputs(reference_config))
    assert read == weights.keys()
