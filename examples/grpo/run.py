"""`make demo-grpo`: GRPO that changes how a policy writes, and a speculator that follows, beside one that stays.

    python -m examples.grpo.run [--output outputs/grpo] [--budget demo|full|small] [--seed 0] [--fresh]

Each stage is a command that a user would type; the output shows it. Leaves `policy/`, `speculator/`, `runs/`, a report
for each run and `summary.json` in the output folder. What was done before with the same settings is not done again, and
a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from examples.demo.settings import hydra_path
from examples.demo.stages import REPOSITORY, Progress, Stages, bar_progress, run_command, training_progress
from examples.grpo.settings import BUDGETS, RUNS, Budget
from examples.grpo.world import train_policy, write_chats, write_prompts
from verl_speculator.reports.curves import Curves, read_curves
from verl_speculator.reports.following import DIFFERENCE, FROZEN, KL, LIVE, REWARD, ROLLOUT, quarter_mean
from verl_speculator.reports.training import write_train_report

PROMPT_LENGTH = 3
SECONDS = ("rollout/seconds", "timing_s/step")


class Experiment:
    """The stages, and where each finds what the ones before it made."""

    def __init__(self, output: Path, budget: Budget) -> None:
        self.output, self.budget = output, budget
        self.policy, self.speculator = output / "policy", output / "speculator"
        self.data, self.work, self.logs, self.runs = (output / name for name in ("data", "work", "logs", "runs"))

    def make_policy(self, progress: Progress) -> str:
        world = self.budget.world
        write_chats(self.data / "chats.parquet", world.num_chats, world.seed)
        for reward in {run.reward for run in RUNS.values()}:
            write_prompts(self.data / f"{reward}.parquet", world.num_prompts, world.seed, reward)
        shutil.rmtree(self.runs, ignore_errors=True)
        loss = train_policy(world, self.policy, progress.update)
        return f"a policy trained from nothing, loss {loss:.2f}; {world.num_prompts} prompts"

    def train_speculator(self, progress: Progress) -> str:
        settings, world = self.budget.speculator, self.budget.world
        answers, checkpoints = self.data / "answers.parquet", self.work / "speculator"
        answers.unlink(missing_ok=True)
        shutil.rmtree(checkpoints, ignore_errors=True)
        self._run(
            "answers",
            [
                *("regenerate", "--base", str(self.policy), "--data", str(self.data / "chats.parquet")),
                *("--output", str(answers), "--backend", "hf", "--max-new-tokens", str(world.answer_length)),
                *("--temperature", "1", "--batch-size", "256", "--seed", str(world.seed)),
            ],
            progress,
            bar_progress,
        )
        self._run(
            "speculator",
            [
                *("train", "--nproc", "1"),
                f"model.path={hydra_path(self.policy)}",
                "model.speculator_type=mlp",
                f"model.speculator.n_predict={settings.n_predict}",
                f"model.speculator.inner_dim={settings.width}",
                f"optim.lr={settings.learning_rate}",
                f"data.train_files={hydra_path(answers)}",
                f"data.train_batch_size={settings.batch_size}",
                f"data.micro_batch_size_per_gpu={settings.batch_size}",
                "data.use_dynamic_bsz=false",
                "data.num_workers=0",
                f"trainer.default_local_dir={hydra_path(checkpoints)}",
                f"trainer.total_epochs={settings.num_epochs}",
                f"trainer.seed={world.seed}",
                "trainer.save_freq=-1",
                "trainer.test_freq=-1",
                "trainer.logger=[console]",
                "trainer.resume_mode=disable",
            ],
            progress,
            training_progress,
        )
        (last,) = checkpoints.glob("global_step_*")
        for old in (self.speculator, self.runs):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(last / "speculator", self.speculator)
        return f"an MLP of width {settings.width}, {settings.n_predict} tokens ahead, on the policy's own answers"

    def compare_bits(self, progress: Progress) -> str:
        """Not a command: what no user needs to do, and what the package promises."""
        found = self.work / "bit_equal.json"
        command = ["examples.grpo.bit_equal", str(self.policy), str(self.speculator), str(found)]
        print(f"  $ python -m {shlex.join(command)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{done.stderr[-3000:]}\nThe comparison with verl's own engine failed.")
        result = json.loads(found.read_text())
        return f"{result['tensors']} tensors of the policy after training: bit-equal {result['policy_bit_equal']}"

    def train(self, name: str, progress: Progress) -> str:
        settings, world, run = self.budget.grpo, self.budget.world, RUNS[name]
        prompts = self.data / f"{run.reward}.parquet"
        self._drop_other_settings(name, json.dumps([asdict(settings), asdict(run)]))
        self._run(
            "grpo",
            [
                "grpo",
                f"model.path={hydra_path(self.policy)}",
                f"speculator.path={hydra_path(self.speculator)}",
                f"speculator.lr={settings.speculator_learning_rate}",
                *(f"speculator.{setting}" for setting in run.speculator),
                f"data.train_files={hydra_path(prompts)}",
                f"data.train_batch_size={settings.batch_size}",
                f"data.seed={world.seed}",
                f"data.max_prompt_length={PROMPT_LENGTH}",
                f"data.max_response_length={world.answer_length}",
                f"reward.custom_reward_function.path={hydra_path(Path(__file__).with_name('reward.py'))}",
                f"rollout.n={settings.num_samples}",
                f"rollout.seed={world.seed}",
                f"actor.optim.lr={settings.learning_rate}",
                f"actor.kl_loss_coef={settings.kl_coefficient}",
                f"trainer.total_training_steps={settings.num_steps}",
                "trainer.total_epochs=1000",
                "trainer.save_freq=20",
                "trainer.max_actor_ckpt_to_keep=1",
                f"trainer.default_local_dir={hydra_path(self.runs / name)}",
            ],
            progress,
            grpo_progress,
            log=f"grpo-{name}",
        )
        write_train_report(self.runs / name, self.output / "report" / f"{name}.html")
        curves = read_curves(self.runs / name)
        ends = [quarter_mean(curves.points(LIVE), last=last) for last in (False, True)]
        frozen = quarter_mean(curves.points(FROZEN), last=True)
        return f"{settings.num_steps} steps: acceptance length {ends[0]:.2f} to {ends[1]:.2f}, frozen {frozen:.2f}"

    def _drop_other_settings(self, name: str, described: str) -> None:
        """A run goes on from its checkpoint, unless that was made with other settings."""
        note = self.runs / f"{name}.json"
        if not note.is_file() or note.read_text() != described:
            shutil.rmtree(self.runs / name, ignore_errors=True)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(described)

    def _run(
        self,
        name: str,
        command: Sequence[str],
        progress: Progress,
        describe: Callable[[str], str | None],
        log: str | None = None,
    ) -> None:
        print(f"  $ verl-speculator {shlex.join(command)}", flush=True)
        run_command(list(command), self.logs / f"{log or name}.log", progress, describe)


def grpo_progress(line: str) -> str | None:
    """The step of a console line of verl's tracker, and how the run goes."""
    step = re.search(r"step:(\d+) - ", line)
    if step is None:
        return None
    names = {"live": LIVE, "frozen": FROZEN, "reward": REWARD}
    found = {name: re.search(rf"{re.escape(curve)}:([\d.eE+-]+)", line) for name, curve in names.items()}
    return f"step {step[1]}" + "".join(f"  {name} {float(match[1]):.2f}" for name, match in found.items() if match)


