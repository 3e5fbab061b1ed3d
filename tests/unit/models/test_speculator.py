"""Forward, backward, drafting and initialisation of every configuration."""

import pytest
import torch

from verl_speculator.errors import ConfigError
from verl_speculator.models import (
    ArcticLSTMSpeculator,
    ArcticLSTMSpeculatorConfig,
    MLPSpeculator,
    MLPSpeculatorConfig,
    Speculator,
)


def lstm_config(**changes):
    widths = dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), 24)
    values = {"input_hidden_dim": 18, "vocab_size": 37, "n_predict": 3, "method": "sum_lstm", **widths}
    return ArcticLSTMSpeculatorConfig(**(values | changes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_parameter_gets_a_finite_gradient(any_config, make_speculator, make_inputs, dtype):
    speculator = make_speculator(any_config, dtype)
    logits = speculator(*make_inputs(any_config, dtype))
    assert logits.dtype == dtype
    assert logits.shape == (any_config.n_predict, 2, 5, any_config.vocab_size)
    logits.float().pow(2).mean().backward()
    for name, parameter in speculator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_few_steps_of_training_lower_the_loss(any_config, make_speculator, make_inputs):
    speculator = make_speculator(any_config)
    hidden, tokens = make_inputs(any_config)
    optimizer = torch.optim.Adam(speculator.parameters(), lr=3e-3)
    targets = tokens.roll(-1, 1)[:, :5].repeat(any_config.n_predict, 1, 1)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(speculator(hidden, tokens).flatten(0, 2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_draft_is_forward_on_its_own_tokens(any_config, make_speculator, make_inputs):
    speculator = make_speculator(any_config, torch.float64)
    hidden = make_inputs(any_config, torch.float64)[0].flatten(0, 1)  # [10, H]
    tokens = torch.arange(10)[:, None]
    for i in range(any_config.n_predict):
        padded = torch.nn.functional.pad(tokens, (0, any_config.n_predict - i))
        logits = speculator(hidden[:, None], padded)  # [n_predict, 10, 1, V]
        tokens = torch.cat([tokens, logits[i, :, 0].argmax(-1, keepdim=True)], dim=1)
    drafted = speculator.draft(hidden, tokens[:, 0], any_config.n_predict)
    assert torch.equal(drafted, tokens[:, 1:])
    assert torch.equal(speculator.draft(hidden, tokens[:, 0], 1), tokens[:, 1:2])


def test_primitives_make_up_forward(any_config, make_speculator, make_inputs):
    speculator = make_speculator(any_config, torch.float64)
    hidden, tokens = make_inputs(any_config, torch.float64)
    packed = hidden.flatten(0, 1)  # [10, H]
    state = speculator.begin(packed)
    for i, logits in enumerate(speculator(hidden, tokens)):
        state, output = speculator.step(state, speculator.embed(tokens[:, i : i + 5].flatten(), i), i)
        torch.testing.assert_close(output @ speculator.head_weight(i).T, logits.flatten(0, 1))
    assert speculator.heads_are_tied == (speculator.head_weight(0) is speculator.head_weight(any_config.n_predict - 1))


@pytest.mark.parametrize("num_tokens", [0, -1, 4])
def test_draft_length_out_of_range(num_tokens):
    speculator = Speculator.from_config(lstm_config())
    with pytest.raises(ConfigError, match=r"^num_tokens must be from 1 to n_predict \(3\)"):
        speculator.draft(torch.zeros(2, 18), torch.zeros(2, dtype=torch.long), num_tokens)


def test_draft_takes_hidden_states_of_another_type():
    speculator = Speculator.from_config(lstm_config())
    assert speculator.draft(torch.zeros(2, 18, dtype=torch.bfloat16), torch.tensor([1, 2]), 3).shape == (2, 3)


def test_too_few_tokens():
    with pytest.raises(ValueError, match=r"tokens must be \[B, S \+ n_predict\] = \[2, 8\], not \[2, 6\]"):
        Speculator.from_config(lstm_config())(torch.zeros(2, 5, 18), torch.zeros(2, 6, dtype=torch.long))


def test_parameters_are_registered_once(any_config):
    speculator = Speculator.from_config(any_config)
    assert len(list(speculator.named_parameters(remove_duplicate=False))) == len(list(speculator.parameters()))


def test_no_bridge_where_widths_are_equal(reference_config):
    assert not any("bridge" in name for name, _ in Speculator.from_config(reference_config).named_parameters())


@pytest.mark.parametrize("method", ["sum_rnn", "sum_lstm"])
def test_bridges_only_where_widths_differ(method):
    speculator = Speculator.from_config(lstm_config(method=method, inner_dim="24", emb_dim="16", proj_dim="24"))
    bridges = {name: list(p.shape) for name, p in speculator.named_parameters() if "bridge" in name}
    gates = [""] if method == "sum_rnn" else ["forget_", "input_", "cell_", "output_"]
    assert bridges == {f"{gate}emb_bridge.0.0.weight": [24, 16] for gate in gates}


def test_initialisation_is_reproducible_and_scaled():
    config = lstm_config(method="sum_rnn", vocab_size=4096, inner_dim="64.256", emb_dim=64, proj_dim=64)
    first, second = Speculator.from_config(config), Speculator.from_config(config)
    assert not torch.equal(first.head_weight(0), second.head_weight(0))
    for speculator in (first, second):
        speculator.reset_parameters(torch.Generator().manual_seed(3))
    assert_initialised(first, second)


@pytest.mark.parametrize("tie_lstm_embs", [False, True])
def test_every_gate_is_initialised_by_its_own_shape(tie_lstm_embs):
    """Although the four gates' weights are one parameter: its smaller side would be four times as large."""
    config = lstm_config(
        vocab_size=2048, input_hidden_dim=512, inner_dim=96, emb_dim=96, proj_dim=96, tie_lstm_embs=tie_lstm_embs
    )
    speculators = Speculator.from_config(config), Speculator.from_config(config)
    for speculator in speculators:
        speculator.reset_parameters(torch.Generator().manual_seed(3))
    assert_initialised(*speculators)


def assert_initialised(first, second):
    weights, same = (speculator.file_views(speculator.state_dict()) for speculator in (first, second))
    for name, one in weights.items():
        assert torch.equal(one, same[name]), name
        if one.dim() == 1:
            assert torch.equal(one, torch.full_like(one, float("weight" in name))), name
        else:
            assert one.std() * min(one.shape) ** 0.5 == pytest.approx(1, rel=0.05), name


def test_one_loop_serves_text_and_drafts(any_config, make_speculator, make_inputs):
    """`unroll` on tokens that are all known, and on tokens that are chosen on the way, with fewer rows at each head."""
    speculator = make_speculator(any_config, torch.float64)
    hidden = make_inputs(any_config, torch.float64)[0].flatten(0, 1)  # [10, H]
    last = torch.arange(10)
    chosen = torch.cat([last[:, None], speculator.draft(hidden, last, any_config.n_predict)], dim=1)

    kept = [list(range(10 - 2 * i)) for i in range(any_config.n_predict)]
    embedded = speculator.embed_all([chosen[rows, i] for i, rows in enumerate(kept)])
    outputs = list(speculator.unroll(hidden, embedded, lambda part, i: part[: len(kept[i])]))

    assert [len(output) for output in outputs] == [len(rows) for rows in kept]
    for i, output in enumerate(outputs):
        assert torch.equal((output @ speculator.head_weight(i).T).argmax(-1), chosen[kept[i], i + 1])


def test_drafts_may_be_chosen_otherwise():
    speculator = Speculator.from_config(lstm_config())
    hidden, last = torch.randn(4, 18), torch.arange(4)
    least = speculator.draft(hidden, last, 3, choose=lambda logits: logits.argmin(-1))
    logits = speculator(hidden[:, None], torch.cat([last[:, None], least], dim=1))
    assert torch.equal(least, logits.argmin(-1).squeeze(2).T)


@pytest.mark.parametrize("config", ["mlp", "sum_rnn", "sum_lstm"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_table_is_read_once(config, tied):
    """For all heads and all gates: the gradient of a table is as large as the table, and there is one per reading."""
    if config == "mlp":
        values = MLPSpeculatorConfig(input_hidden_dim=18, vocab_size=37, n_predict=3, inner_dim=24, tie_weights=tied)
    else:
        values = lstm_config(method=config, tie_weights=tied or config == "sum_lstm")
    speculator = Speculator.from_config(values)
    read = []
    for module in speculator.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(lambda *_: read.append(1))
    speculator(torch.randn(2, 5, 18), torch.randint(37, (2, 8)))
    assert len(read) == (1 if values.tie_weights else 3)


def test_the_gates_of_an_lstm_are_one_product():
    speculator = Speculator.from_config(lstm_config())
    products = []
    for module in speculator.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: products.append(1))
    speculator(torch.randn(2, 5, 18), torch.randint(37, (2, 8)))
    assert len(products) == 3, "one for each head; the vocabulary matrix is used without its module"


def test_mlp_initialisation_uses_the_inner_width():
    config = MLPSpeculatorConfig(input_hidden_dim=64, vocab_size=512, inner_dim=256)
    for name, weight in Speculator.from_config(config).named_parameters():
        if weight.dim() == 2:
            assert weight.detach().std() * 256**0.5 == pytest.approx(1, rel=0.05), name


def test_from_config_dispatches_and_checks():
    assert type(Speculator.from_config(lstm_config())) is ArcticLSTMSpeculator
    assert type(MLPSpeculator.from_config(MLPSpeculatorConfig(input_hidden_dim=8, vocab_size=9))) is MLPSpeculator
    with pytest.raises(ConfigError, match=r"ArcticLSTMSpeculator, not a MLPSpeculator"):
        MLPSpeculator.from_config(lstm_config())
