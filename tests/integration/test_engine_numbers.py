"""Loss and gradients of the FSDP engine against the plain float64 computation, however the batch is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.needy_adapter import NEEDY
from tests.integration.numbers_world import (
    CASES_SCRIPT,
    EAGLE3,
    FRESH,
    JOINT,
    KL,
    LK,
    MLP,
    ONE_ROW,
    PACKED,
    PADDED,
    TWO_ROWS,
    Case,
    check_acceptance,
    check_bfloat16,
    check_learning_rates,
    check_loss_and_gradients,
    check_start_from_base,
    read_state,
    write_cases,
    write_world,
)

pytestmark = pytest.mark.slow

BASE_LR = "optim.base_lr=5e-4"
CASES = [
    Case("packed", "qwen2", "lstm", PACKED),
    Case("packed_one_row", "qwen2", "lstm", ONE_ROW),
    Case("packed_one_row_each", "qwen2", "lstm", [*ONE_ROW, "model.gather_speculator_once=false"]),
    Case("joint_one_row_each", "qwen2", "lstm", [*ONE_ROW, *JOINT, "model.gather_speculator_once=false"]),
    Case(
        "joint_deferred_sync", "qwen2", "rnn", [*ONE_ROW, *JOINT, "engine.use_no_sync_for_gradient_accumulation=true"]
    ),
    Case("padded", "qwen2", "lstm", [*TWO_ROWS, *PADDED]),
    Case("padded_untied_llama", "llama_untied", "mlp_untied", [*PACKED, *PADDED, MLP]),
    Case("packed_qwen3", "qwen3", "rnn", TWO_ROWS),
    Case("joint", "qwen2", "lstm", [*PACKED, *JOINT]),
    Case("joint_one_row", "qwen2", "lstm", [*ONE_ROW, *JOINT]),
    Case("joint_padded_untied", "llama_untied", "rnn", [*TWO_ROWS, *PADDED, *JOINT]),
    Case(
        "joint_detached", "qwen2", "lstm", [*TWO_ROWS, *JOINT, "model.detach_hidden_states=true", "optim.base_lr=5e-4"]
    ),
    Case("needy_packed", "qwen2", "lstm", [*PACKED, NEEDY]),
    Case("needy_padded", "llama_untied", "lstm", [*TWO_ROWS, *PADDED, NEEDY]),
    Case("needy_joint", "llama_untied", "lstm", [*PACKED, *JOINT, NEEDY]),
    Case("eagle3_packed", "qwen2", "eagle3", [*PACKED, *EAGLE3]),
    Case("eagle3_one_row", "qwen2", "eagle3", [*ONE_ROW, *EAGLE3]),
    Case("eagle3_padded", "llama_untied", "eagle3_plain", [*TWO_ROWS, *PADDED, *EAGLE3]),
    Case("eagle3_joint", "qwen2", "eagle3", [*PACKED, *JOINT, *EAGLE3, "model.detach_hidden_states=true"]),
    Case("needy_joint_padded", "qwen2", "lstm", [*TWO_ROWS, *PADDED, *JOINT, NEEDY]),
    Case("compiled", "qwen2", "lstm", [*TWO_ROWS, "model.compile=true"]),
    Case("compiled_padded", "llama_untied", "rnn", [*TWO_ROWS, *PADDED, "model.compile=true", NEEDY]),
    Case("stays_gathered", "qwen2", "lstm", [*ONE_ROW, "engine.reshard_after_forward=auto"]),
    Case("kl", "qwen2", "lstm", [*ONE_ROW, KL]),
    Case("lk_untied", "llama_untied", "mlp_untied", [*PACKED, MLP, LK]),
    Case("drafts_one_row", "qwen2", "rnn_drafts", ONE_ROW),
    Case("drafts_kl", "llama_untied", "rnn_drafts", [*TWO_ROWS, *PADDED, KL]),
    Case("drafts_joint", "qwen2", "rnn_drafts", [*PACKED, *JOINT]),
    Case("kl_capped", "gemma2", "lstm", [*PACKED, KL]),
    Case("lk_divided", "granite", "mlp_untied", [*ONE_ROW, MLP, LK]),
    Case("kl_multiplied_joint", "cohere", "rnn_drafts", [*TWO_ROWS, *PADDED, *JOINT, KL]),
    Case("kl_biased", "phi", "rnn_drafts", [*PACKED, KL]),
    Case("lk_biased_joint", "phi", "lstm", [*TWO_ROWS, *PADDED, *JOINT, LK]),
    Case("lk_joint", "llama_untied", "rnn", [*TWO_ROWS, *PADDED, *JOINT, LK]),
]


# Its logits are capped after the vocabulary product.
CAPPED = Case("needy_capped", "gemma2", "lstm", [*PACKED, NEEDY])
BF16_BASE = "+engine.mixed_precision={param_dtype: bf16, reduce_dtype: fp32}"
# The base computes in bfloat16; the speculator in either. Compared with bfloat16's tolerance.
BF16_CASES = [
    Case("bf16_base_fp32_speculator", "qwen2", "lstm", [*PACKED, BF16_BASE, "model.speculator_dtype=fp32"]),
    Case("bf16", "qwen2", "lstm", [*PACKED, BF16_BASE, "engine.model_dtype=bf16"]),
]


# Two groups of two processes: each group holds the whole speculator.
HYBRID_CASES = [
    Case("hybrid", "qwen2", "lstm", [*TWO_ROWS, "model.speculator_shard_size=2"]),
    Case("hybrid_base", "llama_untied", "rnn", [*ONE_ROW, KL, "engine.fsdp_size=2"]),
    Case("hybrid_joint", "qwen2", "lstm", [*PACKED, *JOINT, "engine.fsdp_size=2"]),
    Case("whole", "qwen2", "lstm", [*TWO_ROWS, "model.speculator_shard_size=1"]),
    Case("one_dimension", "qwen2", "lstm", TWO_ROWS),
]
FRESH_CASES = [Case("fresh", "llama_untied", "", FRESH), Case("fresh_tied_joint", "qwen2", "", [*FRESH, *JOINT])]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    return write_world(tmp_path_factory.mktemp("numbers"))


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request, world, torchrun, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("results")
    cases = write_cases(output / "cases.json", [*CASES, *BF16_CASES, CAPPED, *FRESH_CASES], world)
    torchrun(request.param, str(CASES_SCRIPT), str(cases), str(output))
    return output


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_plain_float64_training(case: Case, world, results) -> None:
    check_loss_and_gradients(case, world, results)


@pytest.mark.parametrize(
    "case", [case for case in CASES if not set(EAGLE3) <= set(case.overrides)], ids=lambda c: c.name
)
def test_validation_measures_acceptance_however_the_batch_is_cut(case: Case, world, results) -> None:
    check_acceptance(case, world, results)


@pytest.mark.parametrize("case", FRESH_CASES, ids=lambda case: case.name)
def test_a_fresh_speculator_starts_from_the_base(case: Case, world, results) -> None:
    check_start_from_base(case, world, results)


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_joint], ids=lambda case: case.name)
def test_frozen_base_has_no_part_in_training(case: Case, results) -> None:
    state = read_state(results, case)
    assert state["base_grads"] == []
    assert state["training"] is False, "a frozen base must not use dropout"
    assert state["optimizer_params"] == state["speculator_params"]
    assert state["base_modules"].count("lm_head") == 1, "the tap stands in lm_head's place"


@pytest.fixture(scope="module")
def hybrid(world, torchrun, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("hybrid")
    torchrun(4, str(CASES_SCRIPT), str(write_cases(output / "cases.json", HYBRID_CASES, world)), str(output))
    return output


@pytest.mark.parametrize("case", HYBRID_CASES, ids=lambda case: case.name)
def test_a_mesh_of_two_dimensions_trains_like_one(case: Case, world, hybrid) -> None:
    check_loss_and_gradients(case, world, hybrid)


def test_a_mesh_of_two_dimensions_gathers_within_a_group(hybrid) -> None:
    """Gradients are reduced within the group and then between the groups."""
    by_name = {case.name: read_state(hybrid, case)["collectives"] for case in HYBRID_CASES}
    assert by_name["hybrid"]["allreduce_"] == by_name["one_dimension"]["allreduce_"] + 1
    assert by_name["hybrid"]["_reduce_scatter_base_"] == by_name["one_dimension"]["_reduce_scatter_base_"]


@pytest.mark.parametrize("name", ["packed_one_row", "joint_one_row"])
def test_the_speculator_is_gathered_and_reduced_once_a_step(name: str, results) -> None:
    """Eight rows on one rank or two: so many micro-batches, in each of which it is gathered if the key is off."""
    by_name = {case.name: case for case in CASES}
    once = read_state(results, by_name[name])["collectives"]
    each = read_state(results, by_name[f"{name}_each"])["collectives"]
    assert set(once) == set(each)
    for collective in once:
        is_of_shards = "allgather" in collective or "reduce_scatter" in collective
        micro_batches = 8 // read_state(results, by_name[name])["ranks"]
        assert each[collective] - once[collective] == (micro_batches - 1 if is_of_shards else 0), collective


@pytest.mark.parametrize("case", [case for case in CASES if case.is_joint], ids=lambda case: case.name)
def test_the_base_has_a_learning_rate_of_its_own(case: Case, results) -> None:
    check_learning_rates(case, results)


@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_bfloat16_base(case: Case, world, results) -> None:
    check_bfloat16(case, world, results)


def test_what_a_base_cannot_give_is_refused_by_name(results) -> None:
    refused = read_state(results, CAPPED)["refused"]
    assert "NeedyAdapter" in refused
    assert "final_logit_softcapping=2.0" in refused


def test_slices_of_a_sequence_give_the_whole_loss(results) -> None:
    """The assertions are in the ranks; the file says that they held."""
    assert json.loads((results / "sequence_parallel.json").read_text())["ranks"] in (1, 2)


def test_large_buffers_are_used_again(results) -> None:
    """On CPU the system would otherwise hand out and zero all 163,840 pages of these ten buffers."""
    assert json.loads((results / "memory.json").read_text())["page_faults"] < 40_000
