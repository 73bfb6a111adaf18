"""Launches `walsh.cu` through CuPy. `walsh.py` imports this module when it meets its first CUDA tensor.

One program is compiled (NVRTC, cached on disk by CuPy) for each set of bases, order, dtype and kernel, because the
bases are constants of the code. Tensors are passed by address, since CuPy knows no bfloat16, and the kernels run on
torch's current stream. `plan` decides on the launches from shapes and strides alone; it needs neither GPU nor CuPy.
"""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("walsh.cu")
SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

MAX_HELD = 36  # coefficients one thread keeps in registers, LP_L1-8 of order 8; more of them are cut in chunks
MAX_THREADS = 128  # of one thread block, as promised to the compiler by __launch_bounds__
ENOUGH_WARPS = 16  # a streaming multiprocessor; with fewer, the rows of a block are split over groups of threads
MAX_GRID = 2**31 - 1


class Launch(NamedTuple):
    """One launch of a kernel of `walsh.cu`."""

    expression: str  # the kernel, as C++ names it
    grid: int
    block: tuple[int, int]
    args: tuple[int, ...]  # address of the input, of the output, then what the kernels call batch_stride .. tiles


@functools.cache
def unavailable() -> str | None:
    """Why the CUDA kernels cannot run here (`None`: they can)."""
    try:
        import cupy

        cupy.cuda.nvrtc.getVersion()
        if not cupy.cuda.runtime.getDeviceCount():
            return "CuPy sees no CUDA device"
        if not include_dirs() and cupy.cuda.get_cuda_path() is None:
            return "no CUDA headers were found: pip install nvidia-cuda-runtime"
    except Exception as error:  # an import or a driver can fail in many ways, and none may stop the torch path
        return f"{type(error).__name__}: {error}"
    return None


def available() -> bool:
    """Whether CuPy can be imported, compile, and see a device."""
    return unavailable() is None


def project(x: Tensor, h: int, w: int, prefix: int, bases: Sequence[int], order: int, reflect: bool) -> Tensor:
    """`(B, prefix + h*w, C) -> (B, prefix + P*R, C)`: `walsh.project` on a float32, float16 or bfloat16 CUDA tensor.

    Raises `TypeError` for another dtype, `ValueError` for another shape.
    """
    rows = prefix + _pieces(h, w, order) * _rank(bases)
    return _run("project", x, prefix + h * w, rows, h, w, prefix, bases, order, reflect)


def expand(z: Tensor, h: int, w: int, prefix: int, bases: Sequence[int], order: int, reflect: bool) -> Tensor:
    """`(B, prefix + P*R, C) -> (B, prefix + h*w, C)`: the adjoint of `project`, on the same tensors.

    Raises `TypeError` for another dtype, `ValueError` for another shape.
    """
    rows = prefix + _pieces(h, w, order) * _rank(bases)
    return _run("fold" if reflect else "expand", z, rows, prefix + h * w, h, w, prefix, bases, order, reflect)


def plan(
    kind: str,
    x: Tensor,
    out: Tensor,
    h: int,
    w: int,
    prefix: int,
    bases: Sequence[int],
    order: int,
    reflect: bool,
    multiprocessors: int,
) -> list[Launch]:
    """The launches of kernel `kind` (project, expand, fold) that fill a contiguous `out (B, M, C)` from `x (B, N, C)`.

    More than one launch is made only where one grid would exceed what CUDA allows. `multiprocessors=0` never splits the
    rows of a block over groups of threads.
    """
    batch, _, channels = x.shape
    vector = 2 if _pairs(x) and _pairs(out) else 1
    lanes = -(-channels // vector)
    pieces = prefix + h * w if kind == "fold" else _pieces(h, w, order)
    chunks = -(-_rank(bases) // MAX_HELD) if kind == "project" else 1
    groups = min(4, order // 2)
    if kind == "fold" or batch * pieces * chunks * -(-lanes // 32) >= ENOUGH_WARPS * multiprocessors:
        groups = 1
    tiles = -(-lanes // (32 if groups > 1 else MAX_THREADS))
    threads = 32 * -(-lanes // (32 * tiles))
    expression = f"fold<{vector}>" if kind == "fold" else f"{kind}<{vector}, {groups}>"
    rest = (*x.stride(), channels, h, w, prefix, int(reflect), tiles)
    blocks = pieces * chunks * tiles
    step = max(1, MAX_GRID // blocks)
    return [
        Launch(
            expression,
            min(step, batch - first) * blocks,
            (threads, groups),
            (x[first:].data_ptr(), out[first:].data_ptr(), *rest),
        )
        for first in range(0, batch, step)
    ]


def options(dtype: torch.dtype, bases: Sequence[int], order: int) -> tuple[str, ...]:
    """The compiler's options for one dtype, set of bases and order."""
    return (
        "-std=c++17",
        f"-DORDER={order}",
        f"-DSCALAR={SCALARS[dtype]}",
        f"-DMAX_HELD={MAX_HELD}",
        "-DBASIS_ROWS=" + ",".join(map(str, bases[0::2])),
        "-DBASIS_COLS=" + ",".join(map(str, bases[1::2])),
        *(f"-I{folder}" for folder in include_dirs()),
    )


@functools.cache
def include_dirs() -> tuple[str, ...]:
    """Where NVIDIA's wheels keep `cuda_fp16.h` and `cuda_bf16.h`; empty without such wheels."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations or () if spec else ()
    return tuple(str(header.parent) for root in roots for header in sorted(Path(root).glob("*/include/cuda_bf16.h")))


def _rank(bases: Sequence[int]) -> int:
    return len(bases) // 2


def _pieces(h: int, w: int, order: int) -> int:
    return -(-h // order) * -(-w // order)


def _pairs(x: Tensor) -> bool:
    """Whether two neighbouring channels can be read as one aligned word."""
    return (
        x.element_size() == 2
        and x.stride(2) == 1
        and x.data_ptr() % 4 == 0
        and not any(size % 2 for size in (x.shape[2], x.stride(0), x.stride(1)))
    )


def _run(kind, x, tokens, out_tokens, h, w, prefix, bases, order, reflect) -> Tensor:
    if x.dtype not in SCALARS:
        raise TypeError(f"the CUDA kernels take float32, float16 or bfloat16, got {x.dtype}; walsh.py has a torch path")
    if x.dim() != 3 or x.shape[1] != tokens:
        raise ValueError(
            f"{kind} of a {h}x{w} grid behind {prefix} prefix tokens, {_rank(bases)} bases of order {order}, needs "
            f"(B, {tokens}, C), got {tuple(x.shape)}"
        )
    if x.stride(1) * max(w, _rank(bases)) >= 2**31:  # the kernels step through a row of tokens with 32 bits
        x = x.contiguous()
    out = x.new_empty(x.shape[0], out_tokens, x.shape[2])
    if not out.numel():
        return out
    import cupy

    device = x.device.index
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    with cupy.cuda.Device(device), _stream(device):
        for launch in plan(kind, x, out, h, w, prefix, bases, order, reflect, multiprocessors):
            kernel = _kernel(device, x.dtype, tuple(bases), order, launch.expression)
            kernel((launch.grid,), launch.block, launch.args)
    return out


def _stream(device: int):
    import cupy

    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device)


@functools.cache
def _kernel(device: int, dtype: torch.dtype, bases: tuple[int, ...], order: int, expression: str):
    import cupy

    module = cupy.RawModule(
        code=SOURCE.read_text(), options=options(dtype, bases, order), name_expressions=(expression,)
    )
    return module.get_function(expression)
