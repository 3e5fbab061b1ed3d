"""`make demo`: trains a target and its speculator on the standard library's functions and measures the acceptance.

    python -m examples.demo.run [--output outputs/demo] [--budget full|small] [--fresh]

Leaves `base/` (a Hugging Face folder), `speculator/`, `data/`, `logs/` and `summary.json` in the output folder. What
was done before with the same settings is not done again.
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
from examples.demo.answers import load_base, read_requests, write_answers
from examples.demo.decode import Measurement, mark_accepted, measure
from examples.demo.settings import BUDGETS, DemoSettings, hydra_path
from examples.demo.stages import Progress, Stages, num_processes, run_trainer
from examples.demo.tokenizer import train_tokenizer
from verl_speculator.errors import CheckpointError
from verl_speculator.models import Speculator


class Demo:
    """The stages, and where each finds what the ones before it made."""

    def __init__(self, output: Path, settings: DemoSettings) -> None:
        self.output = output
        self.settings = settings
        self.data, self.base, self.speculator = output / "data", output / "base", output / "speculator"
        self.work, self.logs = output / "work", output / "logs"
        self.measured = self.work / "decoding.json"

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
        model, tokenizer = load_base(self.base)
        requests = read_requests(self.data / "train.parquet", settings.num_prompts)
        num_tokens = write_answers(
            model,
            tokenizer,
            requests,
            self.data / "answers.parquet",
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            report=lambda done: progress.update(f"{done}/{len(requests)} prompts answered by the base model"),
        )
        return f"{num_tokens} tokens of the base model's own text"

    def train_speculator(self, progress: Progress) -> str:
        settings, checkpoints = self.settings.speculator, self.work / "speculator"
        _empty(checkpoints)
        command = speculator_command(self.base, self.data / "answers.parquet", checkpoints, self.settings)
        run_trainer(command, settings.num_steps, self.logs / "speculator.log", progress)
        trained = checkpoints / f"global_step_{settings.num_steps}" / "speculator"
        if not (trained / "config.json").is_file():
            raise CheckpointError(f"{trained} holds no config.json: the speculator's trainer did not finish")
        _empty(self.speculator)
        shutil.move(trained, self.speculator)
        return f"LSTM of width {settings.width}, {settings.n_predict} tokens ahead, {settings.num_steps} steps"

    def decode(self, progress: Progress) -> str:
        settings = self.settings.decoding
        model, tokenizer = load_base(self.base)
        speculator = Speculator.from_pretrained(self.speculator, dtype=torch.float32).eval()
        requests = read_requests(self.data / "test.parquet", settings.num_prompts)
        measurement = measure(
            model,
            speculator,
            tokenizer,
            requests,
            max_new_tokens=settings.max_new_tokens,
            report=lambda done: progress.update(f"{done}/{len(requests)} held-out prompts"),
        )
        marks = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("«", "»")
        # The answer that goes on longest without repeating itself shows more than the one that is drafted best.
        shown = max(measurement.prompts, key=lambda prompt: prompt.fresh_length)
        sample = mark_accepted(tokenizer, shown.speculative, *marks)
        report = _report(measurement) | {"sample_request": shown.request, "sample": sample}
        self.measured.write_text(json.dumps(report))
        return f"{len(requests)} held-out prompts, with and without the speculator"


def speculator_command(base: Path, answers: Path, checkpoints: Path, settings: DemoSettings) -> list[str]:
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
        f"data.train_files={hydra_path(answers)}",
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
        "trainer.test_freq=-1",
        "trainer.logger=[console]",
        "trainer.resume_mode=disable",
    ]


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _report(measurement: Measurement) -> dict[str, Any]:
    return {
        "acceptance_length": round(measurement.counts.acceptance_length, 3),
        "acceptance_length_before_loops": round(measurement.counts_before_loops.acceptance_length, 3),
        "share_of_tokens_in_loops": round(measurement.share_in_loops, 3),
        "acceptance_rate_per_position": [round(r, 3) for r in measurement.counts.acceptance_rate_per_position],
        "identical_outputs": measurement.identical_outputs,
        "num_prompts": len(measurement.prompts),
        "num_tokens": measurement.num_tokens,
        "target_forwards": {"plain": measurement.plain_forwards, "speculative": measurement.speculative_forwards},
        "decoding_seconds": {
            "plain": round(measurement.plain_seconds, 2),
            "speculative": round(measurement.speculative_seconds, 2),
        },
    }


def _print_report(report: dict[str, Any], output: Path, seconds: float) -> None:
    forwards, times = report["target_forwards"], report["decoding_seconds"]
    same = "identical" if report["identical_outputs"] else "DIFFERENT (a bug: greedy decoding must be lossless)"
    print(f"""
  One held-out prompt, the speculator's accepted tokens marked:

{report["sample_request"]}
{report["sample"]}

  acceptance length    {report["acceptance_length"]} tokens per target forward (1 without a speculator)
                       {report["acceptance_length_before_loops"]} before an answer begins to repeat itself, as a model
                       this small does in {report["share_of_tokens_in_loops"]:.0%} of its tokens
  outputs              {same} with and without the speculator, {report["num_prompts"]} prompts
  target forwards      {forwards["plain"]} -> {forwards["speculative"]} for {report["num_tokens"]} tokens
  decoding             {times["plain"]} s -> {times["speculative"]} s
  this run             {seconds:.0f} s

  The speculator is in {output / "speculator"}, its base model in {output / "base"}.
  Next: train one for your own model and chat data:

    verl-speculator train model.path=YOUR_MODEL data.train_files=YOUR_CHATS.parquet model.speculator.method=sum_lstm
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
    stages.run("answers", settings.answers, demo.write_answers, [demo.data / "answers.parquet"])
    stages.run("speculator", settings.speculator, demo.train_speculator, [demo.speculator / "config.json"])
    stages.run("decode", settings.decoding, demo.decode, [demo.measured])

    report = json.loads(demo.measured.read_text())
    _print_report(report, options.output, time.monotonic() - start)
    _write_summary(report, stages.seconds, output / "summary.json")
    return 0 if report["identical_outputs"] else 1


def _write_summary(report: dict[str, Any], seconds: dict[str, float], path: Path) -> None:
    """What was measured, and what it took to make it, in whichever run each stage was done."""
    summary = {key: value for key, value in report.items() if not key.startswith("sample")}
    summary["seconds"] = round(sum(seconds.values()), 1)
    summary["seconds_per_stage"] = {stage: round(value, 1) for stage, value in seconds.items()}
    path.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
