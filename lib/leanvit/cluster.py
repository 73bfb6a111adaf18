"""Runs as tasks of a Ray cluster: `leanvit run --tier paper --cluster auto|ADDRESS`.

The repository lies in a folder that all nodes see under the same path; there results, logs and checkpoints are written.
Ray gives each run GPUs of its own (CUDA_VISIBLE_DEVICES) and starts it again on another node when its node or worker
dies; it then goes on from its last checkpoint. Ray is imported here alone, and only when a cluster is asked for.
"""

import contextlib
import hashlib
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import filelock

from leanvit import params, pool, record
from leanvit.pool import Job, Local

RETRIES = 3
LOCK_TIMEOUT_S = 180.0  # file servers keep the lock of a dead node for a while: NFSv4 90 s
VISIBLE_TIMEOUT_S = 60.0  # and show a new file late to other nodes


class WorkerDied(RuntimeError):
    """The process of a run was killed from outside; Ray starts the run again."""


def resources(job: Job, nodes: list[dict[str, float]]) -> tuple[int, int]:
    """(CPUs, GPUs) of a run on nodes with these {"CPU": …, "GPU": …}.

    One GPU for each process (parameter `processes`) where the cluster has any, with its share of the node's CPUs, but a
    CPU for each image loader (`workers`); without GPUs two CPUs for each process, as far as the largest node goes.
    params.ParameterError when no node has that many.
    """
    processes = job.parameters.get("processes") or 1
    asked = processes + (job.parameters.get("workers") or 0)
    if any(node.get("GPU") for node in nodes):
        fitting = [node for node in nodes if node.get("GPU", 0) >= processes]
        if not fitting:
            most = max(int(node.get("GPU", 0)) for node in nodes)
            raise params.ParameterError(f"{job.label}: needs {processes} GPUs; no node of the cluster has over {most}")
        share = min(int(node["CPU"] // node["GPU"]) for node in fitting) * processes
        return max(1, share, min(asked, int(min(node["CPU"] for node in fitting)))), processes
    largest = max(int(node.get("CPU", 0)) for node in nodes)
    if processes > largest:
        raise params.ParameterError(f"{job.label}: needs {processes} CPUs; no node of the cluster has over {largest}")
    return max(1, min(max(2 * processes, asked), largest)), 0


class Cluster:
    """A connection to a running Ray cluster; `launch` starts a run as pool.execute wants it."""

    def __init__(self, root: Path, address: str):
        """params.ParameterError without Ray, when nothing answers at the address, or a node does not see `root`."""
        try:
            import ray
        except ImportError:
            hint = "pip install 'leanvit[cluster]'; without --cluster runs go through the pool of this machine"
            raise params.ParameterError(f"--cluster needs Ray, which is not installed: {hint}") from None
        self.ray = ray
        handler = signal.getsignal(signal.SIGTERM)
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdigit():  # Ray itself waits for minutes where nobody listens
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise params.ParameterError(
                f"--cluster {address}: no Ray cluster answers ({_last_line(error)}); start one: ray start --head"
            ) from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own in; a polite kill is to stay a Ctrl-C
        self.nodes = [node for node in ray.nodes() if node["Alive"]]
        self._check_nodes(root)

    def _check_nodes(self, root: Path) -> None:
        """Every node must see this checkout: its own id, read there, says so."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        own = record.checkout_id(root)  # made here, if it is not there yet
        probe = self.ray.remote(num_cpus=0, max_retries=0)(_read_checkout)
        tasks = {
            node["NodeManagerAddress"]: probe.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(root)
            for node in self.nodes
        }
        for name, task in tasks.items():
            try:
                good = self.ray.get(task, timeout=120) == own
            except self.ray.exceptions.RayError as error:
                raise params.ParameterError(f"node {name} cannot run leanvit: {_last_line(error)}") from None
            if not good:
                raise params.ParameterError(
                    f"node {name} does not see this checkout; the repository must lie in a shared folder with the same "
                    "path on every node"
                )

    def check(self, jobs: list[Job]) -> None:
        """params.ParameterError, before anything starts, for a run that no node is large enough for."""
        for job in jobs:
            resources(job, [node["Resources"] for node in self.nodes])

    def launch(self, root: Path, job: Job, threads: int) -> "Task":
        """A run as a task; `threads` is that of a local pool, here the CPUs of the task count."""
        cpus, gpus = resources(job, [node["Resources"] for node in self.nodes])
        return Task(self.ray, root, job, cpus, gpus)


class Task:
    """A run on whatever node has room for it."""

    def __init__(self, ray: Any, root: Path, job: Job, cpus: int, gpus: int):
        self.ray, self.root, self.job = ray, root, job
        self.code, self.seconds, self.ended, self.interrupted = None, 0.0, None, False
        work = ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            max_retries=RETRIES,
            retry_exceptions=[WorkerDied],
            scheduling_strategy="SPREAD",
        )(work_off)
        self.task = work.options(name=job.label).remote(root, job, cpus, _digest(root / job.result))

    def poll(self) -> int | None:
        """The exit code, None while it waits or runs, or while its result is not to be seen here yet."""
        if self.interrupted and self.code is None:  # Ray calls it ended before it has saved
            return 130 if _is_free(self.root / self.job.lock) else None
        if self.code is None:
            done, _ = self.ray.wait([self.task], timeout=0)
            if not done:
                return None
            self.ended = time.monotonic()
            try:
                self.code, self.seconds = self.ray.get(self.task)
            except self.ray.exceptions.RayError as error:
                self.code = 1
                with contextlib.suppress(OSError), (self.root / self.job.log).open("a", encoding="utf-8") as log:
                    log.write(f"\nRay: {_last_line(error)}\n")
        waits = self.code == 0 and not (self.root / self.job.result).exists()
        return None if waits and time.monotonic() < self.ended + VISIBLE_TIMEOUT_S else self.code

    def interrupt(self) -> None:
        """Ctrl-C for the kernel on its node: training saves a checkpoint. A run that waits is taken back."""
        self.interrupted = True
        self.ray.cancel(self.task)

    def kill(self) -> None:
        """End the task and its processes now."""
        if self.code is None:
            self.ray.cancel(self.task, force=True)


def work_off(root: Path, job: Job, threads: int, before: str | None) -> tuple[int, float]:
    """A run on this node: (exit code, seconds). `before` is the digest of the result that lay there at submission.

    WorkerDied when its process was killed from outside. KeyboardInterrupt gives it time to save, and goes on.
    """
    if _digest(root / job.result) != before:  # an attempt ended well, but its node died before it could tell
        return 0, 0.0
    began = time.monotonic()
    run = Local(root, job, threads, lock_timeout_s=LOCK_TIMEOUT_S)
    try:
        while run.poll() is None:
            time.sleep(0.2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray cancels again and again while the kernel saves
        run.interrupt()
        deadline = time.monotonic() + pool.SAVE_TIMEOUT_S
        while run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        raise
    finally:
        run.kill()
    if run.poll() < 0:
        raise WorkerDied(f"{job.label}: its process was killed by signal {-run.poll()}")
    return run.poll(), time.monotonic() - began


def _is_free(lock: Path) -> bool:
    lock.parent.mkdir(exist_ok=True)
    try:
        filelock.FileLock(lock).acquire(timeout=0).lock.release()
    except filelock.Timeout:
        return False
    return True


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _read_checkout(root: Path) -> str | None:
    path = root / ".cache" / "checkout_id"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
