"""The experiments of docs/experiments.md on SmolLM2-135M-Instruct: short trainings, each measured on held-out prompts.

    python -m examples.experiments.run [NAME ...] --base outputs/demo/base --data FOLDER [--output outputs/experiments]

FOLDER holds the base's own answers, train.parquet and val.parquet, and prompts, test.parquet, made as
examples/demo/data/README.md says but with all of them. Without a name all runs of `runs.py` are made, in their order;
what was finished is not made again. Each leaves OUTPUT/NAME-SEED/result.json, and all of them OUTPUT/results.json.

Processor seconds stand for time, since they do not depend on what else runs on the machine. Hidden states are written
to disk before, for all alike, so that a step costs what the speculator costs.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from examples.demo.prompts import collect_examples, stdlib_root
from examples.demo.settings import hydra_path
from examples.experiments.runs import RUNS, Run

_DECODED_PROMPTS, _MAX_NEW_TOKENS = 48, 64
_CALIBRATION_STEPS = (4, 12)  # their difference is free of what a process takes to start


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/experiments"))
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in RUNS]:
        parser.error(f"there is no run {unknown[0]!r}: take some of {', '.join(RUNS)}")
    experiments = Experiments(args.base, args.data, args.output)
    for name in args.names or RUNS:
        for seed in RUNS[name].seeds:
            print(_line(experiments.run(name, seed)), flush=True)
    results = [json.loads(path.read_text()) for path in sorted(args.output.glob("*/result.json"))]
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


class Experiments:
    def __init__(self, base: Path, data: Path, output: Path) -> None:
        self.base, self.data, self.output = base, data, output

    def run(self, name: str, seed: int) -> dict[str, Any]:
        run, folder = RUNS[name], self.output / f"{name}-{seed}"
        described = {"overrides": run.overrides, "rows": run.num_rows, "epochs": run.num_epochs, "data": run.data}
        result_file = folder / "result.json"
        if result_file.is_file():
            result = json.loads(result_file.read_text())
            if result["described"] == described:
                return result
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            **run.overrides,
            "model.partial_pretrain": self.base,
            "data.train_files": self._rows(run),
            "data.val_files": self.data / "val.parquet",
            "data.hidden_states_cache": self.output / ("states_of_layers" if run.reads_layers else "states"),
            "+data.seed": seed,
            "engine.seed": seed,
            "trainer.save_freq": -1,
            "trainer.test_freq": -1,
            "trainer.logger": "[console]",
        }
        self._command(folder / "states.log", ["data", "hidden-states", *_overrides(settings)])
        steps = self._steps(run, settings, folder)
        seconds = self._train(settings, folder / "run", steps, folder / "train.log")
        metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        result = {
            "name": name,
            "seed": seed,
            "described": described,
            "steps": steps,
            "cpu_seconds": round(seconds, 1),
            "validation": _validation(metrics),
        }
        if run.decode:
            result["decoding"] = self._decode(folder / "run" / f"global_step_{steps}", folder)
        result_file.write_text(json.dumps(result, indent=1) + "\n")
        return result

    def _rows(self, run: Run) -> Path:
        """The first rows of the training answers; with `people` what the library itself has in their place."""
        file = self.output / "data" / f"{run.data}_{run.num_rows}.parquet"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = pq.read_table(self.data / "train.parquet")[: run.num_rows]
            pq.write_table(_peoples_answers(rows) if run.data == "people" else rows, file)
        return file

    def _steps(self, run: Run, settings: Mapping[str, object], folder: Path) -> int:
        if run.num_epochs is not None:
            return run.num_epochs * (run.num_rows // int(str(settings["data.train_batch_size"])))
        assert run.cpu_seconds is not None
        few, more = (
            self._train(settings, folder / "calibration", steps, folder / "calibration.log")
            for steps in _CALIBRATION_STEPS
        )
        of_a_step = (more - few) / (_CALIBRATION_STEPS[1] - _CALIBRATION_STEPS[0])
        return round(run.cpu_seconds / of_a_step)

    def _train(self, settings: Mapping[str, object], folder: Path, steps: int, log: Path) -> float:
        """Train afresh; the processor seconds it took."""
        shutil.rmtree(folder, ignore_errors=True)
        run = {
            "trainer.total_training_steps": steps,
            "trainer.total_epochs": 10**6,
            "trainer.default_local_dir": folder,
        }
        return self._command(log, ["train", "--nproc", "1", *_overrides({**settings, **run})])

    def _decode(self, checkpoint: Path, folder: Path) -> dict[str, Any]:
        file = folder / "eval.json"
        options = ["--limit", str(_DECODED_PROMPTS), "--max-new-tokens", str(_MAX_NEW_TOKENS), "--batch-size", "16"]
        command = ["eval", "--base", str(self.base), "--speculator", str(checkpoint), "--json", str(file), *options]
        self._command(folder / "eval.log", [*command, "--data", str(self.data / "test.parquet")])
        measured = json.loads(file.read_text())
        names = ("num_parameters", "acceptance_length", "acceptance_per_position", "num_identical", "costs")
        return {name: measured["speculators"][0][name] for name in names}

    def _command(self, log: Path, command: Sequence[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        with log.open("w") as stream:
            status = subprocess.run(
                [sys.executable, "-m", "verl_speculator.cli", *command], stdout=stream, stderr=stream, env=environment
            ).returncode
        if status:
            sys.exit(f"`{command[0]}` failed (exit status {status}); its output: {log}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _overrides(settings: Mapping[str, object]) -> list[str]:
    values = {key: hydra_path(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


def _validation(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of the last validation."""
    numbers = next(line["metrics"] for line in reversed(metrics) if "val/loss" in line["metrics"])
    return {key.removeprefix("val/"): round(value, 4) for key, value in numbers.items() if key.startswith("val/")}


def _peoples_answers(rows: pa.Table) -> pa.Table:
    """Chats with the same questions, and the library's own code as the answers."""
    by_request = {example.request: example for example in collect_examples(stdlib_root())}
    chats = []
    for question, *_ in rows["messages"].to_pylist():
        example = by_request[question["content"]]
        code = f'{example.signature}\n    """{example.summary}"""\n{example.body}'
        chats.append([question, {"role": "assistant", "content": f"```python\n{code}\n```"}])
    return pa.table({"messages": chats})


def _line(result: Mapping[str, Any]) -> str:
    validation = result["validation"]
    accepted = validation.get("closed_loop_acceptance_length", validation["acceptance_length"])
    line = f"{result['name']}-{result['seed']}: {result['steps']} steps, {result['cpu_seconds']:.0f} s, {accepted:.3f}"
    if decoding := result.get("decoding"):
        mean = decoding["acceptance_length"]
        line += f"; decoded {mean['mean']:.3f} ({mean['low']:.3f} to {mean['high']:.3f})"
    return line


if __name__ == "__main__":
    main()
