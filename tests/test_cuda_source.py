"""walsh.cu and its launcher without a GPU: compiled by NVRTC, and run on the CPU by the host shim (tests/shim).

The oracle is an explicit dense matrix in float64, built from the definitions: Walsh rows are Hadamard rows sorted by their
sign changes, and padding is written out position by position.
"""

import itertools
from pathlib import Path

import pytest
import torch

from leanvit.kernels import cuda

SHIM = Path(__file__).parent / "shim"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triangle(order: int, k: int) -> list[int]:
    return [i for r in range(order) for c in range(order) if r + c < k for i in (r, c)]


def scattered(order: int) -> list[int]:
    """Like a set found from data: no order, no symmetry, the highest sequencies among them."""
    n = order - 1
    return [0, 0, n, 1, 2, 3, 1, n, 3, 0, n, n, 0, 2]


SETS = {
    "DC": lambda n: [0, 0],
    "LP_L1-2": lambda n: triangle(n, 2),
    "LP_L1-4": lambda n: triangle(n, 4),
    "LP_L1-6": lambda n: triangle(n, 6),
    "LP_L1-8": lambda n: triangle(n, 8),
    "scattered": scattered,
    "full": lambda n: [i for r in range(min(n, 8)) for c in range(min(n, 8)) for i in (r, c)],
}


def dense(h: int, w: int, prefix: int, bases: list[int], order: int, reflect: bool) -> torch.Tensor:
    """The projection as a matrix `(prefix + P*R, prefix + h*w)`; its transpose is the expansion."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < order:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    walsh = torch.stack(sorted(hadamard, key=lambda row: int((row[1:] != row[:-1]).sum())))

    def tokens(size: int) -> list[int | None]:
        padded = -(-size // order) * order
        before = -((size - padded) // 2)  # ceil
        shown = []
        for at in range(-before, padded - before):
            mirrored = -at if at < 0 else 2 * (size - 1) - at if at >= size else at
            shown.append(at if 0 <= at < size else mirrored if reflect else None)
        return shown

    ys, xs = tokens(h), tokens(w)
    matrix = torch.zeros(prefix + len(ys) // order * (len(xs) // order) * (len(bases) // 2), prefix + h * w).double()
    matrix[:prefix, :prefix] = torch.eye(prefix)
    row = prefix
    for top, left in itertools.product(range(0, len(ys), order), range(0, len(xs), order)):
        for r, c in zip(bases[0::2], bases[1::2], strict=True):
            for u, v in itertools.product(range(order), range(order)):
                y, x = ys[top + u], xs[left + v]
                if y is not None and x is not None:
                    matrix[row, prefix + y * w + x] += walsh[r, u] * walsh[c, v] / order
            row += 1
    return matrix


def can_reflect(h: int, w: int, order: int) -> bool:
    return all(-((size - -(-size // order) * order) // 2) < size for size in (h, w))


# ---------------------------------------------------------------------------------------------------------------- NVRTC


def expressions(dtype: torch.dtype, order: int) -> list[str]:
    """Every kernel that `cuda.plan` can ask for."""
    vectors = (1,) if dtype == torch.float32 else (1, 2)
    groups = sorted({1, min(4, order // 2)})
    kernels = [f"{kind}<{v}, {g}>" for kind in ("project", "expand") for v in vectors for g in groups]
    return kernels + [f"fold<{v}>" for v in vectors]


def nvrtc_compile(dtype: torch.dtype, bases: list[int], order: int, arch: str, names: list[str]) -> str:
    """Compile to machine code; returns the log, which holds ptxas' register and spill counts."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    ok = nvrtc.nvrtcResult.NVRTC_SUCCESS

    def call(function, *args):
        error, *result = function(*args)
        assert error == ok, f"{function.__name__}: {error}"
        return result[0] if result else None

    program = call(nvrtc.nvrtcCreateProgram, cuda.SOURCE.read_bytes(), b"walsh.cu", 0, [], [])
    for name in names:
        call(nvrtc.nvrtcAddNameExpression, program, name.encode())
    options = [*cuda.options(dtype, bases, order), f"--gpu-architecture={arch}", "--ptxas-options=-v"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = b" " * call(nvrtc.nvrtcGetProgramLogSize, program)
    call(nvrtc.nvrtcGetProgramLog, program, log)
    text = log.decode(errors="replace").strip("\0 \n")
    assert error == ok, text
    for name in names:
        assert call(nvrtc.nvrtcGetLoweredName, program, name.encode()), name
    assert call(nvrtc.nvrtcGetCUBINSize, program) > 0
    nvrtc.nvrtcDestroyProgram(program)
    return text
