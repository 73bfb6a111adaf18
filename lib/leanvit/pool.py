"""The pool: a process for each run, several at once; what is interrupted can go on, what fails is told.

The runner sees a run as something with poll(), interrupt(), kill() and the seconds it took: a process of this machine,
or a task of a cluster (cluster.py). Exit codes are trusted, never the metadata of a
notebook; a run that ended well has put its result in place as its last act (worker.py).
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from leanvit import atomic, record

CELL_TIMEOUT_S = {"smoke": 300, "embedded": 3600}  # elsewhere a cell may take days
LOCK_TIMEOUT_S = 10.0  # time for the orphans of a killed runner to go
SAVE_TIMEOUT_S = 30  # for a checkpoint after Ctrl-C
NOISE = re.compile("Executing Cell|Ending Cell|Executing notebook|TCP without encryption")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Job:
    """One run: a notebook with all its parameters, and the result it leads to (a path relative to the root)."""

    notebook: str
    tier: str
    params_file: str
    overrides: dict[str, Any]
    parameters: dict[str, Any]
    result: Path

    @property
    def name(self) -> str:
        """The name of the run within its tier."""
        return self.result.stem

    @property
    def label(self) -> str:
        """How the run is called in messages."""
        return f"{self.result.parent.name}/{self.name}"

    @property
    def log(self) -> Path:
        """What the run says while it runs; removed when it ends well."""
        return self.result.with_suffix(".log")

    @property
    def checkpoints(self) -> Path:
        """The folder from which the run goes on after an interruption; removed when it ends well."""
        return self.result.parent / "checkpoints" / self.name

    @property
    def lock(self) -> Path:
        """Held while a process executes the run."""
        return Path(".cache", f"{self.label.replace('/', '-')}.lock")

    @property
    def failed(self) -> Path:
        """The notebook that a failed run leaves."""
        return self.result.with_suffix(".failed.ipynb")


class Local:
    """A run as a process of this machine, in a session of its own, with so many `threads`; `seconds` is its time.

    Raises `OSError` when it cannot be started, or its log cannot be written.
    """

    def __init__(self, root: Path, job: Job, threads: int, lock_timeout_s: float = LOCK_TIMEOUT_S):
        self.began, self.seconds = time.monotonic(), 0.0
        log = root / job.log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "leanvit.worker"],
                cwd=root,
                env=_environment(job, threads),
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C is for the runner alone; stop() tells the kernel
            )
        request = {
            "notebook": f"notebooks/{job.notebook}.ipynb",
            "result": job.result.as_posix(),
            "parameters": job.parameters,
            "cell_timeout_s": CELL_TIMEOUT_S.get(job.tier),
            "lock": job.lock.as_posix(),
            "lock_timeout_s": lock_timeout_s,
            "parent": os.getpid(),
        }
        with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code tells
            self.process.stdin.write(json.dumps(request))
            self.process.stdin.close()

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        code = self.process.poll()
        self.seconds = time.monotonic() - self.began if code is None or not self.seconds else self.seconds
        return code

    def interrupt(self) -> None:
        """Ctrl-C for the kernel: training saves a checkpoint, the notebook stops."""
        import psutil

        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children()
            if not children or os.name != "posix":  # no kernel yet, or no way to tell it
                return self.kill()
            for child in children:
                child.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End the process and its kernel now."""
        import psutil

        if self.process.poll() is not None:
            return
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for child in family:
                with contextlib.suppress(psutil.Error):
                    child.kill()
        self.process.wait()


