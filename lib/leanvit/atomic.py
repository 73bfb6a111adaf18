"""Files written whole or not at all: a temporary file beside the target, renamed over it when it is on the disk.

A process that is killed leaves its temporary file. The name holds the number of the process, so that the next one to
write the same target can take it away.
"""

import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Inside the block, write to the path it gives; then that is `path`, or, after any error, gone.

    Raises `OSError` where the folder cannot be made or written; what was there before is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    name = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the umask takes
    try:
        yield name
        with open(name, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _sweep(path: Path) -> None:
    """Remove the temporary files that dead processes left for this target."""
    ours = re.compile(re.escape(f".{path.name}.") + r"(\d+)-\w+\.tmp")
    left = {name: int(match[1]) for name in os.listdir(path.parent) if (match := ours.fullmatch(name))}
    if left:
        import psutil

        for name, process in left.items():
            if not psutil.pid_exists(process):
                (path.parent / name).unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise `OSError` where no file can be written into `folder`, which is made. Nothing is left, whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:  # without a name, where the system can
        probe.write(b"x" * 4096)
        probe.flush()
        os.fsync(probe.fileno())
