"""Stages of the demo: each leaves a marker when it is done and is not repeated while its settings stay the same."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS_BETWEEN_LINES = 15.0  # of progress where the output is no terminal


class Progress:
    """One line per stage: rewritten in place on a terminal, repeated now and then in a log."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.start = time.monotonic()
        self._last_line = self.start
        self._is_terminal = sys.stdout.isatty()

    def update(self, text: str) -> None:
        now = time.monotonic()
        line = f"  {self.title:<11}{now - self.start:5.0f} s  {text}"
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[K" + line[:width], end="", flush=True)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(line, flush=True)

    def finish(self, text: str) -> float:
        seconds = time.monotonic() - self.start
        end = "\r\x1b[K" if self._is_terminal else ""
        print(f"{end}  {self.title:<11}{seconds:5.0f} s  {text}", flush=True)
        return seconds


class Stages:
    """Runs stages in order below `output`. A stage that must be run again makes all later ones run again."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / "stages"
        self.seconds: dict[str, float] = {}  # of each stage, in the run that did it
        self.cpu_seconds: dict[str, float] = {}  # likewise: what it took whatever else the machine was doing
        self._key = f"python {sys.version_info[:3]}"  # the data is this interpreter's standard library

    def run(self, name: str, settings: Any, work: Callable[[Progress], str], products: Sequence[Path] = ()) -> None:
        """Do `work`, which returns what to say about it, unless it was done with these settings before.

        `products` are the files it leaves: when one has gone since, the work is done again.
        """
        described = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings
        self._key = hashlib.sha256(f"{self._key}|{name}|{json.dumps(described, sort_keys=True)}".encode()).hexdigest()
        marker = self.folder / f"{name}.json"
        done = json.loads(marker.read_text()) if marker.is_file() else {}
        progress = Progress(name)
        if done.get("key") == self._key and all(product.exists() for product in products):
            self.seconds[name], self.cpu_seconds[name] = done["seconds"], done["cpu_seconds"]
            progress.finish(f"{done['result']} (done before)")
            return
        marker.unlink(missing_ok=True)
        start = _cpu_seconds()
        result = work(progress)
        self.seconds[name], self.cpu_seconds[name] = progress.finish(result), _cpu_seconds() - start
        self.folder.mkdir(parents=True, exist_ok=True)
        took = {"seconds": self.seconds[name], "cpu_seconds": self.cpu_seconds[name]}
        marker.write_text(json.dumps({"key": self._key, "result": result, **took}))


def _cpu_seconds() -> float:
    """Of this process and of those that it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run_command(
    command: Sequence[str], log_file: Path, progress: Progress, describe: Callable[[str], str | None]
) -> str:
    """Run one of the package's commands; its output goes to `log_file` and is returned.

    `describe` makes of a line, or of a state of a progress bar, what to show; None leaves what was shown. The demo ends
    with the last lines when the command fails.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    lines: list[str] = []
    with (
        log_file.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            [sys.executable, "-m", "verl_speculator.cli", *command],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        # Universal newlines: what a progress bar draws over itself comes as lines too.
        for line in process.stdout:
            log.write(line)
            lines.append(line)
            if (shown := describe(line)) is not None:
                progress.update(shown)
    if process.returncode != 0:
        name, tail = command[0], "".join(lines[-15:])
        sys.exit(f"\n{tail}\n`{name}` failed (exit status {process.returncode}). Its output: {log_file}")
    return "".join(lines)


def training_progress(line: str) -> str | None:
    """The step of a console line of verl's tracker, and the few numbers that say how the training goes."""
    step = re.search(r"step:(\d+) - ", line)
    if step is None:
        return None
    names = {"train/loss": "loss", "train/acceptance_length": "acceptance length (teacher-forced)"}
    found = {name: re.search(rf"{name}:([\d.eE+-]+)", line) for name in names}
    return f"step {step[1]}" + "".join(f"  {names[n]} {float(match[1]):.2f}" for n, match in found.items() if match)


def bar_progress(line: str) -> str | None:
    """A state of a progress bar, without the bar."""
    bar = re.search(r"^\s*([^:]+):.*?(\d+/\d+)", line)
    return f"{bar[1]} {bar[2]}" if bar else None