def summarize_run(curves: Curves) -> dict[str, Any]:
    """The first and the last quarter of a run's steps."""

    def ends(name: str) -> dict[str, float] | None:
        points = curves.points(name)
        if not points:
            return None
        return {
            "first_quarter": round(quarter_mean(points, last=False), 4),
            "last_quarter": round(quarter_mean(points, last=True), 4),
        }

    return {
        "steps": curves.last_step,
        "frozen_acceptance_length": ends(FROZEN),
        "live_acceptance_length": ends(LIVE),
        "acceptance_length_difference": ends(DIFFERENCE),
        "rollout_acceptance_length": ends(ROLLOUT),
        "kl_to_first_policy": ends(KL),
        "reward": ends(REWARD),
        "learnt": sum(value for _, value in curves.points("actor/speculator/learns")),
        "seconds_per_step": {name: ends(name) for name in SECONDS},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="GRPO whose rollout is drafted by a speculator that follows.")
    parser.add_argument("--output", type=Path, default=Path("outputs/grpo"), help="default: %(default)s")
    parser.add_argument("--budget", choices=BUDGETS, default="demo", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of policy, data and rollout (default: %(default)s)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, metavar="RUN", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--fresh", action="store_true", help="do everything again")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    if options.fresh and output.exists():
        shutil.rmtree(output)
    budget = BUDGETS[options.budget]
    budget = replace(budget, world=replace(budget.world, seed=options.seed))
    names = options.runs or budget.runs
    run, stages, start = Experiment(output, budget), Stages(output), time.monotonic()
    print(f"verl_speculator GRPO, budget {options.budget}, in {options.output}\n")
    stages.run("policy", budget.world, run.make_policy, [run.policy / "config.json"])
    stages.run("speculator", budget.speculator, run.train_speculator, [run.speculator / "config.json"])
    stages.run("bits", {}, run.compare_bits, [run.work / "bit_equal.json"])
    for name in names:
        settings = {"grpo": asdict(budget.grpo), "run": asdict(RUNS[name])}
        stages.run(name, settings, lambda progress, name=name: run.train(name, progress), [run.runs / name])

    summary = {
        **summarize_run(read_curves(run.runs / names[0])),
        **json.loads((run.work / "bit_equal.json").read_text()),
        "runs": {name: summarize_run(read_curves(run.runs / name)) for name in names},
        "seconds": round(sum(stages.seconds.values()), 1),
        "seconds_per_stage": {stage: round(value, 1) for stage, value in stages.seconds.items()},
        "settings": asdict(budget),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{table(summary['runs'])}\n\n  this run             {time.monotonic() - start:.0f} s\n")
    print(
        f"  Look at {output / 'report' / f'{names[0]}.html'} in a browser: what was accepted of the drafts, by the\n"
        "  speculator that follows and by the one that it was, and how far the policy went. The figures are in\n"
        f"  {output / 'summary.json'}."
    )
    return 0 if summary["policy_bit_equal"] else 1


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The last quarter of each run as lines of text."""
    columns = {
        "frozen": "frozen_acceptance_length",
        "follows": "live_acceptance_length",
        "vLLM": "rollout_acceptance_length",
        "KL": "kl_to_first_policy",
        "reward": "reward",
    }
    lines = ["  last quarter   " + "".join(f"{name:>10}" for name in columns)]
    for name, found in runs.items():
        values = [found[key] for key in columns.values()]
        cells = "".join(f"{'–':>10}" if value is None else f"{value['last_quarter']:>10.2f}" for value in values)
        lines.append(f"  {name:<15}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
