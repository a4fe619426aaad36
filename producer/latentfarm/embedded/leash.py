"""Start a command that ends when its parent does: `leash.py PARENT_PID COMMAND…`. Standard library only.

On Linux the kernel sends SIGTERM when the parent is gone, even by `kill -9`, and this process becomes the command.
Elsewhere it stays and watches.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1


def main() -> int:
    """Become or watch the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            return 1
        os.execv(command[0], command)
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while child.poll() is None:
        if os.getppid() != parent:
            child.terminate()
        time.sleep(0.2)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
