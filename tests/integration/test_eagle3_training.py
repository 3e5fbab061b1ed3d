"""EAGLE-3, DFlash and the page's Medusa through the whole trainer: built, trained, saved, resumed, evaluated."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import REPOSITORY, own_stderr, run_process
from tests.integration.test_training import Runs
from tests.support.tiny import VOCAB_SIZE
from verl_speculator import cli
from verl_speculator.algorithms.eagle3 import Eagle3Speculator
from verl_speculator.models import Speculator

pytestmark = pytest.mark.slow

STEPS = 6
T2D = np.arange(VOCAB_SIZE) % 7 != 3


def overrides(runs: Runs, name: str, *more: str) -> list[str]:
    return [
        "model.speculator_type=eagle3",
        "+model.speculator.target_layer_ids=[0,1,2]",
        f"model.speculator.draft_vocab_path={runs.folder / 't2d.npy'}",
        f"model.partial_pretrain={runs.base}",
        f"data.train_files={runs.folder / 'train.parquet'}",
        f"data.val_files={runs.folder / 'val.parquet'}",
        f"trainer.default_local_dir={runs.folder / name}",
        "data.train_batch_size=12",
        "data.num_workers=0",
        "optim.lr=1e-2",
        "trainer.save_freq=3",
        f"trainer.total_training_steps={STEPS}",
        *more,
    ]


def common(runs: Runs, name: str) -> str:
    return (
        f"--verifier-name-or-path {runs.base} --data-path {runs.folder / 'train.parquet'} --lr 1e-2 --batch-size 12 "
        f"--val-data-path {runs.folder / 'val.parquet'} --val-freq {STEPS} --save-path {runs.folder / name} "
        f"--max-steps {STEPS} data.num_workers=0"
    )


def by_options(options: str) -> list[str]:
    """The settings with which `verl-speculator train` starts its processes."""
    found: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verl_speculator.trainer.launch.launch", lambda overrides, **_: found.append(overrides))
        assert cli.main(["train", *options.split()]) == 0
    return found[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, torchrun) -> Runs:
    made = Runs(tmp_path_factory.mktemp("training"), torchrun)
    np.save(made.folder / "t2d.npy", T2D)
    page = (REPOSITORY / "docs" / "adding_an_algorithm.md").read_text()
    code = re.search("```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(code.splitlines()) <= 100
    (made.folder / "medusa.py").write_text(code)
    return made


@pytest.fixture(scope="module")
def launched(runs) -> dict[str, dict[int, dict[str, float]]]:
    trained = f"model.speculator_path={runs.folder / 'whole' / f'global_step_{STEPS}'}"
    table = {
        "whole": overrides(runs, "whole", f"trainer.test_freq={STEPS}"),
        "stopped": overrides(runs, "stopped", "trainer.total_training_steps=3"),
        "resumed": overrides(runs, "stopped"),
        "evaluated": overrides(runs, "evaluated", trained, "trainer.val_only=true"),
        "dflash": by_options(
            "--speculator-type dflash --num-layers 1 --block-size 4 --target-layer-ids 0 2 --anchor-fraction 0.5 "
            f"--draft-vocab-size 64 {common(runs, 'dflash')}"
        ),
        "medusa": by_options(
            f"--import {runs.folder / 'medusa.py'} --speculator-type medusa --n-predict 3 {common(runs, 'medusa')}"
        ),
    }
    return dict(zip(table, runs.run(2, *table.values()), strict=True))


def folder(runs: Runs, name: str) -> Path:
    return runs.folder / name / f"global_step_{STEPS}" / "speculator"


def test_it_learns_and_says_how_well(launched) -> None:
    steps = launched["whole"]
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert steps[STEPS]["train/loss"] < steps[1]["train/loss"]
    expected = {"loss", "acceptance_length", *(f"{name}_{k}" for k in range(3) for name in ("loss", "full_acc"))}
    assert {f"train/{name}" for name in expected} <= set(steps[1])
    assert {f"val/{name}" for name in expected} <= set(steps[STEPS])
    assert steps[STEPS]["val/acceptance_length"] >= 1


def test_the_options_of_the_command_give_the_same_run(launched, runs) -> None:
    options = (
        f"--speculator-type eagle3 --target-layer-ids 0 1 2 --draft-vocab-path {runs.folder / 't2d.npy'} --lr 1e-2 "
        f"--verifier-name-or-path {runs.base} --data-path {runs.folder / 'train.parquet'} --batch-size 12 "
        f"--save-path {runs.folder / 'options'} --max-steps 3 --checkpoint-freq 3 data.num_workers=0"
    )
    # With processes of its own: torchrun starts the module, which becomes the trainer.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = run_process([*command, "-m", "verl_speculator.train", *options.split()])
    assert result.returncode == 0, result.stdout[-3000:] + own_stderr(result.stderr)[-3000:]
    by_options, by_settings = (
        load_file(runs.folder / name / "global_step_3" / "speculator" / "model.safetensors")
        for name in ("options", "stopped")
    )
    assert by_options.keys() == by_settings.keys()
    for name, tensor in by_settings.items():
        assert torch.equal(tensor, by_options[name]), name


@pytest.mark.parametrize("name", ["dflash", "medusa"])
def test_others_learn_too(name, launched, runs, verl_speculator) -> None:
    steps = launched[name]
    assert steps[STEPS]["train/loss"] < steps[1]["train/loss"]
    assert steps[STEPS]["val/acceptance_length"] >= 1
    result = verl_speculator(
        "eval", "--import", str(runs.folder / "medusa.py"), "--base", str(runs.base), "--limit", "6", "--json", "-",
        "--max-new-tokens", "12", "--speculator", str(folder(runs, name).parent), "--data",
        str(runs.folder / "val.parquet"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (speculator,) = json.loads(result.stdout)["speculators"]
    assert speculator["identical_outputs"]
    saved = json.loads((folder(runs, name) / "config.json").read_text())
    assert saved["speculators_model_type"] == name


def test_what_is_the_bases_stays_the_bases(launched, runs) -> None:
    saved, base = load_file(folder(runs, "whole") / "model.safetensors"), load_file(runs.base / "model.safetensors")
    embeddings = base["model.embed_tokens.weight"]
    assert torch.equal(saved["embed_tokens.weight"], embeddings)
    assert torch.equal(saved["lm_head.weight"], embeddings[torch.from_numpy(T2D)]), "the base's matrices are tied"
    loaded = Speculator.from_pretrained(runs.folder / "whole" / f"global_step_{STEPS}")
    assert type(loaded) is Eagle3Speculator
    assert loaded.config.base_model_name_or_path == str(runs.base)
    assert loaded.config.base_architectures == ["Qwen2ForCausalLM"]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(launched, runs) -> None:
    whole, resumed = (load_file(folder(runs, name) / "model.safetensors") for name in ("whole", "stopped"))
    assert sorted(launched["resumed"]) == [4, 5, 6]
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_one_that_is_loaded_is_measured_as_it_was(launched) -> None:
    (evaluated,) = launched["evaluated"].values()
    for name, value in launched["whole"][STEPS].items():
        if name.startswith("val/"):
            assert evaluated[name] == pytest.approx(value, rel=1e-4), name
