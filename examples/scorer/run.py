"""`make demo-scorer`: which draft/target mismatches are harmless, learned and measured in a world made on the spot.

    python -m examples.scorer.run [--output outputs/scorer] [--budget demo|full|small] [--seed 0] [--fresh]

Each stage is a command that a user would type; the output shows it. Leaves `target/`, `draft/`, `data/`, the scorers,
`report/` and `summary.json` in the output folder. What was done before with the same settings is not done again.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from examples.demo.settings import hydra_path
from examples.demo.stages import Progress, Stages, bar_progress, run_command
from examples.scorer.settings import BUDGETS, Budget, GrpoSettings
from examples.scorer.world import train_model, write_questions

HEAD, LINEAR = "supervised", "autojudge"
WINDOWS, ANSWERS = "grpo-windows", "grpo-answers"


class Experiment:
    """The stages, and where each finds what the ones before it made."""

    def __init__(self, output: Path, budget: Budget) -> None:
        self.output, self.budget = output, budget
        self.target, self.draft = output / "target", output / "draft"
        self.data, self.work, self.logs = output / "data", output / "work", output / "logs"
        self.scorers = output / "scorers"
        self.windows, self.labelled = self.work / "windows.parquet", self.work / "labelled.parquet"

    def train_target(self, progress: Progress) -> str:
        solved = train_model("target", self.budget.world.target, self.target, self.budget.world.seed, progress.update)
        return f"a target trained from nothing; {solved}"

    def train_draft(self, progress: Progress) -> str:
        solved = train_model("draft", self.budget.world.draft, self.draft, self.budget.world.seed, progress.update)
        return f"a weaker draft with other habits; {solved}"

    def ask(self, progress: Progress) -> str:
        sizes = self.questions()
        for number, (split, count) in enumerate(sizes.items()):
            write_questions(self.data / f"{split}.parquet", count, seed=1000 * self.budget.world.seed + number)
        return f"questions: {', '.join(f'{count} for {split}' for split, count in sizes.items())}"

    def questions(self) -> dict[str, int]:
        world = self.budget.world
        return {"training": world.num_train, "validation": world.num_validation, "test": world.num_test}

    def make_windows(self, progress: Progress) -> str:
        data = ["--data", str(self.data / "training.parquet")]
        printed = self._run("data", [*self._models(), *data, "--output", str(self.windows)], progress)
        label = ["--base", str(self.target), "--windows", str(self.windows), "--output", str(self.labelled)]
        labels = self._run("label", [*label, "--batch-size", str(self.budget.decoding.batch_size)], progress)
        return f"{_last(printed)} {_last(labels)}"

    def check_world(self, progress: Progress) -> str:
        """Before anything is learned: a world in which a threshold does it all, or nothing helps, is no test."""
        from verl_speculator.scorer.supervised import area_under_curve
        from verl_speculator.scorer.windows import read_windows

        gates, decoding = self.budget.gates, self.budget.evaluation
        file = read_windows(self.labelled)
        column = file.scalars.index("draft_logprob")
        scores, labels = [], []
        for window in file.windows:
            for slot in window.mismatches:
                scores.append(window.scalars[slot][column])
                labels.append(window.labels[slot])
        auc = area_under_curve(torch.tensor(scores), torch.tensor(labels))
        # Strict alone, and what knowing the future would save.
        found = self.work / "gates.json"
        questions = ["--data", str(self.data / "validation.parquet"), "--accept", "accept-all"]
        oracle = ["--oracle", str(decoding.num_oracle), "--output", str(found)]
        self._run("evaluate", [*self._models(), *questions, *oracle], progress, name="gates")
        rules = json.loads(found.read_text())["rules"]
        gain, accuracy = rules["oracle"]["speedup_over_strict"] - 1, rules["strict"]["accuracy"]
        checks = {
            f"area under the curve of the target's probability {auc:.3f}, at most {gates.most_auc}": not (
                auc > gates.most_auc
            ),
            f"the oracle saves {gain:+.0%}, at least {gates.least_oracle_gain:+.0%}": gain >= gates.least_oracle_gain,
            f"the target answers {accuracy:.1%} rightly, between {gates.least_accuracy:.0%} and "
            f"{gates.most_accuracy:.0%}": gates.least_accuracy <= accuracy <= gates.most_accuracy,
        }
        for what, passed in checks.items():
            print(f"  {'ok  ' if passed else 'FAIL'}  {what}", flush=True)
        if not all(checks.values()):
            sys.exit("This world would prove nothing; see the gates above.")
        return f"area under the curve {auc:.3f}, oracle {gain:+.0%}, accuracy {accuracy:.1%}"

    def fit_heads(self, progress: Progress) -> str:
        settings = self.budget.head
        common = ["--base", str(self.target), "--windows", str(self.labelled), "--epochs", str(settings.num_epochs)]
        common += ["--harm-weight", str(settings.harm_weight), "--seed", str(self.budget.world.seed)]
        head = ["--inner-dim", str(settings.inner_dim), "--output", str(self.scorers / HEAD)]
        printed = self._run("fit", [*common, *head], progress)
        self._run("fit", [*common, "--linear", "--output", str(self.scorers / LINEAR)], progress, name="fit-linear")
        return _last(printed)

    def train_on_windows(self, progress: Progress) -> str:
        return self._train(WINDOWS, self.budget.windows, [], progress)

    def train_on_answers(self, progress: Progress) -> str:
        decoding = self.budget.decoding
        closed_loop = [
            "rollout.closed_loop=true",
            f"rollout.draft_model_path={hydra_path(self.draft)}",
            f"rollout.num_draft_tokens={decoding.num_drafts}",
            f"rollout.max_new_tokens={decoding.max_new_tokens}",
        ]
        return self._train(ANSWERS, self.budget.answers, closed_loop, progress)

    def _train(self, name: str, settings: GrpoSettings, more: list[str], progress: Progress) -> str:
        """GRPO with verl, from the head that labels have taught."""
        folder, run = self.scorers / name, self.work / name
        for old in (folder, run):
            shutil.rmtree(old, ignore_errors=True)
        if not settings.steps:
            return "left out"
        overrides = [
            f"rollout.target_model_path={hydra_path(self.target)}",
            f"model.scorer.path={hydra_path(self.scorers / HEAD)}",
            f"data.train_files={hydra_path(self.labelled)}",
            f"data.train_batch_size={settings.batch_size}",
            f"data.seed={self.budget.world.seed}",
            f"rollout.seed={self.budget.world.seed}",
            f"rollout.n={settings.num_samples}",
            f"rollout.temperature={settings.temperature}",
            f"actor.optim.lr={settings.learning_rate}",
            f"reward.reward_kwargs.cost={settings.cost}",
            f"reward.reward_kwargs.cost_step={settings.cost_step}",
            # A step draws from the very policy that it updates.
            "algorithm.rollout_correction.bypass_mode=true",
            "trainer.total_epochs=1000",
            f"trainer.total_training_steps={settings.steps}",
            "trainer.test_freq=-1",
            f"trainer.save_freq={settings.steps}",
            f"trainer.default_local_dir={hydra_path(run)}",
        ]
        self._run("train", [*overrides, *more], progress, name=name, describe=training_step)
        shutil.copytree(run / f"global_step_{settings.steps}" / "actor" / "scorer", folder)
        return f"{settings.steps} steps of GRPO with verl"

    def evaluate(self, progress: Progress) -> str:
        settings, found = self.budget.evaluation, self.work / "evaluation.json"
        rules = [*settings.rules, *(f"scorer:{folder}" for folder in sorted(self.scorers.iterdir()))]
        command = [
            *self._models(),
            *("--validation", str(self.data / "validation.parquet"), "--data", str(self.data / "test.parquet")),
            *(text for rule in rules for text in ("--accept", rule)),
            *("--accuracy-bound", str(settings.accuracy_bound), "--oracle", str(settings.num_oracle)),
            *("--output", str(found), "--report", str(self.output / "report")),
        ]
        printed = self._run("evaluate", command, progress)
        table = [line for line in printed.splitlines() if line.strip() and bar_progress(line) is None]
        (self.work / "evaluation.txt").write_text("\n".join(line for line in table if "Wrote" not in line) + "\n")
        return f"{len(rules)} rules on {self.budget.world.num_test} questions, settings chosen on others"

    def _models(self) -> list[str]:
        decoding = self.budget.decoding
        return [
            *("--base", str(self.target), "--draft", str(self.draft), "--answers", "answer"),
            *("--num-drafts", str(decoding.num_drafts), "--max-new-tokens", str(decoding.max_new_tokens)),
            *("--batch-size", str(decoding.batch_size)),
        ]

    def _run(
        self,
        command: str,
        options: Sequence[str],
        progress: Progress,
        name: str = "",
        describe: Callable[[str], str | None] = bar_progress,
    ) -> str:
        print(f"  $ verl-speculator scorer {command} {shlex.join(options)}", flush=True)
        log = self.logs / f"{name or command}.log"
        return run_command(["scorer", command, *options], log, progress, describe)


def training_step(line: str) -> str | None:
    """The step of a console line of verl's tracker, and how the training goes."""
    step = re.search(r"step:(\d+) - ", line)
    if step is None:
        return None
    found = {name: re.search(rf"scorer/{name}:([\d.eE+-]+)", line) for name in ("accuracy", "tokens_per_target_call")}
    return f"step {step[1]}" + "".join(f"  {name} {float(match[1]):.3f}" for name, match in found.items() if match)


