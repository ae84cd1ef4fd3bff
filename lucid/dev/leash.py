"""Runs a program that must not outlive its parent: `python leash.py PARENT_PID PROGRAM ARGUMENT...`

On Linux the kernel ends it (prctl(2), PR_SET_PDEATHSIG, which survives exec): this process becomes the
program, so that its id is the program's. Elsewhere it stays in front of the program and watches the parent.
Must be started from the parent's main thread: to the kernel the parent is the thread that started it. Uses
nothing but the standard library and imports little: it starts in some 20 ms.
"""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.25


def become(parent: int, command: list[str]) -> None:
    """Linux: replaces this process. Exits with 1 if the parent is dead already."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # It died before the signal was asked for.
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606  the whole purpose


def watch(parent: int, command: list[str]) -> int:
    """Anywhere: starts the program, ends it when asked to or when the parent is gone; returns its status."""
    import subprocess
    import time

    child = subprocess.Popen(command, close_fds=False)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while child.poll() is None:
        if os.getppid() != parent:
            child.terminate()
            parent = os.getppid()
        time.sleep(_LOOK_SECONDS)
    return child.returncode


if __name__ == "__main__":
    if sys.platform == "linux":
        become(int(sys.argv[1]), sys.argv[2:])
    else:
        sys.exit(watch(int(sys.argv[1]), sys.argv[2:]))
