"""The Megatron engine on CPU: its numbers under every layout, training, checkpoints and resuming."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.needy_adapter import NEEDY
from tests.integration.numbers_world import (
    CASES_SCRIPT,
    EAGLE3,
    FRESH,
    JOINT,
    KL,
    LK,
    MLP,
    PACKED,
    PADDED,
    TWO_ROWS,
    Case,
    check_acceptance,
    check_bfloat16,
    check_learning_rates,
    check_loss_and_gradients,
    check_start_from_base,
    make_rows,
    read_state,
    write_cases,
    write_world,
)
from tests.integration.reference import PlainTraining
from tests.support.tiny import write_base_model, write_chats
from verl_speculator.checkpoint import layout
from verl_speculator.models import Speculator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs the extra megatron"),
]

MEGATRON = ["engine=megatron", "optim=megatron"]
TP, PP = "engine.tensor_model_parallel_size=2", "engine.pipeline_model_parallel_size=2"
NO_SP = "engine.sequence_parallel=false"
STEPS = 20
STOP_TOKENS = [2, 0]
TRAINING = ["optim.lr=1e-2", "optim.weight_decay=0.01", "optim.clip_grad=1.0"]


def frozen_and_joint(layout_name: str, *layout_keys: str) -> list[Case]:
    """Packed and padded input, tied and untied embeddings, a frozen base and one that trains."""
    keys = [*MEGATRON, *layout_keys]
    return [
        Case(f"{layout_name}_packed", "qwen2", "lstm", [*keys, *PACKED]),
        Case(f"{layout_name}_padded", "llama_untied", "mlp_untied", [*keys, *TWO_ROWS, *PADDED, MLP]),
        Case(f"{layout_name}_joint", "qwen2", "rnn", [*keys, *PACKED, *JOINT]),
        Case(f"{layout_name}_joint_padded", "llama_untied", "lstm", [*keys, *TWO_ROWS, *PADDED, *JOINT]),
    ]


# With Megatron's distributed optimizer a rank holds a part of the reduced gradients only.
DP = "engine.use_distributed_optimizer=false"
TWO_RANKS = [
    *frozen_and_joint("tp", TP),
    *frozen_and_joint("tp_no_sp", TP, NO_SP),
    *frozen_and_joint("pp", PP),
    *frozen_and_joint("dp", DP),
    Case("tp_qwen3", "qwen3", "rnn", [*MEGATRON, TP, *TWO_ROWS]),
    Case("tp_needy", "qwen2", "lstm", [*MEGATRON, TP, *PACKED, NEEDY]),
    Case("tp_no_sp_needy", "llama_untied", "lstm", [*MEGATRON, TP, NO_SP, *TWO_ROWS, *PADDED, NEEDY]),
    Case("tp_needy_joint", "llama_untied", "lstm", [*MEGATRON, TP, *PACKED, *JOINT, NEEDY]),
    Case("tp_no_sp_needy_joint", "qwen2", "lstm", [*MEGATRON, TP, NO_SP, *TWO_ROWS, *PADDED, *JOINT, NEEDY]),
    Case("pp_needy", "qwen2", "lstm", [*MEGATRON, PP, *PACKED, NEEDY]),
    Case("dp_needy_joint", "qwen2", "lstm", [*MEGATRON, DP, *TWO_ROWS, *PADDED, *JOINT, NEEDY]),
    Case("tp_kl", "qwen2", "lstm", [*MEGATRON, TP, *PACKED, KL]),
    Case("tp_drafts", "qwen2", "rnn_drafts", [*MEGATRON, TP, *PACKED]),
    Case("pp_drafts_kl_joint", "llama_untied", "rnn_drafts", [*MEGATRON, PP, *TWO_ROWS, *PADDED, *JOINT, KL]),
    Case("tp_kl_scaled", "llama_scaled", "rnn_drafts", [*MEGATRON, TP, *TWO_ROWS, KL]),
    Case("pp_lk_scaled_joint", "llama_scaled", "lstm", [*MEGATRON, PP, *PACKED, *JOINT, LK]),
    Case("pp_lk_joint", "llama_untied", "rnn", [*MEGATRON, PP, *TWO_ROWS, *PADDED, *JOINT, LK]),
    Case(
        "pp_joint_detached",
        "qwen2",
        "lstm",
        [*MEGATRON, PP, *PACKED, *JOINT, "model.detach_hidden_states=true", "optim.base_lr=5e-4"],
    ),
]
FOUR_RANKS = [
    *frozen_and_joint("tp_pp", TP, PP),
    *frozen_and_joint("tp_dp", TP, DP),
    Case("tp_pp_needy", "llama_untied", "lstm", [*MEGATRON, TP, PP, *TWO_ROWS, *PADDED, NEEDY]),
]
REFUSED = {
    "pp_needy_joint": r"asks for the states after layer 0, which in joint training .*pipeline_model_parallel_size=1",
    "pp_tied_llama": r"engine\.pipeline_model_parallel_size=2: mbridge .* tied embeddings of a llama model",
}
REFUSED_CASES = [
    Case("pp_needy_joint", "qwen2", "lstm", [*MEGATRON, PP, *PACKED, *JOINT, NEEDY]),
    Case("pp_tied_llama", "llama_tied", "lstm", [*MEGATRON, PP, *PACKED]),
]
FRESH_CASES = [
    Case("fresh_tp", "llama_untied", "", [*MEGATRON, TP, *FRESH]),
    Case("fresh_pp", "llama_untied", "", [*MEGATRON, PP, *FRESH]),
    Case("fresh_pp_tied", "qwen2", "", [*MEGATRON, PP, *FRESH]),
]
FRESH_EAGLE3_CASE = Case(
    "fresh_eagle3", "llama_untied", "", [*MEGATRON, PP, *EAGLE3, "+model.speculator.target_layer_ids=[0,1,2]"]
)
BF16_CASES = [Case("tp_bf16", "qwen2", "lstm", [*MEGATRON, TP, *PACKED, "engine.model_dtype=bf16"])]
TRAINED = [
    Case("steps_tp", "qwen2", "lstm", [*MEGATRON, TP, *PACKED, *TRAINING], steps=True),
    Case("steps_pp", "qwen2", "lstm", [*MEGATRON, PP, *PACKED, *TRAINING], steps=True),
    Case("steps_dp", "qwen2", "lstm", [*MEGATRON, *PACKED, *TRAINING], steps=True),
    Case("steps_fsdp", "qwen2", "lstm", [*PACKED, *TRAINING], steps=True),
    Case("steps_tp_bf16", "qwen2", "lstm", [*MEGATRON, TP, *PACKED, *TRAINING, "engine.model_dtype=bf16"], steps=True),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("megatron")
    torch.save([make_rows(seed) for seed in range(STEPS)], folder / "steps.pt")
    return write_world(folder)


@pytest.fixture(scope="module")
def results(world, torchrun, tmp_path_factory) -> Path:
    """What all cases wrote: one start for those of two ranks, one for those of four."""
    output = tmp_path_factory.mktemp("results")
    for ranks, cases in (
        (2, [*TWO_RANKS, *BF16_CASES, *TRAINED, *REFUSED_CASES, *FRESH_CASES, FRESH_EAGLE3_CASE]),
        (4, FOUR_RANKS),
    ):
        file = write_cases(output / f"cases_{ranks}.json", cases, world)
        torchrun(ranks, str(CASES_SCRIPT), str(file), str(output))
    return output


@pytest.mark.parametrize("case", [*TWO_RANKS, *FOUR_RANKS], ids=lambda case: case.name)
def test_matches_plain_float64_training(case: Case, world, results) -> None:
    check_loss_and_gradients(case, world, results)


@pytest.mark.parametrize("case", [*TWO_RANKS, *FOUR_RANKS], ids=lambda case: case.name)
def test_validation_measures_acceptance(case: Case, world, results) -> None:
    check_acceptance(case, world, results)


@pytest.mark.parametrize(
    "case", [case for case in [*TWO_RANKS, *FOUR_RANKS] if not case.is_joint], ids=lambda c: c.name
)
def test_frozen_base_has_no_part_in_training(case: Case, results) -> None:
    state = read_state(results, case)
    assert state["base_grads"] == []
    assert state["base_has_optimizer"] is False
    assert state["training"] is False, "a frozen base must not use dropout"
    assert state["optimizer_params"] == state["speculator_params"]


@pytest.mark.parametrize(
    "case", [case for case in [*TWO_RANKS, *FOUR_RANKS] if case.is_joint], ids=lambda case: case.name
)
def test_the_base_has_a_learning_rate_of_its_own(case: Case, results) -> None:
    check_learning_rates(case, results)


@pytest.mark.parametrize("case", REFUSED_CASES, ids=lambda case: case.name)
def test_what_cannot_be_trained_is_refused_by_name(case: Case, results) -> None:
    assert re.search(REFUSED[case.name], read_state(results, case)["refused"])


@pytest.mark.parametrize("case", FRESH_CASES, ids=lambda case: case.name)
def test_a_fresh_speculator_starts_from_the_base(case: Case, world, results) -> None:
    check_start_from_base(case, world, results)


def test_a_fresh_eagle3_has_the_bases_matrices(world, results) -> None:
    base = load_file(world["llama_untied"] / "model.safetensors")
    found = load_file(results / f"{FRESH_EAGLE3_CASE.name}.safetensors")
    for name, of_base in {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}.items():
        assert torch.equal(found[f"speculator.{name}.weight"], base[of_base]), name
    assert not found["speculator.fc.weight"].isnan().any()


@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_bfloat16_base(case: Case, world, results) -> None:
    check_bfloat16(case, world, results)


@pytest.fixture(scope="module")
def plain_steps(world) -> list[dict[str, float]]:
    plain = PlainTraining(world["qwen2"], world["lstm"])
    batches = torch.load(world["steps.pt"], weights_only=True)
    return plain.train_speculator(batches, lr=1e-2, weight_decay=0.01, clip=1.0)


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_every_training_step_agrees_with_float64(case: Case, plain_steps, results) -> None:
    is_bf16 = "engine.model_dtype=bf16" in case.overrides
    steps = read_state(results, case)["steps"]
    assert len(steps) == len(plain_steps) == STEPS
    for step, (actual, expected) in enumerate(zip(steps, plain_steps, strict=True)):
        for name, value in expected.items():
            if name.endswith("correct_sum"):
                # Two logits may be equal but for the last digit, which a type or an order of sums decides.
                assert actual[name] == pytest.approx(value, abs=4 if is_bf16 else 1), (step, name)
            else:
                assert actual[name] == pytest.approx(value, rel=2e-2 if is_bf16 else 1e-4), (step, name)


class Runs:
    """Trainings of 6 steps with a checkpoint after every third, on the same base and data."""

    def __init__(self, folder: Path, torchrun) -> None:
        self.folder, self.torchrun = folder, torchrun
        # Published in bfloat16 and on CPU trained in float32.
        write_base_model(folder / "base", dtype=torch.bfloat16, stop_tokens=STOP_TOKENS)
        write_chats(folder / "train.parquet", rows=48)
        write_chats(folder / "val.parquet", rows=6, seed=9)

    def overrides(self, name: str, *own: str, resume_from: Path | None = None) -> list[str]:
        resume = ["trainer.resume_mode=disable"]
        if resume_from is not None:
            resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={resume_from}"]
        return [
            *MEGATRON,
            f"model.path={self.folder / 'base'}",
            f"data.train_files={self.folder / 'train.parquet'}",
            f"data.val_files={self.folder / 'val.parquet'}",
            "data.max_length=64",
            "data.train_batch_size=8",
            "data.micro_batch_size_per_gpu=2",
            "data.num_workers=0",
            "model.speculator.n_predict=3",
            "model.speculator.method=sum_lstm",
            *(f"model.speculator.{width}_dim=24" for width in ("inner", "emb", "proj")),
            "optim.lr=5e-3",
            "trainer.total_training_steps=6",
            "trainer.save_freq=3",
            "trainer.test_freq=6",
            f"trainer.default_local_dir={self.folder / name}",
            *resume,
            *own,
        ]

    def run(self, ranks: int, *runs: list[str]) -> None:
        file = self.folder / "runs.json"
        file.write_text(json.dumps(runs))
        self.torchrun(ranks, str(Path(__file__).with_name("trainer_runs.py")), str(file))

    def checkpoint(self, name: str, step: int = 6) -> Path:
        return layout.step_folder(self.folder / name, step)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        weights = load_file(self.checkpoint(name) / "speculator" / "model.safetensors")
        base = self.checkpoint(name) / "huggingface" / "model.safetensors"
        return weights | (load_file(base) if base.is_file() else {})

    def metrics(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def final_validation_loss(self, name: str) -> float:
        return [line["metrics"]["val/loss"] for line in self.metrics(name) if "val/loss" in line["metrics"]][-1]


COSINE = "optim.lr_decay_style=cosine"
# Fast enough that six steps show in bfloat16, in norms of 1 too.
TRAIN_BASE = ["model.freeze_base_model=false", "optim.base_lr=5e-3", COSINE]
# Each is trained in one go, and again from the middle.
RESUMED = {
    "frozen_tp": [TP, COSINE],
    "joint_tp_bf16": [TP, *TRAIN_BASE, "engine.model_dtype=bf16"],
    "joint_pp": [PP, *TRAIN_BASE],
    "joint_dp": TRAIN_BASE,
}


@pytest.fixture(scope="module")
def runs(torchrun, tmp_path_factory) -> Runs:
    """All trainings of two ranks, one after the other, after one that is killed in its second save."""
    runs = Runs(tmp_path_factory.mktemp("runs"), torchrun)
    killed = runs.overrides("killed", TP, COSINE)
    with pytest.raises(AssertionError, match="SIGKILL"):
        torchrun(2, str(Path(__file__).with_name("killed_run.py")), *killed)
    assert layout.complete_steps(runs.folder / "killed") == [3]

    plans = [runs.overrides("killed", TP, COSINE, "trainer.resume_mode=auto")]
    for name, own in RESUMED.items():
        plans.append(runs.overrides(name, *own))
        plans.append(runs.overrides(f"{name}_again", *own, resume_from=runs.checkpoint(name, 3)))
    middle = runs.checkpoint("frozen_tp", 3)
    plans.append(runs.overrides("tp_to_pp", PP, COSINE, resume_from=middle))
    plans.append(runs.overrides("tp_to_dp", COSINE, resume_from=middle))
    fsdp = [key for key in runs.overrides("fsdp") if key not in MEGATRON]
    plans.append(fsdp)
    start = f"model.speculator_path={runs.checkpoint('fsdp')}"
    plans.append(runs.overrides("from_fsdp", PP, start, "trainer.val_only=true"))
    start = f"model.speculator_path={runs.checkpoint('frozen_tp')}"
    plans.append([*(key for key in runs.overrides("to_fsdp") if key not in MEGATRON), start, "trainer.val_only=true"])
    runs.run(2, *plans)
    return runs


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_is_bit_exact_at_the_same_layout(name: str, runs: Runs) -> None:
    whole, again = runs.weights(name), runs.weights(f"{name}_again")
    assert set(whole) == set(again)
    for key, tensor in whole.items():
        assert torch.equal(tensor, again[key]), key


@pytest.mark.parametrize("name", ["tp_to_pp", "tp_to_dp"])
def test_a_frozen_run_goes_on_in_another_layout(name: str, runs: Runs) -> None:
    whole, other = runs.weights("frozen_tp"), runs.weights(name)
    for key, tensor in whole.items():
        torch.testing.assert_close(other[key], tensor, rtol=0, atol=2e-5)


def test_killed_in_a_save_then_resumed_is_the_uninterrupted_run(runs: Runs) -> None:
    assert min(line["step"] for line in runs.metrics("killed")) <= 4
    whole, killed = runs.weights("frozen_tp"), runs.weights("killed")
    for key, tensor in whole.items():
        assert torch.equal(tensor, killed[key]), key


def test_weights_go_from_either_engine_to_the_other(runs: Runs) -> None:
    assert runs.final_validation_loss("from_fsdp") == pytest.approx(runs.final_validation_loss("fsdp"), rel=1e-5)
    assert runs.final_validation_loss("to_fsdp") == pytest.approx(runs.final_validation_loss("frozen_tp"), rel=1e-5)


def test_a_jointly_trained_base_is_a_hugging_face_folder(runs: Runs) -> None:
    before = load_file(runs.folder / "base" / "model.safetensors")
    after = load_file(runs.checkpoint("joint_pp") / "huggingface" / "model.safetensors")
    assert set(before) == set(after)
    assert all(before[key].shape == after[key].shape and not torch.equal(before[key], after[key]) for key in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    settings = json.loads((runs.checkpoint("joint_pp") / "huggingface" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == STOP_TOKENS
    plain = PlainTraining(runs.checkpoint("joint_pp") / "huggingface", runs.checkpoint("joint_pp"))
    assert torch.isfinite(plain.base_loss(make_rows()))


def test_the_checkpoint_is_a_speculator_that_drafts(runs: Runs) -> None:
    speculator = Speculator.from_pretrained(runs.checkpoint("frozen_tp"))
    drafts = speculator.draft(torch.randn(2, 32), torch.tensor([5, 6]), 3)
    assert drafts.shape == (2, 3)


def test_a_joint_checkpoint_does_not_go_on_with_a_frozen_base(runs: Runs) -> None:
    older = runs.folder / "joint_older" / "global_step_3"
    shutil.copytree(runs.checkpoint("joint_pp", 3), older)
    (older / layout.RUN_CONFIG_FILE).unlink()
    frozen = runs.overrides("joint_then_frozen", PP, COSINE, resume_from=older)
    with pytest.raises(AssertionError, match=r"written with model\.freeze_base_model=false"):
        runs.run(2, frozen)


def test_the_command_trains_with_the_switch_alone(runs: Runs, verl_speculator) -> None:
    """The command of an FSDP run with the two keys added, and what it refuses before any process starts."""
    result = verl_speculator("train", "--nproc", "1", *runs.overrides("command", "trainer.total_training_steps=3"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert layout.complete_steps(runs.folder / "command") == [3]
    wrong = verl_speculator("train", "--nproc", "3", *runs.overrides("wrong", "engine.tensor_model_parallel_size=3"))
    assert wrong.returncode == 2
    assert "engine.tensor_model_parallel_size=3" in wrong.stderr
    assert not (runs.folder / "wrong" / "metrics.jsonl").exists()
