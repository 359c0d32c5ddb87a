"""Makes servers of the tests start sooner. What they run is what anybody's server runs.

A quarter of an import goes to a collector that finds no garbage. And each process of a server would import the same
modules, for ten seconds or more. Here the launcher imports them once, as a program does that starts `sgl.Engine`, and
forks children that wait. When the server wants a process by `spawn`, one of them becomes it: it knows nothing but what
was imported, has the same parent, and is told its file descriptors, environment and folder.
"""

import gc
import json
import os
import socket
import sys
import traceback
from typing import Any, NoReturn

CHILDREN = "LIM_TEST_CHILDREN"
"""How many children the launcher forks; without it none."""
_FIRST_FREE = 1000
_MESSAGE_BYTES = 1 << 20

gc.set_threshold(100_000, 20, 20)


class Child:
    """A process that waits to be what a spawned one would be."""

    def __init__(self, others: "list[Child]") -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if not self.pid:
            for end in (ours, *(other._socket for other in others)):
                end.close()  # what the parent alone holds ends with the parent
            _wait(its)
        its.close()
        self._socket = ours

    def become(self, args: list[str], fds: list[int]) -> int:
        """Let it run `python … -c PROGRAM …` with these file descriptors; returns its process id."""
        told = {"args": args, "fds": fds, "environment": dict(os.environ), "folder": os.getcwd()}
        socket.send_fds(self._socket, [json.dumps(told).encode()], fds)
        self._socket.close()
        return self.pid


def _wait(its: socket.socket) -> NoReturn:
    """Be what is asked for, or end with the parent. Whatever happens, this process never becomes a second launcher."""
    code = 1
    try:
        message, received, _, _ = socket.recv_fds(its, _MESSAGE_BYTES, 64)
        its.close()
        if message:
            _be(json.loads(message), received)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _be(told: dict[str, Any], received: list[int]) -> None:
    """Run the program that was told, as the process that would have been spawned."""
    _place(received, told["fds"])
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(told["folder"])
    sys.argv = told["args"][told["args"].index("-c") :]
    exec(sys.argv.pop(1), {"__name__": "__main__"})


def _place(received: list[int], wanted: list[int]) -> None:
    """Give received file descriptors the numbers that they have in the parent."""
    import fcntl

    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD, _FIRST_FREE) for fd in received]
    for fd in received:
        os.close(fd)
    for fd, number in zip(aside, wanted, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def _fork_children(number: int) -> None:
    """Import what all processes of a server import, fork, and let `multiprocessing` spawn by these children."""
    import multiprocessing.util

    import sglang.srt.entrypoints.http_server  # noqa: F401

    children: list[Child] = []
    for _ in range(number):
        children.append(Child(children))
    spawn = multiprocessing.util.spawnv_passfds

    def become(path: str | bytes, args: list[str | bytes], fds: list[int]) -> int:
        command = [os.fsdecode(arg) for arg in args]
        if children and any("spawn_main" in arg for arg in command):
            return children.pop().become(command, sorted(map(int, fds)))
        return spawn(path, args, fds)

    multiprocessing.util.spawnv_passfds = become


if "sglang.launch_server" in sys.orig_argv[:4] and (number := int(os.environ.get(CHILDREN, "0"))):
    _fork_children(number)
