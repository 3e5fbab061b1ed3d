"""Loaded by Python itself in every process that `bench_startup.py` starts: writes down what a training start does when.

A log is the times at which the innermost activity changed: [seconds since 1970, activity]. Importing `torch`, `verl`
and this package are activities, and so are some of their functions; what is imported beside them belongs to whoever
imported it. The package that is measured knows nothing of this file.
"""

from __future__ import annotations

import atexit
import functools
import importlib.machinery
import json
import os
import sys
import time

FOLDER = os.environ.get("VERL_SPECULATOR_STARTUP_TRACE")
ROLES = {
    "verl_speculator.cli": "command",
    "torch.distributed.run": "torchrun",
    "verl_speculator.trainer.sft_trainer": "trainer",
}
IMPORTS = {"torch": "torch import", "verl": "verl import", "verl_speculator": "own imports"}
# Functions by the module that defines them; they are replaced as soon as it has been imported.
CALLS = {
    "verl_speculator.trainer.config.compose": {"load_config": "configuration"},
    "verl_speculator.trainer.config.preflight": {"check_run": "checks"},
    "verl_speculator.platforms.cpu": {"init_process_group": "process group"},
    "verl_speculator.trainer.worker": {"SpeculatorTrainingWorker.__init__": "engine"},
    "verl.workers.engine_workers": {"TrainingWorker.reset": "engine"},
    "verl.trainer.sft_trainer": {
        "SFTTrainer._build_config": "tokenizer and data",
        "SFTTrainer._build_dataset": "tokenizer and data",
    },
    "verl_speculator.trainer.loop": {"SpeculatorTrainingLoop._train_step": "first step"},
}


class Log:
    def __init__(self, role: str) -> None:
        self.role = role
        self.created = time.time() - _age_of_process()
        self.changes: list[tuple[float, str]] = []
        self._open: list[str] = []
        self._process = os.getpid()
        self._is_written = False
        self.enter("other")

    def enter(self, activity: str) -> None:
        self._open.append(activity)
        self.changes.append((time.time(), activity))

    def leave(self) -> None:
        self._open.pop()
        self.changes.append((time.time(), self._open[-1]))

    @property
    def innermost(self) -> str:
        return self._open[-1]

    def write(self) -> None:
        is_forked = os.getpid() != self._process
        if self._is_written or is_forked:
            return
        self._is_written = True
        whole = {"role": self.role, "created": self.created, "ended": time.time(), "changes": self.changes}
        with open(os.path.join(FOLDER or ".", f"{self.role}-{os.getpid()}.json"), "w") as file:
            json.dump(whole, file)


def _age_of_process() -> float:
    with open("/proc/self/stat") as file:
        started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _role() -> str | None:
    arguments = sys.orig_argv
    return ROLES.get(arguments[arguments.index("-m") + 1]) if "-m" in arguments else None


def _record_imports(log: Log) -> None:
    execute = importlib.machinery.SourceFileLoader.exec_module

    def recorded(self, module):
        name = module.__name__
        # Parts of torch that verl asks for one by one are part of verl's import.
        activity = IMPORTS.get(name if name.startswith("torch") else name.partition(".")[0])
        if activity is None or activity == log.innermost:
            execute(self, module)
        else:
            log.enter(activity)
            try:
                execute(self, module)
            finally:
                log.leave()
        for function, activity in CALLS.get(name, {}).items():
            _record_call(log, module, function, activity)

    importlib.machinery.SourceFileLoader.exec_module = recorded


def _record_call(log: Log, module, name: str, activity: str) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = getattr(module, owner_name) if owner_name else module
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def recorded(*args, **kwargs):
        log.enter(activity)
        try:
            return function(*args, **kwargs)
        finally:
            log.leave()
            if activity == "first step":
                log.write()

    setattr(owner, attribute, recorded)


def _write_before_exec(log: Log) -> None:
    execute = os.execve

    def recorded(path, arguments, environment):
        log.write()
        execute(path, arguments, environment)

    os.execve = recorded


_role_here = _role() if FOLDER else None
if _role_here is not None:
    _log = Log(_role_here)
    _record_imports(_log)
    _write_before_exec(_log)
    atexit.register(_log.write)
