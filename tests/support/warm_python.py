"""A Python that starts at once, because it is a fork of one that has imported torch and verl and done nothing else.

Importing verl costs every process 15 seconds of CPU; trainings, torchrun and its ranks are such processes. `start`
gives an executable to use in place of `sys.executable`: it asks a server to fork itself, and the fork runs the program
with the caller's arguments, environment, folder and standard streams. What that starts by `sys.executable` starts so
too. Signals reach the fork and its exit status comes back, so torchrun watches its ranks as ever.

What is different from a real interpreter: modules are loaded already, what they read of the environment when they
were imported is the server's, and interpreter options other than `-u`, `-m` and `-c` go to a real one. So each way
in which users start the package is also tested with a real interpreter.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import types
import warnings
from pathlib import Path

# Nothing is computed while these are imported: threads would not survive a fork, and locks that they held would stay.
PRELOAD = (
    "torch.distributed.run",
    "verl.trainer.sft_trainer",
    "verl_speculator.engine",
    "verl_speculator.trainer.worker",
)
_HEADER = 8


def start(folder: Path, modules: tuple[str, ...] = PRELOAD) -> tuple[Path, subprocess.Popen[bytes]]:
    """The executable, and the server's process: it ends, with all its forks, when its standard input is closed."""
    address, executable = folder / "socket", folder / "python"
    client = [sys.executable, "-IS", str(Path(__file__).with_name("warm_client.py")), sys.executable, str(address)]
    executable.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    executable.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.warm_python", str(address), str(executable), *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # An allocator that pyarrow brings along would start a thread.
        env=dict(os.environ, OMP_NUM_THREADS="1", JE_ARROW_MALLOC_CONF="background_thread:false"),
    )
    assert server.stdout is not None
    if server.stdout.readline() != b"ready\n":
        raise RuntimeError(f"the warm Python did not start: {server.wait()}")
    return executable, server


class _Server:
    """Forks on request, and tells the client how its fork ended."""

    def __init__(self, address: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._wakeup, self._interrupt = socket.socketpair()
        self._interrupt.setblocking(False)
        signal.set_wakeup_fd(self._interrupt.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for file in (self._listener, self._wakeup, sys.stdin):
            self._selector.register(file, selectors.EVENT_READ)
        self._clients: dict[socket.socket, int] = {}  # the process of each

    def serve(self) -> dict | None:
        """In a fork, what it is asked to run; None in the server itself, when it is to end."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin:
                    for process in self._clients.values():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(process, signal.SIGKILL)
                    return None
                if key.fileobj is self._wakeup:
                    self._wakeup.recv(4096)
                    self._reap()
                elif key.fileobj is self._listener:
                    if (request := self._fork(self._listener.accept()[0])) is not None:
                        return request
                elif key.fileobj in self._clients:
                    # A client says nothing more: it was killed, and its fork has to follow.
                    process = self._clients[key.fileobj]
                    self._forget(key.fileobj)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)

    def _fork(self, client: socket.socket) -> dict | None:
        header, streams, _, _ = socket.recv_fds(client, _HEADER, 3)
        size, message = int.from_bytes(header), b""
        while len(message) < size and (part := client.recv(size - len(message))):
            message += part
        if not header or len(message) < size:
            # Killed before it had said what it wants.
            for stream in streams:
                os.close(stream)
            client.close()
            return None
        process = os.fork()
        if process == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            for file in (client, self._listener, self._wakeup, self._interrupt, *self._clients):
                file.close()
            self._selector.close()
            return json.loads(message)
        for stream in streams:
            os.close(stream)
        # To one that was killed meanwhile it cannot be said; its connection then ends, and its fork with it.
        with contextlib.suppress(OSError):
            client.sendall(process.to_bytes(_HEADER))
        self._clients[client] = process
        self._selector.register(client, selectors.EVENT_READ)
        return None

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                for client in [client for client, process in self._clients.items() if process == ended[0]]:
                    with contextlib.suppress(OSError):
                        client.sendall(ended[1].to_bytes(_HEADER))
                    self._forget(client)

    def _forget(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        del self._clients[client]
        client.close()


def run(request: dict, executable: str) -> None:
    """What an interpreter does with its arguments, in a process that is one already."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.executable = executable
    warnings._processoptions(filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")))  # type: ignore[attr-defined]
    # Forks would draw the same numbers, where processes of their own do not.
    for module in ("random", "numpy.random"):
        if module in sys.modules:
            sys.modules[module].seed()
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [*path, *(entry for entry in sys.path[1:] if entry not in path)]
    if request["unbuffered"]:
        sys.stdout.reconfigure(write_through=True)
    kind, program, arguments = request["kind"], request["program"], request["arguments"]
    sys.argv = [program, *arguments]
    if kind == "module":
        sys.path.insert(0, os.getcwd())
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif kind == "file":
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")
    else:
        sys.argv[0] = "-c"
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    for name in sys.argv[3:]:
        importlib.import_module(name)
    # The forks share the server's memory as long as nobody writes to it, and the collector does.
    gc.collect()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        sys.exit(f"importing {', '.join(sys.argv[3:])} started {threads - 1} threads, which no fork would have")
    server = _Server(sys.argv[1])
    print("ready", flush=True)
    asked = server.serve()
    if asked is not None:
        run(asked, sys.argv[2])