def summarize(evaluation: dict[str, Any], seconds: dict[str, float], cpu_seconds: dict[str, float]) -> dict[str, Any]:
    """For each rule what it saves and costs, and how long everything took."""
    names = (
        "tokens_per_target_call",
        "accuracy",
        "accuracy_loss",
        "accuracy_loss_upper_95",
        "num_prompts",
        "is_lossy",
        "setting",
        "speedup_over_strict",
        "equals_strict",
    )
    return {
        "rules": {label: {name: rule[name] for name in names} for label, rule in evaluation["rules"].items()},
        "accuracy_bound": evaluation["accuracy_bound"],
        "seconds": round(sum(seconds.values()), 1),
        "seconds_per_stage": {stage: round(value, 1) for stage, value in seconds.items()},
        "cpu_seconds_per_stage": {stage: round(value, 1) for stage, value in cpu_seconds.items()},
    }


def _last(printed: str) -> str:
    return [line for line in printed.splitlines() if line.strip()][-1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Learn which draft/target mismatches are harmless, and measure it.")
    parser.add_argument("--output", type=Path, default=Path("outputs/scorer"), help="default: %(default)s")
    parser.add_argument("--budget", choices=BUDGETS, default="demo", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of world, models and heads (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="do everything again")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    if options.fresh and output.exists():
        shutil.rmtree(output)
    budget = BUDGETS[options.budget]
    budget = replace(budget, world=replace(budget.world, seed=options.seed))
    run, stages, start = Experiment(output, budget), Stages(output), time.monotonic()
    print(f"verl_speculator scorer, budget {options.budget}, in {options.output}\n")
    world = budget.world
    for name, settings, work, folder in (
        ("target", world.target, run.train_target, run.target),
        ("draft", world.draft, run.train_draft, run.draft),
    ):
        stages.run(name, {"seed": world.seed, **asdict(settings)}, work, [folder / "config.json"])
    stages.run("questions", run.questions(), run.ask, [run.data / "test.parquet"])
    stages.run("windows", budget.decoding, run.make_windows, [run.labelled])
    stages.run("gates", budget.gates, run.check_world)
    stages.run("heads", budget.head, run.fit_heads, [run.scorers / HEAD, run.scorers / LINEAR])
    stages.run("windows-rl", budget.windows, run.train_on_windows)
    stages.run("answers-rl", budget.answers, run.train_on_answers)
    found = run.work / "evaluation.json"
    stages.run("evaluate", budget.evaluation, run.evaluate, [found, output / "report" / "index.html"])

    summary = summarize(json.loads(found.read_text()), stages.seconds, stages.cpu_seconds)
    (output / "summary.json").write_text(json.dumps({**summary, "settings": asdict(budget)}, indent=2) + "\n")
    print(f"""
  All rules but strict are lossy: they keep tokens that the target would not have written.

{(run.work / "evaluation.txt").read_text()}
  this run             {time.monotonic() - start:.0f} s
  all stages           {sum(stages.seconds.values()):.0f} s, of CPU {sum(stages.cpu_seconds.values()):.0f} s: {
        ", ".join(f"{stage} {value:.0f}" for stage, value in stages.cpu_seconds.items())
    }

  Look at {output / "report" / "index.html"} in a browser: what each rule saves and costs, and answers in which the
  accepted mismatches are marked. The figures are in {output / "summary.json"}.
""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
