"""Time from `verl-speculator train` to the end of its first training step, and what it goes into.

    python benchmarks/bench_startup.py --json startup.json   # 3 launches after one that fills caches

Launches the real command on a tiny random base model and a few chats, with one process. Three processes follow one
another: the `command` (configuration and checks), `torchrun` in its place, and the `trainer`. `startup_trace/`
writes down in each what it does; the package itself is unchanged. Activities are exclusive, so the rows add up to the
whole:

- `interpreter`: from the creation of a process to the first line of Python that is not its own start.
- `torch import`: `import torch` itself; `verl import`: with what verl imports, such as transformers, ray and more of
  torch; `own imports`: with hydra and pyarrow.
- `configuration`, `checks`: reading the overrides; everything that is checked before a model is loaded.
- `tokenizer and data`, `process group`, `engine`: verl's and ours together.
- `first step`: with what is imported and allocated in it.
- `other`: between these; in `torchrun` its own start of the trainer.

`ours` is the whole command process, which torchrun's own command line does without, and in the trainer the own imports,
the configuration and the checks. `verl import` is what any training with verl pays.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import describe_machine, print_table, versions
from random_base import BaseShape, write_chats

COLUMNS = ("process", "activity", "seconds_median", "seconds_min", "seconds_max", "fraction", "is_ours")
PROCESSES = ("command", "torchrun", "trainer")
OWN_ACTIVITIES = ("own imports", "configuration", "checks")


def launch(folder: Path, base: Path, chats: Path) -> dict[tuple[str, str], float]:
    """Seconds by process and activity of one launch."""
    logs = folder / "logs"
    logs.mkdir(parents=True)
    here = Path(__file__).resolve().parent
    path = [str(here / "startup_trace"), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = dict(
        os.environ, PYTHONPATH=os.pathsep.join(filter(None, path)), VERL_SPECULATOR_STARTUP_TRACE=str(logs)
    )
    command = [
        *(sys.executable, "-m", "verl_speculator.cli", "train", "--nproc=1"),
        f"model.partial_pretrain={base}",
        f"data.train_files={chats}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        *("model.speculator.n_predict=2", "model.speculator.inner_dim=32"),
        *("model.speculator.emb_dim=32", "model.speculator.proj_dim=32"),
        *("data.train_batch_size=4", "data.max_length=256", "trainer.total_training_steps=1"),
    ]
    started = time.time()
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    by_role = {log["role"]: log for log in (json.loads(file.read_text()) for file in logs.iterdir())}
    missing = [role for role in PROCESSES if role not in by_role]
    if missing:
        raise RuntimeError(f"no log of {', '.join(missing)}: was another sitecustomize loaded first?")
    return sum_up(started, [by_role[role] for role in PROCESSES])


def sum_up(started: float, logs: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Lay the processes' logs end to end. Each hands over to the next when that is created, or at its own end."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    # torchrun replaces the command in its process, so its creation is that of the command.
    starts = [started, logs[0]["ended"], logs[2]["created"]]
    ends = [*starts[1:], logs[2]["ended"]]
    for log, start, end in zip(logs, starts, ends, strict=True):
        changes = [(start, "interpreter"), *((at, name) for at, name in log["changes"] if at < end), (end, "")]
        for (at, name), (until, _) in pairwise(changes):
            seconds[log["role"], name] += until - at
    return seconds


def summarise(launches: list[dict[tuple[str, str], float]]) -> dict[str, Any]:
    whole = [sum(launch.values()) for launch in launches]
    keys = dict.fromkeys(key for launch in launches for key in launch)  # in the order in which they happen
    rows = []
    for process, activity in keys:
        mine = [launch.get((process, activity), 0.0) for launch in launches]
        rows.append(
            {
                "process": process,
                "activity": activity,
                "seconds_median": statistics.median(mine),
                "seconds_min": min(mine),
                "seconds_max": max(mine),
                "fraction": statistics.median(own / total for own, total in zip(mine, whole, strict=True)),
                "is_ours": is_ours(process, activity),
            }
        )
    ours = [sum(seconds for key, seconds in launch.items() if is_ours(*key)) for launch in launches]
    verl = [sum(seconds for key, seconds in launch.items() if key[1] == "verl import") for launch in launches]
    return {
        "rows": rows,
        "seconds_to_first_step": {"median": statistics.median(whole), "min": min(whole), "max": max(whole)},
        "ours": {"seconds_median": statistics.median(ours), "seconds_min": min(ours), "seconds_max": max(ours)},
        "verl_import_seconds_median": statistics.median(verl),
        "launches": [{f"{process}: {name}": s for (process, name), s in launch.items()} for launch in launches],
    }


def is_ours(process: str, activity: str) -> bool:
    return process == "command" or (process == "trainer" and activity in OWN_ACTIVITIES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write rows, machine and versions to this file")
    parser.add_argument("--rounds", type=int, default=3, help="launches that are counted")
    parser.add_argument("--cold", action="store_true", help="leave out the launch before them that fills file caches")
    args = parser.parse_args()
    machine = describe_machine(torch.device("cpu"))
    launches = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = BaseShape(vocab=512, hidden=64, layers=2, intermediate=128)
        base = shape.write(folder / "base", max_length=512)
        chats = write_chats(folder / "chats.parquet", rows=8, answer_words=8)
        for index in range(args.rounds + (not args.cold)):
            seconds = launch(folder / str(index), base, chats)
            if args.cold or index:
                launches.append(seconds)
    measured = summarise(launches)
    print_table(measured["rows"], COLUMNS)
    whole, ours = measured["seconds_to_first_step"], measured["ours"]
    print(f"\nto the end of the first step: {whole['median']:.1f} s ({whole['min']:.1f} to {whole['max']:.1f})")
    print(f"ours: {ours['seconds_median']:.1f} s; verl's import: {measured['verl_import_seconds_median']:.1f} s")
    print(f"{machine['device']}, {machine['cores']} cores, load average before {machine['load_average']}")
    if args.json:
        report = {
            "machine": machine,
            "versions": versions("torch", "verl", "transformers", "ray"),
            "rounds": args.rounds,
            **measured,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
