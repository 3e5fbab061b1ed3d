"""A search over settings: short trainings by Ray Tune, ranked by what their drafts are worth.

A trial is `verl-speculator train` in a folder that its settings name. So the same search, started again, draws the same
settings, finds what is trained and goes on with the rest.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from verl_speculator.checkpoint.layout import latest_checkpoint
from verl_speculator.errors import ConfigError
from verl_speculator.models import ChainSpeculator, Speculator
from verl_speculator.models.serialization import BEST_FILE
from verl_speculator.trainer.metrics_log import METRICS_FILE

# What Speculators and our chains call the number of drafts.
_DRAFTS = ("n_predict", "speculative_tokens", "ttt_steps", "block_size")
_ACCEPTANCE = ("val/closed_loop_acceptance_length", "val/acceptance_length")


@dataclass(frozen=True)
class Search:
    """What is tried.

    Attributes:
        overrides: Settings of every training.
        grid: For each key its values, of which every combination is tried.
        draws: For each key the smallest and the largest value, between which each trial draws: whole numbers evenly,
            others evenly in their logarithm.
        num_trials: Draws for each combination of the grid.
        seed: Of the draws.
    """

    overrides: tuple[str, ...]
    grid: Mapping[str, Sequence[str]]
    draws: Mapping[str, tuple[float, float]]
    num_trials: int = 1
    seed: int = 0

    def space(self) -> dict[str, Any]:
        drawn = {
            key: tune.randint(int(low), int(high) + 1) if isinstance(low, int) else tune.loguniform(low, high)
            for key, (low, high) in self.draws.items()
        }
        return {**{key: tune.grid_search(list(values)) for key, values in self.grid.items()}, **drawn}


@dataclass
class Trial:
    """A training and what came of it.

    Attributes:
        settings: Its own, as `key=value`.
        acceptance_length: In closed-loop decoding along the validation data, at its last validation or its best one.
        draft_share: What a round's drafts read of weights, over what the base reads for a token.
        score: Acceptance length over the cost of a round, `1 + draft_share`: the speed-up where reading weights is all
            that takes time, as it is for a few requests on a GPU.
    """

    settings: list[str]
    folder: str
    acceptance_length: float
    draft_share: float
    score: float


def run_search(search: Search, base: str, output: Path, num_processes: int, parallel: int) -> list[Trial]:
    """Train what is not trained yet; the trials, best first.

    Args:
        search: What to try.
        base: The base model's folder or name.
        output: Where trials and Ray's notes go.
        num_processes: Of each training.
        parallel: Trainings at a time.

    Raises:
        ConfigError: a training failed; its log has the rest.
    """
    num_devices = num_processes if torch.accelerator.is_available() else 0
    train = partial(_train, overrides=search.overrides, output=str(output), num_processes=num_processes)
    tuner = tune.Tuner(
        tune.with_resources(train, {"cpu": 1, "gpu": num_devices}),
        param_space=search.space(),
        tune_config=tune.TuneConfig(
            num_samples=search.num_trials,
            search_alg=BasicVariantGenerator(random_state=search.seed, max_concurrent=parallel),
        ),
        run_config=tune.RunConfig(storage_path=str(output / "ray"), name="tune", verbose=0),
    )
    results = tuner.fit()
    if results.errors:
        raise ConfigError(f"a trial failed: {str(results.errors[0]).strip().splitlines()[-1]}")
    base_weights = _weights_read_by(base)
    trials = [_trial(result.metrics["settings"], Path(result.metrics["folder"]), base_weights) for result in results]
    return sorted(trials, key=lambda trial: -trial.score)


def _train(config: dict[str, Any], overrides: Sequence[str], output: str, num_processes: int) -> dict[str, Any]:
    """In a process of Ray's: one training, from the start or from where it was stopped."""
    settings = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in config.items()]
    name = hashlib.sha256(json.dumps([list(overrides), settings]).encode()).hexdigest()[:12]
    folder = Path(output) / f"trial_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "verl_speculator.cli", "train", "--nproc", str(num_processes)]
    command += [*overrides, *settings, f"trainer.default_local_dir={folder}"]
    log = folder / "log.txt"
    with log.open("w") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise ConfigError(f"{' '.join(settings)} ended with status {status}, see {log}")
    return {"settings": settings, "folder": str(folder)}


def _trial(settings: list[str], folder: Path, base_weights: int) -> Trial:
    lines = [json.loads(line)["metrics"] for line in (folder / METRICS_FILE).read_text().splitlines()]
    found = [[line[name] for line in lines if name in line] for name in _ACCEPTANCE]
    values = next((values for values in found if values), None)
    if values is None:
        raise ConfigError(f"{folder} has no acceptance length of a validation: give data.val_files")
    has_best = (folder / BEST_FILE).is_file()
    acceptance = max(values) if has_best else values[-1]
    checkpoint = folder if has_best else latest_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(f"{folder} has no checkpoint: a training ends with one")
    share = draft_weights(Speculator.from_pretrained(checkpoint)) / base_weights
    return Trial(settings, str(folder), acceptance, share, acceptance / (1 + share))


@torch.inference_mode()
def draft_weights(speculator: Speculator) -> float:
    """The weights that a round of drafts reads, one that is read twice counted twice."""
    config: Any = speculator.config
    if isinstance(speculator, ChainSpeculator):
        hidden = torch.zeros(1, config.input_hidden_dim, dtype=next(speculator.parameters()).dtype)
        with FlopCounterMode(display=False) as counter:
            speculator.draft(hidden, torch.zeros(1, dtype=torch.long), config.n_predict)
        # A matrix product of one row does two operations for each weight.
        return counter.get_total_flops() / 2
    number = next((getattr(config, name) for name in _DRAFTS if getattr(config, name, None)), 1)
    return number * sum(module.weight.numel() for module in speculator.modules() if isinstance(module, nn.Linear))


def _weights_read_by(base: str) -> int:
    """Those that a base reads for a token: all but its embeddings, of which it reads a row."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = 0 if head.weight is embeddings.weight else embeddings.weight.numel()
    return sum(parameter.numel() for parameter in model.parameters()) - rows


def write_report(trials: Sequence[Trial], search: Search, output: Path, num_processes: int) -> str:
    """Write `tune.json` and `tune.md`; the latter's text, a table and the command that trains the winner."""
    keys = [setting.partition("=")[0] for setting in trials[0].settings]
    lines = [
        f"| {' | '.join(['#', *keys, 'acceptance length', 'drafts read, of the base', 'score'])} |",
        f"|{' --- |' * (len(keys) + 4)}",
    ]
    for rank, trial in enumerate(trials, 1):
        values = [setting.partition("=")[2] for setting in trial.settings]
        numbers = [f"{trial.acceptance_length:.3f}", f"{trial.draft_share:.3f}", f"{trial.score:.3f}"]
        lines.append(f"| {' | '.join([str(rank), *values, *numbers])} |")
    winner = ["verl-speculator", "train", "--nproc", str(num_processes), *search.overrides, *trials[0].settings]
    text = "\n".join([*lines, "", f"{shlex.join(winner)}", ""])
    (output / "tune.md").write_text(text)
    (output / "tune.json").write_text(json.dumps([asdict(trial) for trial in trials], indent=2) + "\n")
    return text
