"""Tiny models, ragged data and cases for checking an engine's numbers against the plain float64 computation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.integration.needy_adapter import NEEDY
from tests.integration.reference import PlainTraining
from tests.support.tiny import VOCAB_SIZE, write_base_model
from verl_speculator.adapters import LSTMSpeculatorAdapter
from verl_speculator.algorithms.eagle3 import Eagle3Speculator
from verl_speculator.losses import acceptance_sums
from verl_speculator.models import (
    ArcticLSTMSpeculator,
    ArcticLSTMSpeculatorConfig,
    MLPSpeculator,
    MLPSpeculatorConfig,
    Speculator,
)

PACKED = ["data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=64"]
ONE_ROW = ["data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=1"]
TWO_ROWS = ["data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=2"]
PADDED = ["model.use_remove_padding=false"]
MLP = "model.speculator_adapter=verl_speculator.adapters.MLPSpeculatorAdapter"
EAGLE3 = ["model.speculator_type=eagle3", "+model.speculator.ttt_steps=3", "+model.speculator.ttt_step_loss_decay=0.8"]
JOINT = ["model.freeze_base_model=false", "model.speculator_loss_coeff=0.7", "optim.lr=2e-3", "optim.weight_decay=0"]
SPECULATOR_LOSS_COEFF = 0.7
FRESH = ["model.speculator.n_predict=3", *(f"model.speculator.{name}_dim=24" for name in ("inner", "emb", "proj"))]
SEED = 42
KL, LK = (f"model.speculator.objective={name}" for name in ("kl", "lk"))
CASES_SCRIPT = Path(__file__).with_name("engine_cases.py")


@dataclass
class Case:
    """An engine on one batch; with ``steps`` it then trains on the batches of ``steps.pt``.

    Without a ``speculator`` it makes a fresh one, and there is no batch.
    """

    name: str
    base: str
    speculator: str
    overrides: list[str]
    steps: bool = field(default=False)

    @property
    def is_joint(self) -> bool:
        return "model.freeze_base_model=false" in self.overrides

    @property
    def objective(self) -> str:
        return next((text.partition("objective=")[2] for text in self.overrides if "objective=" in text), "ce")

    @property
    def detaches(self) -> bool:
        return not self.is_joint or "model.detach_hidden_states=true" in self.overrides


def make_rows(seed: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ragged sequences; under two ranks the second gets one that trains nothing and ones too short for every head."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [23, 3, 17, 1, 9, 6, 30, 12]
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
        mask = (torch.rand(length, generator=generator) < 0.6).long()
        # Chat data never trains a sequence's first token, and verl's base loss counts on that.
        mask[: length // 3 + 1] = 0
        rows.append((ids, torch.zeros_like(mask) if index == 5 else mask))
    return rows


def make_speculators(folder: Path) -> dict[str, Path]:
    arctic = {"input_hidden_dim": 32, "vocab_size": VOCAB_SIZE, "n_predict": 3}
    widths = {"inner_dim": "24", "emb_dim": "24", "proj_dim": "24"}
    speculators: dict[str, Speculator] = {
        "lstm": ArcticLSTMSpeculator(ArcticLSTMSpeculatorConfig(**arctic, **widths, method="sum_lstm")),
        "rnn": ArcticLSTMSpeculator(ArcticLSTMSpeculatorConfig(**arctic, **widths, scale_input=True)),
        "mlp_untied": MLPSpeculator(MLPSpeculatorConfig(**arctic, inner_dim=24, tie_weights=False)),
        "rnn_drafts": ArcticLSTMSpeculator(ArcticLSTMSpeculatorConfig(**arctic, **widths, draft_vocab_size=256)),
    }
    speculators["rnn_drafts"].set_draft_ids((torch.arange(VOCAB_SIZE) % 3 != 1).nonzero().squeeze(1))
    for name, settings in {
        "eagle3": {"t2d": torch.arange(VOCAB_SIZE) % 3 != 1, "num_layers": 2},
        "eagle3_plain": {"norm_before_fc": False, "norm_output": False, "norm_before_residual": False},
    }.items():
        # All three states of the tiny models: embeddings, between the layers, and before the final norm.
        config = AutoConfig.from_pretrained(folder / "qwen2")
        speculators[name] = Eagle3Speculator.from_training_args(config, target_layer_ids=[0, 1, 2], **settings)
    for seed, (name, speculator) in enumerate(speculators.items()):
        speculator.reset_parameters(torch.Generator().manual_seed(seed))
        if isinstance(speculator, Eagle3Speculator):
            with torch.no_grad():
                for parameter in speculator.parameters():
                    # Drawn as for a large model, the logits would be all but equal.
                    parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
        speculator.save_pretrained(folder / name)
    return {name: folder / name for name in speculators}


def write_world(folder: Path) -> dict[str, Path]:
    torch.save(make_rows(), folder / "rows.pt")
    write_base_model(folder / "qwen2", family="qwen2", tie=True)
    write_base_model(folder / "qwen3", family="qwen3", tie=True, seed=1)
    write_base_model(folder / "llama_untied", family="llama", tie=False, seed=2)
    write_base_model(folder / "llama_tied", family="llama", tie=True, seed=3)
    # With capped, divided, multiplied and biased logits.
    write_base_model(folder / "gemma2", family="gemma2", tie=True, seed=4, final_logit_softcapping=2.0)
    write_base_model(folder / "granite", family="granite", tie=False, seed=5, logits_scaling=3.0)
    write_base_model(folder / "cohere", family="cohere", tie=True, seed=6, logit_scale=0.4)
    write_base_model(folder / "phi", family="phi", tie=False, seed=7)
    # Of a kind that both engines run; transformers does not know what the key stands for.
    write_base_model(folder / "llama_scaled", family="llama", tie=False, seed=8, logit_scale=0.4)
    make_speculators(folder)
    return {path.name: path for path in folder.iterdir()}


def write_cases(file: Path, cases: list[Case], world: dict[str, Path]) -> Path:
    """What ``engine_cases.py`` reads."""
    written = []
    for case in cases:
        models = [f"model.path={world[case.base]}"]
        if case.speculator:
            models.append(f"model.speculator_path={world[case.speculator]}")
        steps = {"steps": str(world["steps.pt"])} if case.steps else {}
        batch = str(world["rows.pt"])
        written.append({"name": case.name, "batch": batch, "overrides": [*models, *case.overrides], **steps})
        written[-1]["fresh"] = not case.speculator
    file.write_text(json.dumps(written))
    return file


def read_state(results: Path, case: Case) -> dict:
    return json.loads((results / f"{case.name}.json").read_text())


def check_loss_and_gradients(case: Case, world: dict[str, Path], results: Path) -> None:
    state = read_state(results, case)
    plain = PlainTraining(world[case.base], world[case.speculator])
    rows = make_rows()
    speculator_loss = plain.speculator_loss(rows, detach=case.detaches, objective=case.objective)
    if NEEDY in case.overrides:
        speculator_loss = speculator_loss + plain.soft_loss(rows, detach=case.detaches)
    loss = speculator_loss
    if case.is_joint:
        loss = plain.base_loss(rows) + SPECULATOR_LOSS_COEFF * speculator_loss
    loss.backward()

    assert state["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert state["eval_loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert state["sums"]["speculator_loss"] == pytest.approx(speculator_loss.item(), rel=2e-6)
    actual = load_file(results / f"{case.name}.safetensors")
    expected = plain.gradients()
    if not case.is_joint:
        expected = {name: grad for name, grad in expected.items() if name.startswith("speculator.")}
    assert set(expected) <= set(actual)
    for name, grad in actual.items():
        wanted = expected.get(name, torch.zeros_like(grad, dtype=torch.float64))
        scale = max(wanted.abs().max().item(), 1e-3)
        torch.testing.assert_close(grad.double(), wanted, rtol=0, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


def check_acceptance(case: Case, world: dict[str, Path], results: Path) -> None:
    """The sums themselves are checked against decoding in the unit tests; here, what the engine hands to them."""
    sums = read_state(results, case)["eval_sums"]
    plain = PlainTraining(world[case.base], world[case.speculator])
    expected = acceptance_sums(plain.speculator, plain.packed(make_rows()))
    assert "closed_loop_sampled/rounds" in expected
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def check_start_from_base(case: Case, world: dict[str, Path], results: Path) -> None:
    """A fresh speculator of the settings of `FRESH` has the weights that one process gives it."""
    base = AutoModelForCausalLM.from_pretrained(world[case.base], dtype=torch.float32)
    adapter = LSTMSpeculatorAdapter({"inner_dim": 24, "emb_dim": 24, "proj_dim": 24, "n_predict": 3})
    torch.manual_seed(SEED)
    speculator = adapter.build_speculator_module(base)
    embed_tokens, lm_head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    drawn = speculator.head_weight(0).detach().clone()
    speculator.start_from_base(embed_tokens, lm_head, torch.Generator().manual_seed(SEED))
    assert not torch.allclose(drawn, speculator.head_weight(0))
    found = load_file(results / f"{case.name}.safetensors")
    assert len(found) == len(speculator.state_dict())
    for name, tensor in speculator.state_dict().items():
        torch.testing.assert_close(found[f"speculator.{name}"], tensor, rtol=1e-3, atol=1e-4, msg=name)


def check_learning_rates(case: Case, results: Path) -> None:
    """The base moves by its own learning rate: given, or a tenth of the speculator's."""
    given = [float(key.partition("=")[2]) for key in case.overrides if key.startswith("optim.base_lr=")]
    moved = read_state(results, case)["moved"]
    assert moved["speculator"] == pytest.approx(2e-3, rel=1e-2)
    assert moved["base"] == pytest.approx(given[0] if given else 2e-4, rel=1e-2)


def check_bfloat16(case: Case, world: dict[str, Path], results: Path) -> None:
    state = read_state(results, case)
    plain = PlainTraining(world[case.base], world[case.speculator])
    loss = plain.speculator_loss(make_rows(), detach=True)
    loss.backward()
    assert state["loss"] == pytest.approx(loss.item(), rel=1e-2)
    actual = load_file(results / f"{case.name}.safetensors")
    for name, wanted in plain.gradients().items():
        cosine = torch.nn.functional.cosine_similarity(actual[name].double().flatten(), wanted.flatten(), dim=0)
        assert actual[name].dtype == torch.float32, "gradients are reduced in float32"
        assert cosine > 0.98 or wanted.abs().max() < 1e-6, name
