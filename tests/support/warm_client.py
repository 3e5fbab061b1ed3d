"""The executable of `warm_python`: asks the server for a fork, hands signals on to it, and ends as it does.

usage: warm_client.py REAL_PYTHON SOCKET PYTHON_ARGUMENT...
"""

import json
import os
import signal
import socket
import sys

_HEADER = 8


def main() -> None:
    python, address, *arguments = sys.argv[1:]
    given = list(arguments)
    unbuffered = given[:1] == ["-u"]
    if unbuffered:
        given.pop(0)
    kind = {"-m": "module", "-c": "text"}.get(given[0], "file") if given else ""
    if kind in ("module", "text"):
        given.pop(0)
    if not given or (kind == "file" and given[0].startswith("-")):
        os.execv(python, [python, *arguments])
    request = {
        "kind": kind,
        "program": given[0],
        "arguments": given[1:],
        "unbuffered": unbuffered,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }
    message = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [len(message).to_bytes(_HEADER, "big")], [0, 1, 2])
        server.sendall(message)
        process = int.from_bytes(server.recv(_HEADER), "big")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: os.kill(process, number))
        answer = server.recv(_HEADER)
    if not answer:
        os._exit(1)  # the server ended before the fork did
    status = int.from_bytes(answer, "big")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
