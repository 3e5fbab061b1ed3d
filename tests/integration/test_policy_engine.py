"""A policy under verl's own loss, with a speculator that learns beside it, and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.numbers_world import make_speculators
from tests.integration.reference import PlainTraining
from tests.support.tiny import VOCAB_SIZE, write_base_model
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig

SCRIPT = Path(__file__).with_name("policy_cases.py")
MINI_BATCH = 4  # as in policy_cases.py


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    write_base_model(folder / "qwen2")
    write_base_model(folder / "dropout", attention_dropout=0.2)
    make_speculators(folder)
    config = MLPSpeculatorConfig(input_hidden_dim=48, vocab_size=VOCAB_SIZE, n_predict=2, inner_dim=24)
    MLPSpeculator(config).save_pretrained(folder / "foreign")
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in [23, 7, 17, 6, 9, 8, 30, 12]:
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
        # Turns of a tool between those of the policy.
        mask = (torch.rand(length, generator=generator) < 0.7).long()
        mask[: length // 3 + 1] = 0
        rows.append((ids, mask))
    torch.save(rows, folder / "rollouts.pt")
    return folder


@pytest.fixture(scope="module")
def run(world, torchrun, tmp_path_factory) -> tuple[Path, dict]:
    """What one rank and two ranks have found."""
    output = tmp_path_factory.mktemp("cases")
    found: dict = {"layouts": {}}
    for ranks in (1, 2):
        torchrun(ranks, str(SCRIPT), str(world), str(output))
        of_ranks = json.loads((output / "found.json").read_text())
        found |= {**of_ranks, "layouts": found["layouts"] | of_ranks["layouts"]}
    return output, found


@pytest.mark.slow
def test_the_policy_is_verls_bit_for_bit(run):
    assert {*run[1]["layouts"]} == {"padded", "packed", "watched", "dynamic", "kl", "eagle3", "capped"}
    for name, case in run[1]["layouts"].items():
        assert case["bit_equal"], name
        assert case["verls_metrics_equal"], name
        assert case["moved"], name


@pytest.mark.slow
def test_the_loss_is_that_of_the_float64_loops_in_every_layout(run, world):
    rows = torch.load(world / "rollouts.pt", weights_only=True)[:MINI_BATCH]
    for name, speculator, objective in (
        *((layout, "rnn", "ce") for layout in ("padded", "packed", "dynamic")),
        ("kl", "rnn", "kl"),
    ):
        expected = PlainTraining(world / "qwen2", world / speculator).speculator_loss(
            rows, detach=True, objective=objective
        )
        found = run[1]["layouts"][name]["speculator"][0]["speculator/train_loss"][0]
        assert found == pytest.approx(expected.item(), rel=1e-4), name


@pytest.mark.slow
def test_what_it_learns_does_not_depend_on_padding_and_micro_batches(run):
    output, found = run
    packed = load_file(output / "packed.safetensors")
    for other in ("padded", "dynamic"):
        for name, tensor in load_file(output / f"{other}.safetensors").items():
            torch.testing.assert_close(tensor, packed[name], rtol=2e-3, atol=2e-4, msg=f"{other}: {name}")
    lengths = [step["speculator/acceptance_length"] for step in found["layouts"]["packed"]["speculator"]]
    losses = [step["speculator/train_loss"] for step in found["layouts"]["packed"]["speculator"]]
    assert losses[1][0] < losses[0][0]
    assert all(1 <= one <= 4 for step in lengths for one in step)


@pytest.mark.slow
def test_it_learns_every_n_th_step_only(run):
    layouts = run[1]["layouts"]
    assert layouts["capped"]["speculator_stood_still"]
    assert layouts["capped"]["speculator"][1] == {}
    assert not layouts["packed"]["speculator_stood_still"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["watched", "dynamic"])
def test_the_first_step_measures_the_same_speculator_twice(run, name):
    first, second = run[1]["layouts"][name]["speculator"]

    assert {*first["speculator/acceptance_length_difference"]} == {0.0}
    assert first["speculator/frozen_acceptance_length"] == first["speculator/live_acceptance_length"]
    # The same rows again, on which the live one has been trained since, in one case with further steps.
    live, frozen = (second[f"speculator/{which}_acceptance_length"][0] for which in ("live", "frozen"))
    assert live > frozen if name == "watched" else live >= frozen


@pytest.mark.slow
def test_resuming_is_exact_and_what_rollout_gets_is_what_is_saved(run):
    resume = run[1]["resume"]
    assert resume["policy_resumed"]
    assert resume["speculator_resumed"]
    assert resume["adaptation_resumed"]
    assert resume["sent_is_saved"]
    assert resume["served_is_sent"]
    assert resume["sent_before"] == resume["sent_by_verl"]
    assert resume["order"]


@pytest.mark.slow
def test_the_reference_policy_is_plain(run):
    assert run[1]["reference"] == "FSDPPolicyEngine"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fused", "use_fused_kernels=true skips lm_head"),
        ("fp16", "param_dtype=fp16 scales the policy's loss"),
        ("no_settings", "fsdp_config._target_=verl_speculator.engine.policy_config.PolicyEngineConfig"),
        ("other_base", "fsdp_config.speculator.path: the speculator in "),
        ("training", "fsdp_config.speculator.training.objective"),
        ("checkpoint", "was written without a speculator"),
        ("delta", "backend=delta_sharded"),
    ],
)
def test_what_cannot_work_is_refused_by_name(run, name, words):
    assert words in run[1]["refused"][name]
