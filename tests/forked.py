"""New processes in which torch is already imported; importing it takes most of the time of a short process.

A server, which has imported torch and does nothing else, forks for each of them. They differ from other processes in
one way: Linux reports that they were forked, so the kernels do not use OpenMP's threads in them.
"""

import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from types import CodeType
from typing import Any

_REQUEST = 1 << 17  # bytes of a request at most; Linux allows more in one message


class Forked:
    """A process that runs `code` as `python -c` does, in which each operator of torch uses one thread.

    Its methods work as those of subprocess.Popen. A ResourceWarning in it is an error.

    Args:
        code: The code that it runs.
        environment: All of its environment variables. PYTHONPATH comes first in its sys.path.
    """

    def __init__(self, code: str, environment: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self._out, self._err = os.memfd_create("stdout"), os.memfd_create("stderr")
        self._status, status = os.pipe()
        request = json.dumps({"code": code, "environment": dict(environment), "folder": os.getcwd()})
        socket.send_fds(_server(), [request.encode()], [self._out, self._err, status])
        os.close(status)
        self.pid = int(self._line(60))

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it printed to stdout and stderr, once it has ended."""
        self.returncode = int(self._line(timeout))
        os.close(self._status)
        out, err = (_whole(file) for file in (self._out, self._err))
        return out, err

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def _line(self, timeout: float) -> str:
        """The next line of two that the server's child writes: the pid, then the exit status."""
        line, deadline = b"", time.monotonic() + timeout
        while not line.endswith(b"\n"):
            if not select.select([self._status], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            byte = os.read(self._status, 1)
            assert byte, "the server of forked processes has failed"
            line += byte
        return line.decode()


def _whole(file: int) -> str:
    """All that is in a file, which is then closed."""
    os.lseek(file, 0, os.SEEK_SET)
    with os.fdopen(file) as text:
        return text.read()


@functools.cache
def _server() -> socket.socket:
    """A connection to the server, which ends when this process ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return ours


def _serve(requests: socket.socket) -> CodeType:
    """Fork for each request; return in the child, with the code that it is to run."""
    import torch  # noqa: F401

    gc.freeze()  # or a child that collects garbage when it ends would copy this memory
    while True:
        message, files, *_ = socket.recv_fds(requests, _REQUEST, 3)
        if not message:
            requests.close()
            sys.exit()
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    requests.close()
    _become(json.loads(message), *files)
    return compile(json.loads(message)["code"], "<string>", "exec")


def _become(request: dict[str, Any], out: int, err: int, status: int) -> None:
    """Fork again: the parent reports the pid and exit status of the child, which becomes the requested process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child != 0:
        os.write(status, f"{child}\n".encode())
        os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        os._exit(0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for file in (out, err, status):
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[:] = ["-c"]
    sys.path[:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the direct children
    exec(_serve(socket.socket(fileno=int(sys.argv[1]))), {"__name__": "__main__"})
