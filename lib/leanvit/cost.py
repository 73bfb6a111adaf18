"""What a model costs: parameters, FLOPs, saved bytes, latency, peak memory; measured, with the convention named.

FLOPs are 2 per multiply-add, counted by `torch.utils.flop_counter` (our ops bring their own formula). Saved bytes are
what autograd keeps for the backward pass, parameters left out, each storage counted once. Times are wall clock; two
things are compared only when they are timed interleaved in one process (`interleaved`).
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leanvit import surgery

try:
    import resource
except ImportError:  # Windows
    resource = None


def parameters(model: nn.Module) -> dict[str, int]:
    """`{"trainable", "total", "bytes"}`: counts, and the bytes that all parameters take.

    >>> from leanvit import cost, models
    >>> cost.parameters(models.create("embedded_vit"))
    {'trainable': 683242, 'total': 683242, 'bytes': 2732968}
    """
    trainable, total = surgery.count(model)
    return {
        "trainable": trainable,
        "total": total,
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def training_flops(model: nn.Module, x: Tensor) -> dict[str, int]:
    """`{"forward", "backward"}` FLOPs of one training step on `x: (B, 3, H, W)`, all products, no optimiser.

    >>> import torch
    >>> from leanvit import cost
    >>> cost.training_flops(torch.nn.Linear(96, 10), torch.rand(4, 96))  # 2 x 4 x 96 x 10; the input needs no gradient
    {'forward': 7680, 'backward': 7680}
    """
    with surgery.undisturbed(model), FlopCounterMode(display=False) as counter:
        loss = model(x).float().sum()
        forward = counter.get_total_flops()
        if loss.requires_grad:
            loss.backward()
    return {"forward": forward, "backward": counter.get_total_flops() - forward}


@dataclass
class Saved:
    """Bytes that autograd keeps; filled when the `with saved(...)` block ends."""

    bytes: int = 0


@contextmanager
def saved(model: nn.Module | None = None) -> Iterator[Saved]:
    """Measure what autograd saves in the block: every storage once, the parameters and buffers of `model` left out.

    >>> import torch
    >>> from leanvit import cost
    >>> x = torch.rand(1000, requires_grad=True)
    >>> with cost.saved() as found:
    ...     y = (x * 2).exp()
    >>> found.bytes  # what exp gave, float32
    4000
    """
    own = set()
    if model is not None:
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    result, keep = Saved(), []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            keep.append(storage)  # an address must not be used again while we count
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield result
    result.bytes = sum(seen.values())


def saved_bytes(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> int:
    """Bytes that one training step of `model` on `x (B, 3, H, W)` keeps for its backward pass; parameters not counted.

    >>> import torch
    >>> from leanvit import baselines, cost, models
    >>> model, x = models.create("embedded_vit"), torch.rand(1, 3, 32, 32)
    >>> whole = cost.saved_bytes(model, x)
    >>> report = baselines.linear_probe(model)
    >>> cost.saved_bytes(model, x) < whole / 50  # the tokens in front of the head
    True
    """
    with surgery.undisturbed(model), saved(model) as result:
        out = model(x)
        value = out.float().sum() if loss is None else loss(out)
    del value
    return result.bytes


def peak_memory_bytes(device: torch.device | str = "cpu") -> int | None:
    """Peak resident memory of this process, or of the CUDA allocator, in bytes; None where the system does not tell.

    >>> from leanvit import cost
    >>> cost.peak_memory_bytes() > 50 * 2**20
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def _preemptions() -> int:
    """How often this process lost its processor so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def interleaved(
    candidates: dict[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] | None = None,
) -> dict[str, dict[str, float]]:
    """Time callables in turn, A B C A B C …, so that a drifting machine touches all alike.

    On the CPU a sample in which this process was pre-empted (`ru_nivcsw` grew) is dropped as long as enough remain; on
    CUDA, events bracket each call. `clock` (seconds, e.g. `time.process_time`) takes the place of both.

    Returns:
        For each name `median_ms`, `p10_ms`, `p90_ms` (wall clock), `samples`, and `ratio_to_first`: the median over
        rounds of (first candidate's time / this one's time), larger is faster.

    Raises `ValueError` without candidates or rounds.

    >>> import time
    >>> from leanvit import cost
    >>> naps = {"long": lambda: time.sleep(0.004), "short": lambda: time.sleep(0.001)}
    >>> found = cost.interleaved(naps, rounds=5)
    >>> found["long"]["median_ms"] > 4, found["short"]["ratio_to_first"] > 1
    (True, True)
    """
    if not candidates or rounds < 1 or warmup < 0:
        told = f"{len(candidates)} candidates, rounds={rounds}, warmup={warmup}"
        raise ValueError(f"interleaved: at least one candidate and one round are needed; got {told}")
    cuda = torch.device(device).type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in candidates}
    clean: dict[str, list[bool]] = {name: [] for name in candidates}
    for round_ in range(warmup + rounds):
        for name, call in candidates.items():
            before = _preemptions()
            ms = _cuda_ms(call) if cuda and clock is None else _ms(call, clock or time.perf_counter)
            if round_ >= warmup:
                times[name].append(ms)
                clean[name].append(_preemptions() == before)
    first = next(iter(candidates))
    return {name: _summary(times[name], clean[name], times[first], clean[first]) for name in candidates}


def _summary(ms: list[float], clean: list[bool], base: list[float], base_clean: list[bool]) -> dict[str, float]:
    enough = max(5, len(ms) // 3)
    own = [t for t, c in zip(ms, clean, strict=True) if c]
    own = own if len(own) >= enough else ms
    pairs = [b / t for t, b, c, d in zip(ms, base, clean, base_clean, strict=True) if c and d]
    pairs = pairs if len(pairs) >= enough else [b / t for t, b in zip(ms, base, strict=True)]
    ordered = sorted(own)
    return {
        "median_ms": statistics.median(own),
        "p10_ms": ordered[int(0.1 * (len(own) - 1))],
        "p90_ms": ordered[int(0.9 * (len(own) - 1))],
        "samples": len(own),
        "ratio_to_first": statistics.median(pairs),
    }


def _ms(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return 1e3 * (clock() - start)


def _cuda_ms(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
