"""Loss and gradients of the engine against the plain float64 computation, however the batch is cut."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.reference import PlainTraining
from tests.support.tiny import VOCAB_SIZE, write_base_model
from verl_speculator.losses import acceptance_sums
from verl_speculator.models import (
    ArcticLSTMSpeculator,
    ArcticLSTMSpeculatorConfig,
    MLPSpeculator,
    MLPSpeculatorConfig,
    Speculator,
)

pytestmark = pytest.mark.slow

PACKED = ["data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=64"]
ONE_ROW = ["data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=1"]
TWO_ROWS = ["data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=2"]
PADDED = ["model.use_remove_padding=false"]
MLP = "model.speculator_adapter=verl_speculator.adapters.MLPSpeculatorAdapter"
JOINT = ["model.freeze_base_model=false", "model.speculator_loss_coeff=0.7"]


@dataclass
class Case:
    name: str
    base: str
    speculator: str
    overrides: list[str]

    @property
    def is_joint(self) -> bool:
        return "model.freeze_base_model=false" in self.overrides

    @property
    def detaches(self) -> bool:
        return not self.is_joint or "model.detach_hidden_states=true" in self.overrides


CASES = [
    Case("packed", "qwen2", "lstm", PACKED),
    Case("packed_one_row", "qwen2", "lstm", ONE_ROW),
    Case("packed_deferred_sync", "qwen2", "rnn", [*ONE_ROW, "engine.use_no_sync_for_gradient_accumulation=true"]),
    Case("padded", "qwen2", "lstm", [*TWO_ROWS, *PADDED]),
    Case("padded_untied_llama", "llama_untied", "mlp_untied", [*PACKED, *PADDED, MLP]),
    Case("packed_qwen3", "qwen3", "rnn", TWO_ROWS),
    Case("joint", "qwen2", "lstm", [*PACKED, *JOINT]),
    Case("joint_one_row", "qwen2", "lstm", [*ONE_ROW, *JOINT]),
    Case("joint_padded_untied", "llama_untied", "rnn", [*TWO_ROWS, *PADDED, *JOINT]),
    Case("joint_detached", "qwen2", "lstm", [*TWO_ROWS, *JOINT, "model.detach_hidden_states=true"]),
]


BF16_BASE = "+engine.mixed_precision={param_dtype: bf16, reduce_dtype: fp32}"
# The base computes in bfloat16; the speculator in either. Compared with bfloat16's tolerance.
BF16_CASES = [
    Case("bf16_base_fp32_speculator", "qwen2", "lstm", [*PACKED, BF16_BASE, "model.speculator_dtype=fp32"]),
    Case("bf16", "qwen2", "lstm", [*PACKED, BF16_BASE, "engine.model_dtype=bf16"]),
]


def make_rows() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ragged sequences; under two ranks the second gets one that trains nothing and ones too short for every head."""
    generator = torch.Generator().manual_seed(3)
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
    }
    for seed, (name, speculator) in enumerate(speculators.items()):
        speculator.reset_parameters(torch.Generator().manual_seed(seed))
        speculator.save_pretrained(folder / name)
    return {name: folder / name for name in speculators}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("numbers")
    torch.save(make_rows(), folder / "rows.pt")
    write_base_model(folder / "qwen2", family="qwen2", tie=True)
    write_base_model(folder / "qwen3", family="qwen3", tie=True, seed=1)
    write_base_model(folder / "llama_untied", family="llama", tie=False, seed=2)
    make_speculators(folder)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request, world, torchrun, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("results")
    cases = [
        {
            "name": case.name,
            "batch": str(world["rows.pt"]),
            "overrides": [
                f"model.path={world[case.base]}",
                f"model.speculator_path={world[case.speculator]}",
                *case.overrides,
            ],
        }
        for case in [*CASES, *BF16_CASES]
    ]
    (output / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("engine_cases.py")
    torchrun(request.param, str(script), str(output / "cases.json"), str(output))
    return output


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_plain_float64_training(case: Case, world, results) -> None:
    state = json.loads((results / f"{case.name}.json").read_text())
    plain = PlainTraining(world[case.base], world[case.speculator])
    rows = make_rows()
    speculator_loss = plain.speculator_loss(rows, detach=case.detaches)
    loss = plain.base_loss(rows) + 0.7 * speculator_loss if case.is_joint else speculator_loss
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_validation_measures_acceptance_however_the_batch_is_cut(case: Case, world, results) -> None:
    """The sums themselves are checked against decoding in the unit tests; here, what the engine hands to them."""
    sums = json.loads((results / f"{case.name}.json").read_text())["eval_sums"]
    plain = PlainTraining(world[case.base], world[case.speculator])
    expected = acceptance_sums(plain.speculator, plain.packed(make_rows()))
    assert "closed_loop_sampled/rounds" in expected
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_joint], ids=lambda case: case.name)
def test_frozen_base_has_no_part_in_training(case: Case, results) -> None:
    state = json.loads((results / f"{case.name}.json").read_text())
    assert state["base_grads"] == []
    assert state["training"] is False, "a frozen base must not use dropout"
    assert state["optimizer_params"] == state["speculator_params"]
    assert state["base_modules"].count("lm_head") == 1, "the tap stands in lm_head's place"


@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_bfloat16_base(case: Case, world, results) -> None:
    state = json.loads((results / f"{case.name}.json").read_text())
    plain = PlainTraining(world[case.base], world[case.speculator])
    loss = plain.speculator_loss(make_rows(), detach=True)
    loss.backward()
    assert state["loss"] == pytest.approx(loss.item(), rel=1e-2)
    actual = load_file(results / f"{case.name}.safetensors")
    for name, wanted in plain.gradients().items():
        cosine = torch.nn.functional.cosine_similarity(actual[name].double().flatten(), wanted.flatten(), dim=0)
        assert actual[name].dtype == torch.float32, "gradients are reduced in float32"
        assert cosine > 0.98 or wanted.abs().max() < 1e-6, name


def test_slices_of_a_sequence_give_the_whole_loss(results) -> None:
    """The assertions are in the ranks; the file says that they held."""
    assert json.loads((results / "sequence_parallel.json").read_text())["ranks"] in (1, 2)
