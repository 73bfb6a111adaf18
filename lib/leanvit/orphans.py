"""No orphans: a process ends when the one that started it is gone, kill -9 included."""

import contextlib
import os
import threading
import time


def end_with(parent: int) -> None:
    """From now on, end this process and all that it started within a second after the process `parent`, which
    must be the one that started this one, is gone.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    import psutil

    # on Windows a virtual environment's python starts a second one, so that our parent is not the one that started it
    while psutil.pid_exists(parent) and (os.name == "nt" or os.getppid() == parent):
        time.sleep(0.5)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(1)
