"""`make demo`: trains a target and its speculator on the standard library's functions and measures the acceptance.

    python -m examples.demo.run [--output outputs/demo] [--budget full|small] [--fresh]

Leaves `base/` (a Hugging Face folder), `speculator/`, `report/`, `data/`, `logs/` and `summary.json` in the output
folder. What was done before with the same settings is not done again.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from examples.demo import base_model, stdlib_functions
from examples.demo.settings import BUDGETS, DemoSettings, hydra_path
from examples.demo.stages import Progress, Stages, num_processes, run_trainer
from examples.demo.tokenizer import train_tokenizer
from verl_speculator.data.regeneration import RegenerationSettings, regenerate_answers
from verl_speculator.errors import CheckpointError
from verl_speculator.evaluation import EvaluationResult, EvaluationSettings, evaluate
from verl_speculator.reports.evaluation import write_report
from verl_speculator.reports.table import format_table

TABLE_WIDTH = 100  # of the printed results where the output is no terminal


class Demo:
    """The stages, and where each finds what the ones before it made."""

    def __init__(self, output: Path, settings: DemoSettings) -> None:
        self.output = output
        self.settings = settings
        self.data, self.base, self.speculator = output / "data", output / "base", output / "speculator"
        self.work, self.logs, self.report = output / "work", output / "logs", output / "report"
        self.printed = self.work / "results.txt"

    def make_data(self, progress: Progress) -> str:
        progress.update("reading the standard library")
        examples = stdlib_functions.collect_examples(stdlib_functions.stdlib_root(), self.settings.data.max_functions)
        rows = stdlib_functions.write_splits(examples, self.data)
        progress.update("learning a tokenizer")
        train = [example for example in examples if stdlib_functions.split_of(example.module) == "train"]
        texts = (text for example in train for text in (example.request, example.body))
        tokenizer = train_tokenizer(texts, self.settings.data.vocab_size)
        _empty(self.work)
        tokenizer.save_pretrained(str(self.work / "tokenizer"))
        return f"{rows['train']} functions to train on, {rows['test']} held out; {len(tokenizer)} tokens"

    def train_base(self, progress: Progress) -> str:
        settings, initial, checkpoints = self.settings.base, self.work / "initial", self.work / "base"
        _empty(checkpoints)
        parameters = base_model.initialise(self.work / "tokenizer", settings, initial)
        overrides = base_model.training_overrides(settings, initial, self.data, checkpoints, num_processes())
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes()}"]
        command = [*torchrun, "-m", base_model.TRAIN_MODULE, *overrides]
        run_trainer(command, settings.num_steps, self.logs / "base.log", progress)
        base_model.export(checkpoints, settings.num_steps, self.base)
        return f"Qwen2 of {parameters / 1e6:.1f} M parameters, {settings.num_steps} steps of verl's SFT trainer"

    def write_answers(self, progress: Progress) -> str:
        settings = self.settings.answers
        model, tokenizer = base_model.load(self.base)
        how = RegenerationSettings(max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
        num_tokens = 0
        for split, limit in (("train", settings.num_prompts), ("val", settings.num_val_prompts)):
            written = regenerate_answers(
                model,
                tokenizer,
                [self.data / f"{split}.parquet"],
                self.answers(split),
                how,
                limit=limit,
                report=lambda done, total: progress.update(f"{done}/{total} prompts answered by the base model"),
            )
            num_tokens += written.num_tokens
        return f"{num_tokens} tokens of the base model's own text"

    def answers(self, split: str) -> Path:
        return self.data / f"{split}_answers.parquet"

    def train_speculator(self, progress: Progress) -> str:
        settings, checkpoints = self.settings.speculator, self.work / "speculator"
        _empty(checkpoints)
        command = speculator_command(self.base, self.answers("train"), self.answers("val"), checkpoints, self.settings)
        run_trainer(command, settings.num_steps, self.logs / "speculator.log", progress)
        trained = checkpoints / f"global_step_{settings.num_steps}" / "speculator"
        if not (trained / "config.json").is_file():
            raise CheckpointError(f"{trained} holds no config.json: the speculator's trainer did not finish")
        _empty(self.speculator)
        shutil.move(trained, self.speculator)
        return f"LSTM of width {settings.width}, {settings.n_predict} tokens ahead, {settings.num_steps} steps"

    def measure(self, progress: Progress) -> str:
        settings = self.settings.decoding
        result = evaluate(
            self.base,
            [self.speculator],
            self.data / "test.parquet",
            settings=EvaluationSettings(num_prompts=settings.num_prompts, max_new_tokens=settings.max_new_tokens),
            report=lambda doing, done, total: progress.update(f"{doing}: {done}/{total} held-out prompts"),
        )
        write_report(result, self.report, [self.work / "speculator"])
        width = shutil.get_terminal_size((TABLE_WIDTH, 0)).columns
        self.printed.write_text(f"{_sample(result)}\n\n{format_table(result, width)}\n")
        return f"{result.num_prompts} held-out prompts, with and without the speculator"


def speculator_command(
    base: Path, train_answers: Path, val_answers: Path, checkpoints: Path, settings: DemoSettings
) -> list[str]:
    """The call of this package's trainer, as a user would type it after `python`."""
    spec = settings.speculator
    processes = num_processes()
    return [
        *("-m", "verl_speculator.cli", "train", "--nproc", str(processes)),
        f"model.path={hydra_path(base)}",
        "+model.override_config.attn_implementation=sdpa",
        "model.speculator.method=sum_lstm",
        f"model.speculator.n_predict={spec.n_predict}",
        *(f"model.speculator.{name}={spec.width}" for name in ("inner_dim", "emb_dim", "proj_dim")),
        "model.speculator.scale_input=true",
        f"optim.lr={spec.learning_rate}",
        "optim.lr_scheduler_type=cosine",
        "optim.lr_warmup_steps_ratio=0.04",
        f"data.train_files={hydra_path(train_answers)}",
        f"data.val_files={hydra_path(val_answers)}",
        f"data.train_batch_size={spec.batch_size}",
        f"data.micro_batch_size_per_gpu={spec.batch_size // processes}",
        f"data.max_length={spec.max_length}",
        "data.truncation=right",
        "data.use_dynamic_bsz=false",
        "data.num_workers=0",
        f"trainer.default_local_dir={hydra_path(checkpoints)}",
        f"trainer.total_training_steps={spec.num_steps}",
        "trainer.total_epochs=1000",
        "trainer.save_freq=-1",
        f"trainer.test_freq={spec.test_freq}",
        "trainer.logger=[console]",
        "trainer.resume_mode=disable",
    ]


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sample(result: EvaluationResult) -> str:
    """The prompt of middling acceptance, and its answer with what the speculator drafted marked."""
    before, after = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("«", "»")
    prompts = sorted(result.speculators[0].prompts, key=lambda prompt: prompt.acceptance_length)
    shown = prompts[len(prompts) // 2]
    answer = "".join(before + text + after if drafted else text for text, _, drafted in shown.pieces)
    return f"  A held-out prompt of middling acceptance, the drafted tokens marked:\n\n{shown.request}\n{answer}"


def _print_results(demo: Demo, output: Path, seconds: float) -> None:
    print(f"""
{demo.printed.read_text()}
  this run             {seconds:.0f} s

  Look at {output / "report" / "index.html"} in a browser: charts, training curves, the best and the worst prompts.
  The speculator is in {output / "speculator"}, its base model in {output / "base"}.
  Next: train one for your own model and chat data:

    verl-speculator regenerate --base YOUR_MODEL --data YOUR_CHATS.parquet --output answers.parquet
    verl-speculator train model.path=YOUR_MODEL data.train_files=answers.parquet model.speculator.method=sum_lstm
""")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a small model and its speculator, and measure the acceptance.")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="default: %(default)s")
    parser.add_argument("--budget", choices=BUDGETS, default="full", help="small: a minute, to test the machinery")
    parser.add_argument("--fresh", action="store_true", help="do everything again")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    if options.fresh:
        for name in ("stages", "work", "data", "base", "speculator", "logs"):
            _empty(output / name)
    settings = BUDGETS[options.budget]
    # With matmuls this small, threads that wait for each other cost more than they bring on a machine that is busy.
    torch.set_num_threads(1)
    disable_progress_bar()
    demo, stages, start = Demo(output, settings), Stages(output), time.monotonic()
    print(f"verl_speculator demo, budget {options.budget}, in {options.output}\n")
    stages.run("data", settings.data, demo.make_data, [demo.data / "train.parquet", demo.work / "tokenizer"])
    stages.run("base", settings.base, demo.train_base, [demo.base / "model.safetensors"])
    stages.run("answers", settings.answers, demo.write_answers, [demo.answers("train"), demo.answers("val")])
    stages.run("speculator", settings.speculator, demo.train_speculator, [demo.speculator / "config.json"])
    stages.run("measure", settings.decoding, demo.measure, [demo.printed, demo.report / "eval.json"])

    _print_results(demo, options.output, time.monotonic() - start)
    summary = _summary(json.loads((demo.report / "eval.json").read_text()), stages.seconds)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return 0 if summary["identical_outputs"] else 1


def _summary(measured: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The few numbers to remember, and what it took to make them, in whichever run each stage was done."""
    target = measured["target"]
    return {
        "acceptance_length": measured["acceptance_length"]["mean"],
        "acceptance_length_interval": [measured["acceptance_length"][end] for end in ("low", "high")],
        "acceptance_per_position": measured["acceptance_per_position"],
        "prompt_lookup_acceptance_length": measured["prompt_lookup"]["acceptance_length"]["mean"],
        "identical_outputs": measured["identical_outputs"],
        "speedup": measured["speedup"],
        "num_prompts": measured["num_prompts"],
        "target_held_out_loss": target["held_out_loss"],
        "target_repeated_4grams": target["repeated_4grams"],
        "seconds": round(sum(seconds.values()), 1),
        "seconds_per_stage": {stage: round(value, 1) for stage, value in seconds.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
