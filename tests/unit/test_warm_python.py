"""The executable that integration tests start processes with: what runs in it is as in a Python of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.warm_python import start

SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Iterator[str]:
    executable, server = start(tmp_path_factory.mktemp("warm"), ("tests.support.warm_client",))
    yield str(executable)
    server.communicate()


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_it_is_loaded_before_it_starts(python) -> None:
    code = "import sys; print('tests.support.warm_client' in sys.modules)"
    assert run(python, "-c", code).stdout == "True\n"
    assert run(sys.executable, "-c", code).stdout == "False\n"


@pytest.mark.parametrize("kind", ["file", "module", "text"])
def test_arguments_folder_environment_and_streams_are_the_callers(python, tmp_path, kind) -> None:
    code = (
        "import os, sys\n"
        "print(__name__, sys.argv, os.getcwd(), os.environ.get('WORD'), 'HOME' in os.environ, sys.stdin.read())\n"
        "print(sys.path[0] or os.getcwd(), file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    (tmp_path / "program.py").write_text(code)
    program = {"file": ["program.py"], "module": ["-m", "program"], "text": ["-c", code]}[kind]
    environment = {"WORD": "here", "PATH": os.environ["PATH"]}
    warm, real = (
        run(interpreter, "-u", *program, "a", "-b", cwd=tmp_path, env=environment, input="said")
        for interpreter in (python, sys.executable)
    )
    assert warm.returncode == real.returncode == 3
    assert warm.stderr == real.stderr == f"{tmp_path}\n"
    # runpy puts the whole path of a module into the arguments only where it starts the interpreter.
    assert warm.stdout.replace("['program'", f"[{str(tmp_path / 'program.py')!r}") == real.stdout


def test_what_it_starts_is_as_fast(python) -> None:
    code = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    inner = "import sys; sys.exit(7 if 'tests.support.warm_client' in sys.modules else 8)"
    assert run(python, "-c", code, inner).stdout == "7\n"


def test_forks_draw_different_random_numbers(python) -> None:
    code = "import random; print(random.random())"
    assert run(python, "-c", code).stdout != run(python, "-c", code).stdout


def test_an_error_is_a_traceback_and_status_1(python) -> None:
    result = run(python, "-c", "1 / 0")
    assert result.returncode == 1
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_other_options_go_to_a_real_interpreter(python) -> None:
    assert run(python, "-V").stdout == run(sys.executable, "-V").stdout


def test_it_ends_by_the_signal_that_ends_the_fork(python) -> None:
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM):
        assert run(python, "-c", f"import os; os.kill(os.getpid(), {number})").returncode == -number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_the_fork(python, number) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("a shell's command in the background ignores it, and so do the processes it starts")
    with subprocess.Popen(
        [python, "-c", SLEEP], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as caller:
        assert caller.stdout is not None
        fork = int(caller.stdout.readline())
        caller.send_signal(number)
        assert caller.wait(timeout=30) == -number
        # Whoever reads what the fork writes comes to its end.
        assert caller.stdout.read() == ""
    wait_for_end(fork)


def test_a_caller_that_is_killed_at_any_moment_leaves_the_server_alive(python) -> None:
    for moment in range(30):
        with subprocess.Popen([python, "-c", SLEEP], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as caller:
            time.sleep(moment * 2e-3)
            caller.kill()
    assert run(python, "-c", "print('alive')").stdout == "alive\n"


def test_no_fork_outlives_the_server(tmp_path: Path) -> None:
    executable, server = start(tmp_path, ("json",))
    with subprocess.Popen([str(executable), "-c", SLEEP], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        fork = int(caller.stdout.readline())
        server.communicate()
        assert caller.wait(timeout=30) == 1
    wait_for_end(fork)


def wait_for_end(process: int) -> None:
    """Its files are closed a moment before it has ended."""
    for _ in range(300):
        try:
            if "\nState:\tZ" in Path(f"/proc/{process}/status").read_text():
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.1)
    pytest.fail(f"process {process} is still there")
