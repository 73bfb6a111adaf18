"""One run on several processes: a function that runs on all of them, started from a notebook or by hand.

    history = train.fit(model, train_set, recipe, processes=2)
    plan = several.run(uvc.search, model, batches, 0.5, steps=600, processes=2)

`run` starts fresh Pythons through torch's elastic launcher, joined by gloo on CPUs and by nccl on GPUs, one GPU a
process. Function and arguments travel by value, those defined in a notebook, too, and so do torch's, NumPy's and
Python's random states of the CPU. What comes back is the first process's result, and what became of the modules among
the arguments. Nothing else does: a list that the function appends to, or a global that it sets, stays in the workers.

By hand, in a shell, the same job; with torchrun's `--nnodes` on several machines, too:

    several.write("job.pt", train.fit, model, train_set, recipe)    # Python
    torchrun --nproc-per-node 2 -m leanvit.several job.pt           # shell; writes job.pt.result
    history = several.read("job.pt", model)                         # Python; the model is the trained one

Job and result are pickles and may hold code: open your own alone. A script of yours that calls `train.fit`,
`uvc.search` or `comcat.search` works under torchrun as it is.

Batches are those of one process: `fit` and the searches give each process its part, `share` does it in a loop of your
own, so that N processes get what one gets, up to rounding; in `fit`, torch's BatchNorm layers see the images of all.
What differs: random numbers within a step are each process's own.
"""

import atexit
import contextlib
import functools
import gc
import io
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanvit import atomic, orphans
from leanvit.evaluate import device_of
from leanvit.surgery import is_whole

# ---- within a group of processes -----------------------------------------------------------------------------------


def inside() -> bool:
    """Is this one of several processes already, of torchrun or of a group that the caller made?"""
    return dist.is_available() and (dist.is_initialized() or dist.is_torchelastic_launched())


def world() -> int:
    """The number of processes that train together; joins those that torchrun started with this one."""
    if not inside():
        return 1
    if not dist.is_initialized() and int(os.environ["WORLD_SIZE"]) > 1:
        _join()
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0; the first one should write what is written once."""
    return dist.get_rank() if world() > 1 else 0


def on_gpus() -> bool:
    """Do processes work on GPUs? Where there are any, unless ACCELERATE_USE_CPU says no."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "0").lower() in ("", "0", "false", "no")