def _environment(job: Job, threads: int) -> dict[str, str]:
    ours = {
        "LEANVIT_RESULT": job.result.as_posix(),
        "LEANVIT_TIER": job.tier,
        "LEANVIT_PARAMS": job.params_file,
        "LEANVIT_OVERRIDES": json.dumps(job.overrides),
        "OMP_NUM_THREADS": str(threads),
        "TQDM_DISABLE": "1",
        "PYTHONHASHSEED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    # without MPLBACKEND the kernel's inline backend draws into the notebook
    return {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | ours


@dataclass
class Outcome:
    """How a job ended: "done", "up to date" or "failed", after how many `seconds`."""

    job: Job
    status: str
    seconds: float = 0.0


def execute(
    root: Path,
    jobs: list[tuple[Job, str]],
    *,
    at_once: int,
    threads: int,
    launch: Callable = Local,
    after: Callable[[], Any] = lambda: None,
) -> list[Outcome]:
    """Run each job (given with the reason why), a line for each start and finish; `after()` follows each finish.

    Several at once begin in the order of `balanced`. Jobs whose notebook has the metadata {"leanvit": {"alone": true}}
    (they measure time) run last, one at a time, with the threads of all.
    `KeyboardInterrupt` stops what runs, with time to save, and goes on to the caller.
    """
    alone = {job.result: _alone(root, job) for job, _ in jobs}
    together = [item for item in jobs if not alone[item[0].result]]
    waiting = balanced(root, together, at_once) if at_once > 1 else together
    waiting += [item for item in jobs if alone[item[0].result]]
    outcomes, running = [], {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job, why = waiting[0]
                if running and (alone[job.result] or any(alone[result] for result in running)):
                    break
                waiting.pop(0)
                _say(f"> {job.label}: started ({why})")
                try:
                    own = threads * at_once if alone[job.result] else threads
                    running[job.result] = (job, launch(root, job, own), time.monotonic())
                except OSError as error:  # disk full, no process left: the others go on
                    _say(f"x {job.label}: cannot start: {error}")
                    outcomes.append(Outcome(job, "failed"))
            for job, process, _ in list(running.values()):
                if (code := process.poll()) is not None:
                    outcomes.append(_finish(root, job, code, process.seconds))
                    del running[job.result]
                    after()
            _show_progress(root, running)
            time.sleep(0.1)
    except KeyboardInterrupt:
        _stop(root, running)
        raise
    return outcomes


def balanced(root: Path, jobs: list[tuple[Job, str]], at_once: int) -> list[tuple[Job, str]]:
    """The order in which a first page is there soon and the last one, too: of all orders the one with the smallest sum
    of the two times, by the seconds of the results that stand; of more than eight jobs the slowest first.
    """
    known = [found["seconds"] if (found := record.read(root / job.result)) else None for job, _ in jobs]
    slow = max((t for t in known if isinstance(t, int | float)), default=1.0)  # what is not known counts as slow
    times = [t if isinstance(t, int | float) else slow for t in known]

    def both(order: Sequence[int]) -> float:
        free = [0.0] * at_once
        for i in order:
            free[free.index(min(free))] += times[i]
        return max(free) + min(times[i] for i in order[:at_once])

    if len(jobs) > 8:
        return [jobs[i] for i in sorted(range(len(jobs)), key=lambda i: -times[i])]
    return [jobs[i] for i in min(itertools.permutations(range(len(jobs))), key=both)] if jobs else []


def _alone(root: Path, job: Job) -> bool:
    notebook = json.loads((root / "notebooks" / f"{job.notebook}.ipynb").read_text(encoding="utf-8"))
    return bool(notebook["metadata"].get("leanvit", {}).get("alone"))


def _say(text: str) -> None:
    print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)  # over the progress line


def _finish(root: Path, job: Job, code: int, seconds: float) -> Outcome:
    if code == 0 and (root / job.result).exists():
        headline = json.loads((root / job.result).read_text(encoding="utf-8"))["headline"]
        _say(f"  {job.label}: done in {seconds:.0f} s: {headline}")
        tidy(root, job, just_ended=True)
        return Outcome(job, "done", seconds)
    _say(f"x {job.label}: failed after {seconds:.0f} s (exit code {code})\n{why_failed(root, job)}")
    try:
        atomic.check_writable(root / job.result.parent)
    except OSError as error:  # then the log, too, may lack its end
        _say(f"    {job.result.parent.as_posix()}/ cannot be written: {error.strerror or error}")
    return Outcome(job, "failed", seconds)


def tidy(root: Path, job: Job, just_ended: bool = False) -> None:
    """Remove what a run that ended well needs no more, and still has where its runner was killed at the end.

    Unless it has just ended, what is younger than the result belongs to another call of the same run, and stays; so
    does everything while such a call is at work.
    """
    left = [path for path in (root / job.checkpoints, root / job.failed, root / job.log) if path.exists()]
    if not left:
        return
    lock = contextlib.nullcontext() if just_ended else filelock.FileLock(root / job.lock, timeout=0)
    with contextlib.suppress(filelock.Timeout, OSError), lock:
        ended = (root / job.result).stat().st_mtime_ns
        for path in left:
            if just_ended or _youngest(path) <= ended:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _youngest(path: Path) -> int:
    """When a file, or the last of the files below a folder, was written; folders change when they are tidied up."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return max((p.stat().st_mtime_ns for p in files), default=0)


def why_failed(root: Path, job: Job) -> str:
    """The cell that failed and the last lines of its error, from the notebook it left or else from the log."""
    lines = _log_lines(root, job)
    with contextlib.suppress(OSError, ValueError):
        cells = json.loads((root / job.failed).read_text(encoding="utf-8"))["cells"]
        added = {"injected-parameters", "papermill-error-cell-tag"}  # these do not count: they are not in notebooks/
        cells = [cell for cell in cells if not added & set(cell["metadata"].get("tags", []))]
        for number, cell in enumerate(cells, 1):
            for output in cell.get("outputs", []):
                if output["output_type"] == "error":
                    trace = ANSI.sub("", "\n".join(output["traceback"])).splitlines()[-6:]
                    code = "".join(cell["source"]).strip().splitlines()[:2]
                    shown = [f"cell {number}: {' / '.join(code)}", *trace, f"notebook: {job.failed.as_posix()}"]
                    return "\n".join(f"    {line[:300]}" for line in shown)
    cell = _current_cell(lines)
    tail = [line for line in lines if line.strip() and not NOISE.search(line)][-4:]
    return "\n".join(f"    {line[:300]}" for line in ([f"last cell: {cell}"] if cell else []) + tail)


def _log_lines(root: Path, job: Job) -> list[str]:
    log = root / job.log
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []


def _current_cell(lines: list[str]) -> int | None:
    numbers = [match[1] for line in lines if (match := re.match(r"Executing Cell (\d+)", line))]
    return int(numbers[-1]) if numbers else None


def _show_progress(root: Path, running: dict) -> None:
    if not sys.stdout.isatty() or not running:
        return
    texts = []
    for job, _, began in running.values():
        cell = _current_cell(_log_lines(root, job))
        texts.append(f"{job.label} {f'cell {cell}' if cell else 'starting'} {time.monotonic() - began:.0f} s")
    width = shutil.get_terminal_size().columns - 1
    print("\r\033[K" + " | ".join(texts)[:width], end="", flush=True)


def _stop(root: Path, running: dict) -> None:
    _say(f"stopping {len(running)} run(s): training saves a checkpoint, the next call goes on from there")
    for _, process, _ in running.values():
        process.interrupt()
    deadline = time.monotonic() + SAVE_TIMEOUT_S
    try:
        while any(process.poll() is None for _, process, _ in running.values()) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:  # also on a second Ctrl-C
        for job, process, _ in running.values():
            process.kill()
            for left in (job.failed, job.log, job.result.with_suffix(".partial.ipynb")):  # stopped is not failed
                (root / left).unlink(missing_ok=True)
