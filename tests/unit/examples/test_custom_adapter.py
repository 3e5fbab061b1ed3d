"""The example of a user's own speculator type: found in its file, trained, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from verl_speculator.adapters import build_speculator_adapter
from verl_speculator.errors import ConfigError
from verl_speculator.losses import PackedHiddenStates
from verl_speculator.models import Speculator
from verl_speculator.trainer.config.compose import load_config
from verl_speculator.trainer.config.preflight import check_run

FILE = Path(__file__).resolve().parents[3] / "examples" / "custom_adapter" / "gated_adapter.py"
NAMED = f"model.speculator_adapter={{path: {FILE}, name: GatedSpeculatorAdapter}}"


def build(*overrides: str):
    config = load_config([NAMED, "model.speculator.inner_dim=8", "model.speculator.n_predict=3", *overrides])
    adapter = build_speculator_adapter(config.model.speculator_adapter, config.model.speculator)
    base = torch.nn.Module()
    base.config = AutoConfig.for_model("qwen2", vocab_size=40, hidden_size=12)
    adapter.speculator = adapter.build_speculator_module(base)
    return adapter


@pytest.fixture
def packed() -> PackedHiddenStates:
    torch.manual_seed(0)
    return PackedHiddenStates(
        hidden_states=torch.randn(24, 12),
        input_ids=torch.randint(40, (24,)),
        loss_mask=torch.ones(24, dtype=torch.long),
        cu_seqlens=torch.tensor([0, 10, 24]),
    )


def test_its_own_setting_arrives(packed) -> None:
    adapter = build("+model.speculator.gate_bias=2.5")
    assert adapter.speculator.config.gate_bias == 2.5
    assert adapter.speculator.config.inner_dim == 8
    assert not torch.equal(adapter.compute_speculator_logits(packed), build().compute_speculator_logits(packed))


def test_learns(packed) -> None:
    adapter = build()
    optimizer = torch.optim.Adam(adapter.get_optimizer_params(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss, _ = adapter.compute_speculator_loss(packed)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in adapter.speculator.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_saves_and_loads(packed, tmp_path) -> None:
    adapter = build("+model.speculator.gate_bias=1.0")
    adapter.speculator.save_pretrained(tmp_path)
    loaded = Speculator.from_pretrained(tmp_path)
    assert type(loaded) is type(adapter.speculator)
    assert loaded.config == adapter.speculator.config
    before = adapter.compute_speculator_logits(packed)
    adapter.speculator = loaded
    torch.testing.assert_close(adapter.compute_speculator_logits(packed), before, rtol=0, atol=0)


def test_drafts_as_its_forward_does() -> None:
    speculator = build().speculator
    hidden, last = torch.randn(4, 12), torch.randint(40, (4,))
    drafted = speculator.draft(hidden, last, 3)
    tokens = torch.cat([last.unsqueeze(1), drafted], dim=1)
    assert torch.equal(speculator(hidden.unsqueeze(1), tokens).argmax(-1).squeeze(2).T, drafted)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+model.speculator.gate_bias=high", r"^model\.speculator\.gate_bias must be a number"),
        ("+model.speculator.gate_bais=1", r"did you mean model\.speculator\.gate_bias\?"),
        ("model.speculator.tie_weights=false", r"^model\.speculator\.tie_weights must be true"),
        ("model.speculator.method=sum_lstm", r"^model\.speculator\.method is not a setting of this speculator"),
    ],
)
def test_wrong_settings(override, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build(override)


def test_run_with_it_passes_the_checks(base_model, chat_data, tmp_path) -> None:
    run = [NAMED, f"model.partial_pretrain={base_model}", f"data.train_files={chat_data.train}"]
    check_run(load_config([*run, f"trainer.default_local_dir={tmp_path}", "+model.speculator.gate_bias=1"]), 2)