def _join() -> None:
    if on_gpus():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus() else "gloo")
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def share(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """This process's part of images and labels `(B, ...)` that all processes have: `(B / processes, ...)`.

    Raises `ValueError` when B is no multiple of the processes: the mean of their means would be no mean of the batch.
    """
    n = world()
    if len(images) % n:
        raise ValueError(
            f"a batch of {len(images)} images cannot be divided among {n} processes; make it a multiple of {n}, and "
            "leave a smaller last one out (drop_last=True)"
        )
    return (images, labels) if n == 1 else (images[rank() :: n], labels[rank() :: n])


def average_(tensors: list[Tensor], device: torch.device) -> None:
    """The mean of `tensors` (any shapes) over all processes, in place; they meet on `device`, wherever each one is."""
    if world() > 1 and tensors:
        exact = any(t.dtype == torch.float64 for t in tensors)
        flat = torch.cat([t.reshape(-1).to(device, torch.float64 if exact else torch.float32) for t in tensors])
        dist.all_reduce(flat)
        _unflatten_(flat / world(), tensors)


@contextlib.contextmanager
def batch_norms_of_all(model: nn.Module) -> Iterator[None]:
    """Meanwhile torch's BatchNorm layers in train mode normalise by the images of all processes, as one process would;
    each process must have equally many. (torch's SyncBatchNorm does so on GPUs alone.)
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    norms = [m for m in model.modules() if type(m) in kinds and "forward" not in m.__dict__] if world() > 1 else []
    try:
        for norm in norms:
            norm.forward = functools.partial(_batch_norm, norm)
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)


def _batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """BatchNorm of `x (B, C, ...)`, part of a batch."""
    if not norm.training:
        return type(norm).forward(norm, x)
    norm._check_input_dim(x)
    over, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = _mean_of_all(wide.mean(over))
    centred = wide - mean.view(shape)
    variance = _mean_of_all(centred.square().mean(over))
    if norm.running_mean is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            momentum = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
            n = x.numel() // x.shape[1] * world()
            norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
            norm.running_var.lerp_((variance * n / (n - 1)).to(norm.running_var), momentum)
    y = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.weight is not None:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y.to(x.dtype)


def _mean_of_all(x: Tensor) -> Tensor:
    """The mean over the processes; gradients go to all of them."""
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x.contiguous()) / world()


def agree_(tensors: list[Tensor], device: torch.device) -> None:
    """The first process's values of `tensors` (any shapes) on all processes, in place."""
    if world() > 1 and tensors:
        flat = torch.cat([t.detach().reshape(-1).to(device, torch.float64) for t in tensors])
        dist.broadcast(flat, 0)
        _unflatten_(flat, tensors)


def _unflatten_(flat: Tensor, tensors: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def agree_on_weights_(model: nn.Module) -> None:
    """The first process's floating-point parameters and buffers on all processes, in place."""
    weights = [t for t in model.state_dict().values() if isinstance(t, Tensor) and t.is_floating_point()]
    agree_(weights, device_of(model))


# ---- the caller ----------------------------------------------------------------------------------------------------


def check(processes: int) -> None:
    """Raises `ValueError` for a number of processes that cannot be started here, and now."""
    if not is_whole(processes):
        raise ValueError(f"processes={processes!r} must be a whole number of at least 1")
    if inside() and processes not in (1, world()):
        raise ValueError(
            f"processes={processes} asked for inside a group of {world()}; ask for {world()}, or for 1, which takes "
            "the group as it is"
        )
    gpus = torch.cuda.device_count() if on_gpus() else processes
    if processes > gpus and not inside():
        raise ValueError(
            f"processes={processes} need a GPU each, and there are {gpus}; ask for {gpus} at most, or set "
            "ACCELERATE_USE_CPU=1 to train on the CPU"
        )


def run(function: Callable, *args, processes: int = 1, **kwargs):
    """`function(*args, **kwargs)` on `processes` processes of this machine at once; returns the first one's result.

    With 1, or inside such a group already, it is a plain call. The processors are divided: each process gets its part
    of this one's torch threads. Modules among `args` and `kwargs` come back as the first process left them, on its
    device: the same parameters with new values, or, where their layers were replaced, with those layers.

    An exception of a process is raised here, with its own traceback as a note. At Ctrl-C every process gets one, and
    has half a minute to save. Raises `ValueError` for a number that cannot be (see `check`), `TypeError` for arguments
    that cannot travel, `RuntimeError` for a process that died without a word.
    """
    check(processes)
    if processes == 1 or inside():
        return function(*args, **kwargs)
    with tempfile.TemporaryDirectory(prefix="leanvit-") as folder:
        job = Path(folder) / "job.pt"
        write(job, function, *args, **kwargs)
        _launch(job, processes)
        return read(job, *_modules(args, kwargs))


def write(job: str | Path, function: Callable, *args, **kwargs) -> None:
    """Write `function(*args, **kwargs)` to the file `job`, for `torchrun -m leanvit.several`.

    Raises `TypeError` when something of it cannot be pickled.
    """
    import cloudpickle

    told = {"call": (function, args, kwargs), "random": _random_state()}
    try:
        torch.save(told, job, pickle_module=cloudpickle)
    except Exception as error:
        Path(job).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(f"{name} cannot run in other processes, its arguments cannot be pickled: {error}") from error


def read(job: str | Path, *modules: nn.Module):
    """The result of a finished job; `modules`, those among its arguments in their order, become what they became there.

    The random states of this process become the first process's. Raises `FileNotFoundError` when the job is not
    finished, `ValueError` for another number of modules than the job had (none at all is allowed).
    """
    path = _result(job)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run the job first, torchrun -m leanvit.several {job}")
    found = torch.load(path, map_location=None if torch.cuda.is_available() else "cpu", weights_only=False)
    if modules and len(modules) != len(found["modules"]):
        raise ValueError(f"{job} was given {len(found['modules'])} modules; here are {len(modules)}")
    for ours, theirs in zip(modules, found["modules"], strict=bool(modules)):
        _take_over(ours, theirs)
    _set_random_state(found["random"])
    return found["value"]


def _result(job: str | Path) -> Path:
    return Path(f"{job}.result")


def _modules(args: tuple, kwargs: dict) -> list[nn.Module]:
    return [a for a in (*args, *kwargs.values()) if isinstance(a, nn.Module)]


def _take_over(ours: nn.Module, theirs: nn.Module) -> None:
    """`ours` becomes `theirs`, with its own parameters where the layers are still the same."""
    if _outline(ours) != _outline(theirs):
        ours.__dict__ = theirs.__dict__
        return
    ours.to(device_of(theirs))
    with torch.no_grad():
        for old, new in zip(_tensors(ours), _tensors(theirs), strict=True):
            old.copy_(new).requires_grad_(new.requires_grad)
    for old, new in zip(ours.modules(), theirs.modules(), strict=True):
        old.training = new.training


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _outline(model: nn.Module) -> list[tuple]:
    layers = [(name, type(module).__qualname__) for name, module in model.named_modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return layers + [(name, t.shape, t.dtype) for name, t in tensors]


def _random_state() -> tuple:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_state(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2].cpu())


# ---- starting and ending processes ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _caller_restored() -> Iterator[None]:
    """The launcher changes signal handlers and the environment, which the workers inherit."""
    environment = dict(os.environ)
    names = [n for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, n)]
    handlers = {n: signal.getsignal(getattr(signal, n)) for n in names}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if threading.current_thread() is threading.main_thread():
            for name, handler in handlers.items():
                signal.signal(getattr(signal, name), handler)


def _launch(job: Path, processes: int) -> None:
    """Run a job on this machine; raises the first error of a process."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs = DefaultLogsSpecs(log_dir=str(job.parent / "logs"))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, logs_specs=logs, local_addr="localhost",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=uuid.uuid4().hex,  # port 0: any that is free
    )  # fmt: skip
    try:
        with _caller_restored():
            os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a warning for each model that uses all parameters
            os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
            elastic_launch(config, sys.executable)("-m", "leanvit.several", str(job), "--quiet")
    except SignalException as stop:
        if stop.sigval != signal.SIGINT:
            signal.raise_signal(stop.sigval)
        error = _first_error(job)
        raise (error if isinstance(error, KeyboardInterrupt) else KeyboardInterrupt()) from None
    except ChildFailedError as failed:
        raise _silent_end(job, failed.failures) or _first_error(job) or RuntimeError("all processes ended") from None
    finally:
        _end_workers(job)


def _end_workers(job: Path) -> None:
    """Kill what a second Ctrl-C left behind."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if str(job) in process.cmdline():
                process.kill()
                process.wait(10)


def _silent_end(job: Path, failures: dict) -> RuntimeError | None:
    """A process that died without an error: then the others have one about its absence."""
    for at, failure in failures.items():
        code = failure.exitcode
        if code != -signal.SIGTERM and not _error_file(job, at).exists():  # SIGTERM is the launcher's, for the others
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return RuntimeError(f"process {at} {how}, without an error (out of memory?)")
    return None


def _error_file(job: Path, at: int | str) -> Path:
    return job.with_name(f"{job.name}.error{at}")


def _first_error(job: Path) -> BaseException | None:
    """The error of the process that failed first: the others' are mostly about its absence."""
    files = sorted(job.parent.glob(_error_file(job, "*").name), key=lambda file: file.stat().st_mtime_ns)
    return pickle.loads(files[0].read_bytes()) if files else None


# ---- a worker ------------------------------------------------------------------------------------------------------


def main(job: str, quiet: bool = False) -> None:
    """One process of a job: torchrun starts it, `--quiet` leaves the telling of errors to `run`."""
    orphans.end_with(os.getppid())  # the launcher; with our image loaders
    _result(job).unlink(missing_ok=True)
    try:
        world()  # joins
        told = torch.load(job, map_location=_own_device, mmap=True, weights_only=False)
        function, args, kwargs = told["call"]
        _set_random_state(told["random"])
        value = function(*args, **kwargs)
        if rank() == 0:
            _write_result(job, value, _modules(args, kwargs))
        _leave()
    except BaseException as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if quiet:
            _tell(Path(job), error)
        else:
            traceback.print_exception(error)
        _end(130 if isinstance(error, KeyboardInterrupt) else 1)  # the others may be gone: no goodbye
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for file in [o for o in gc.get_objects() if isinstance(o, io.IOBase) and not o.closed and o.writable()]:
        with contextlib.suppress(OSError, ValueError):
            file.flush()
    _end(0)


def _end(code: int) -> None:
    """End here: Python would stop daemon threads wherever they are, and inside of torch's C++ that aborts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _own_device(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
    """What lay on a GPU goes to the GPU of this process."""
    return storage.cuda() if location.startswith("cuda") and torch.cuda.is_available() else storage


def _write_result(job: str, value, modules: list[nn.Module]) -> None:
    import cloudpickle

    told = {"value": value, "modules": modules, "random": _random_state()}
    with atomic.replacing(_result(job)) as new:
        torch.save(told, new, pickle_module=cloudpickle)


def _tell(job: Path, error: BaseException) -> None:
    """Leave the error for `run`; one that cannot be pickled becomes a RuntimeError that names it."""
    import cloudpickle

    at = int(os.environ.get("RANK", 0))
    text = "".join(traceback.format_exception(error))
    try:
        error.add_note(f"In process {at} of {os.environ.get('WORLD_SIZE', 1)}:\n{text}")
        told = cloudpickle.dumps(error)
        pickle.loads(told)
    except Exception:
        told = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    with atomic.replacing(_error_file(job, at)) as new:
        new.write_bytes(told)


if __name__ == "__main__":
    if sys.argv[2:] not in ([], ["--quiet"]) or len(sys.argv) < 2:
        sys.exit("usage: torchrun --nproc-per-node N -m leanvit.several JOB")
    main(sys.argv[1], "--quiet" in sys.argv)
