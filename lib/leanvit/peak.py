"""The memory that one call needs at its peak: what torch allocates during it, above what was there before.

`cost.peak_memory_bytes` is the whole process's, since it began, and cannot tell two methods in one process apart.
"""

import os
from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes that torch's allocator held at once for `call()`, above those held when it began.

    Tensors that were there before (the parameters) are not counted, those that stay afterwards are. On CUDA the
    allocator's own statistics, on the CPU the profiler's record of every allocation.

    >>> import torch
    >>> from leanvit.peak import peak_bytes
    >>> peak_bytes(lambda: torch.ones(1024))  # bytes
    4096
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells stderr when it starts and stops
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
