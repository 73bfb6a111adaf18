"""walsh.cu and its launcher without a GPU: compiled by NVRTC, and run on the CPU by the host shim (tests/shim).

The oracle is an explicit dense matrix in float64, built from the definitions: Walsh rows are Hadamard rows sorted by
their sign changes, and padding is written out position by position.
"""

import atexit
import ctypes
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from leanvit.kernels import cuda

SHIM = Path(__file__).parent / "shim"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def triangle(order: int, k: int) -> tuple[int, ...]:
    return tuple(i for r in range(order) for c in range(order) if r + c < k for i in (r, c))


def scattered(order: int) -> tuple[int, ...]:
    """Like a set found from data: no order, no symmetry, the highest sequencies among them."""
    n = order - 1
    return (0, 0, n, 1, 2, 3, 1, n, 3, 0, n, n, 0, 2)


SETS = {
    "DC": lambda n: (0, 0),
    "LP_L1-2": lambda n: triangle(n, 2),
    "LP_L1-4": lambda n: triangle(n, 4),
    "LP_L1-6": lambda n: triangle(n, 6),
    "LP_L1-8": lambda n: triangle(n, 8),
    "scattered": scattered,
    "full": lambda n: tuple(i for r in range(min(n, 8)) for c in range(min(n, 8)) for i in (r, c)),
}


@functools.cache
def dense(h: int, w: int, prefix: int, bases: tuple[int, ...], order: int, reflect: bool) -> torch.Tensor:
    """The projection as a matrix `(prefix + P*R, prefix + h*w)`; its transpose is the expansion."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < order:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    walsh = torch.stack(sorted(hadamard, key=lambda row: int((row[1:] != row[:-1]).sum())))

    def shows(size: int) -> torch.Tensor:
        """`(padded, size)`: which token each padded position shows."""
        padded = -(-size // order) * order
        before = -((size - padded) // 2)  # ceil
        matrix = torch.zeros(padded, size, dtype=torch.float64)
        for at in range(-before, padded - before):
            mirrored = -at if at < 0 else 2 * (size - 1) - at if at >= size else at
            if reflect or mirrored == at:
                matrix[at + before, mirrored] = 1
        return matrix

    ys, xs = shows(h).split(order), shows(w).split(order)
    rows = [
        torch.outer(walsh[r] @ y, walsh[c] @ x).flatten() / order
        for y, x in itertools.product(ys, xs)
        for r, c in zip(bases[0::2], bases[1::2], strict=True)
    ]
    return torch.block_diag(torch.eye(prefix, dtype=torch.float64), torch.stack(rows))


def can_reflect(h: int, w: int, order: int) -> bool:
    return all(-((size - -(-size // order) * order) // 2) < size for size in (h, w))


# ---------------------------------------------------------------------------------------------------------------- NVRTC


def expressions(dtype: torch.dtype, order: int) -> list[str]:
    """Every kernel that `cuda.plan` can ask for."""
    vectors = (1,) if dtype == torch.float32 else (1, 2)
    groups = sorted({1, min(4, order // 2)})
    kernels = [f"{kind}<{v}, {g}>" for kind in ("project", "expand") for v in vectors for g in groups]
    return kernels + [f"fold<{v}>" for v in vectors]


def nvrtc_compile(dtype: torch.dtype, bases: tuple[int, ...], order: int, arch: str, names: list[str]) -> str:
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


def plain(dtype: torch.dtype) -> list[str]:
    """The kernels of a training step: pairs of channels where they exist, rows not split."""
    return ["project<1, 1>", "expand<1, 1>"] if dtype == torch.float32 else ["project<2, 1>", "expand<2, 1>"]


def assert_no_spills(log: str, kernels: int) -> None:
    assert len(re.findall(r"Used \d+ registers", log)) >= kernels, log
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spilled and all(pair == ("0", "0") for pair in spilled), log


@pytest.mark.parametrize("order", [8, 4, 16])
@pytest.mark.parametrize("name", SETS)
def test_nvrtc_compiles_without_spills(name, order):
    # order 8 is what the paper uses: every dtype. Elsewhere one dtype an architecture, taking turns over the sets.
    turn = list(SETS).index(name)
    jobs = {(DTYPES[turn % 3], "sm_90"), (DTYPES[(turn + 1) % 3], "sm_80")}
    if order == 8:
        jobs |= {(dtype, "sm_90") for dtype in DTYPES}
    for dtype, arch in sorted(jobs, key=str):
        log = nvrtc_compile(dtype, SETS[name](order)[: 2 * order**2], order, arch, plain(dtype))
        assert_no_spills(log, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvrtc_compiles_every_kernel(dtype):
    names = expressions(dtype, 8)
    assert_no_spills(nvrtc_compile(dtype, triangle(8, 4), 8, "sm_90", names), len(names))


def test_largest_split_fits_static_shared_memory():
    """36 coefficients, 4 groups, pairs of channels: 36 KiB of the 48 KiB that a kernel may declare."""
    log = nvrtc_compile(torch.bfloat16, triangle(8, 8), 8, "sm_80", ["project<2, 4>"])
    assert f"{4 * 36 * 32 * 2 * 4} bytes smem" in log
    assert_no_spills(log, 1)


def test_cupy_compiles_the_same_source():
    """CuPy's front end takes these options and names (its RawModule needs a driver, the program below it does not)."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    program = cupy.cuda.compiler._NVRTCProgram(
        cuda.SOURCE.read_text(), "walsh.cu", name_expressions=("project<2, 1>",), method="cubin"
    )
    options = (*cuda.options(torch.bfloat16, triangle(8, 2), 8), "--gpu-architecture=sm_90")
    code, mapping = program.compile(options)
    assert code and "project" in mapping["project<2, 1>"]


# ----------------------------------------------------------------------------------------------------------- host shim


@functools.cache
def build(dtype, bases: tuple[int, ...], order: int, source: Path = cuda.SOURCE, flags: tuple[str, ...] = ()) -> Path:
    """Compile walsh.cu for this machine's CPU: a library, or a program where flags say so."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the host shim with")
    headers = [Path(include) for include in cuda.include_dirs()]
    if dtype != torch.float32 and not headers:
        pytest.skip("no cuda_fp16.h and cuda_bf16.h: nvidia-cuda-runtime is not installed")
    if dtype != torch.float32 and not any((i / sub / "nv/target").exists() for i in headers for sub in ("", "cccl")):
        pytest.skip("cuda_fp16.h needs nv/target: nvidia-cuda-cccl is not installed")
    folder = Path(tempfile.mkdtemp(prefix="walsh-shim-", dir=scratch()))
    options = list(cuda.options(dtype, bases, order))
    for include in cuda.include_dirs():
        options.remove(f"-I{include}")
        options += ["-isystem", include, "-isystem", f"{include}/cccl"]
    command = ["g++", "-O0", "-g1", "-Wall", "-Werror", "-Wno-unknown-pragmas", *options, f"-I{SHIM}", *flags]
    if not flags:
        command += ["-shared", "-fPIC", "-fno-gnu-unique"]  # else the libraries of one process share their statics
    command += [f'-DWALSH_SOURCE="{source}"', str(SHIM / "walsh_driver.cpp"), "-o", str(folder / "walsh")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "walsh"


@functools.cache
def scratch() -> str:
    folder = tempfile.mkdtemp(prefix="leanvit-test-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def on_cpu(launches: list[cuda.Launch], library: Path) -> None:
    run = ctypes.CDLL(str(library)).run
    for launch in launches:
        arguments = (ctypes.c_longlong * 11)(*launch.args)
        code = run(launch.expression.encode(), launch.grid, *launch.block, arguments)
        assert code == 0, f"the driver knows no {launch.expression}"


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout, every element that is not theirs NaN."""
    batch, tokens, channels = values.shape
    store = torch.full((batch + 2, tokens + 2, 2 * channels + 6), torch.nan, dtype=values.dtype)
    if layout == "dense":  # as torch allocates it
        view = store.flatten()[64 : 64 + values.numel()].view(values.shape)
    elif layout == "slice":  # a slice of a wider tensor, e.g. of fused q, k, v; stays aligned to pairs
        view = store[1:-1, 1:-1, 4 : 4 + channels]
    elif layout == "odd slice":
        view = store[1:-1, 1:-1, 3 : 3 + channels]
    elif layout == "every other":
        view = store[1:-1, 1:-1, 2 : 2 + 2 * channels : 2]
    else:  # NCHW, viewed as (B, L, C)
        view = store.flatten()[64 : 64 + values.numel()].view(batch, channels, tokens).transpose(1, 2)
    return view.copy_(values)


LAYOUTS = ("dense", "slice", "odd slice", "every other", "nchw")


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous output full of NaN inside a buffer of sevens."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 512,), 7.0, dtype=dtype)
    out = buffer[256 : 256 + size].view(shape)
    return out.fill_(torch.nan), buffer


GRIDS = [(8, 8), (7, 7), (14, 14), (12, 20), (5, 3), (4, 4), (1, 2), (49, 9)]
CHANNELS = [1, 3, 5, 8, 33]


def check(kind, dtype, bases, order, h, w, prefix, channels, reflect, split, layout, batch=2) -> str:
    """Run one case under the shim, against the dense oracle; returns the kernel that ran."""
    matrix = dense(h, w, prefix, bases, order, reflect)
    if kind == "expand":
        matrix = matrix.T
    values = torch.randn(batch, matrix.shape[1], channels, dtype=torch.float64).to(dtype)
    out, buffer = guarded((batch, matrix.shape[0], channels), dtype)
    x = laid_out(values, layout)
    kernel = "fold" if kind == "expand" and reflect else kind
    launches = cuda.plan(kernel, x, out, h, w, prefix, bases, order, reflect, 132 if split else 0)
    on_cpu(launches, build(dtype, bases, order))

    exact = matrix @ values.double()
    error = (out.double() - exact).abs().max()
    in_torch = ((matrix.to(dtype) @ values).double() - exact).abs().max()
    # the second term: half a unit in the last place of the largest entry, as torch may hit a short sum exactly
    bound = 2 * in_torch + torch.finfo(dtype).eps / 2 * exact.abs().max()
    where = f"{launches[0]} {kind} {h}x{w} prefix {prefix} C {channels} reflect {reflect} {layout}"
    assert error <= bound, f"error {error:.3g} > {bound:.3g}: {where}"
    assert torch.equal(out[:, :prefix], values[:, :prefix]), f"prefix rows: {where}"
    assert (buffer[:256] == 7).all() and (buffer[-256:] == 7).all(), f"written outside the output: {where}"
    return launches[0].expression


def sweep(dtype, bases, order, grids=GRIDS, channels=CHANNELS) -> set[str]:
    """Every grid, channel count, padding, kernel and split; prefix and layout take turns, so that all pairs are met."""
    ran, turn = set(), 0
    for (h, w), kind, reflect, split in itertools.product(grids, ("project", "expand"), (False, True), (False, True)):
        if reflect and not can_reflect(h, w, order):
            continue
        for size in channels:
            turn += 1
            prefix, layout = (0, 1, 5)[turn % 3], LAYOUTS[turn % 5]
            ran.add(check(kind, dtype, bases, order, h, w, prefix, size, reflect, split, layout))
    return ran


def test_shim_fp32_every_shape():
    ran = sweep(torch.float32, triangle(8, 4), 8)
    assert ran == set(expressions(torch.float32, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shim_16_bit(dtype):
    ran = sweep(dtype, triangle(8, 4), 8, grids=[(8, 8), (7, 7), (12, 20), (5, 3)], channels=[1, 8, 66])
    assert ran == set(expressions(dtype, 8))


@pytest.mark.parametrize(
    ("order", "bases"),
    [
        (8, scattered(8)),
        (8, triangle(8, 15)),  # all 64: two chunks of coefficients in project, coefficients read again in expand
        (8, triangle(8, 8)),
        (8, (5, 5)),
        (4, triangle(4, 7)),
        (4, scattered(4)),
        (16, triangle(16, 8)),
        (16, triangle(16, 31)[40:]),  # 236 bases without the low ones
        (2, (1, 0, 0, 1)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value) // 2} bases",
)
def test_shim_sets_and_orders(order, bases):
    assert len(sweep(torch.float32, bases, order, grids=[(7, 7), (12, 20), (16, 3), (4, 4)], channels=[3, 33])) >= 3


def test_shim_reversed_thread_order(monkeypatch):
    monkeypatch.setenv("SHIM_REV", "1")
    sweep(torch.float32, triangle(8, 4), 8, grids=[(7, 7), (12, 20)], channels=[5, 33])


def test_same_input_same_bits():
    """Deterministic, and independent of what else is in the batch."""
    bases, matrix = triangle(8, 6), dense(14, 14, 1, triangle(8, 6), 8, False)
    x = torch.randn(3, 197, 40)
    outputs = []
    for part in (x, x, x[1:2]):
        out, _ = guarded((len(part), len(matrix), 40), torch.float32)
        on_cpu(cuda.plan("project", part, out, 14, 14, 1, bases, 8, False, 132), build(torch.float32, bases, 8))
        outputs.append(out)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0][1:2], outputs[2])


# ------------------------------------------------------------------------------------------------------------ launcher


def test_plan_cuts_a_grid_that_cuda_would_refuse(monkeypatch):
    monkeypatch.setattr(cuda, "MAX_GRID", 20)
    bases, x = triangle(8, 2), torch.randn(7, 197, 300)
    out, _ = guarded((7, 13, 300), torch.float32)
    launches = cuda.plan("project", x, out, 14, 14, 1, bases, 8, False, 0)
    assert [launch.grid for launch in launches] == [12] * 7  # 4 blocks of tokens, 3 tiles of channels, an image each
    on_cpu(launches, build(torch.float32, bases, 8))
    torch.testing.assert_close(out, dense(14, 14, 1, bases, 8, False).float() @ x)


def test_plan_pairs_channels_only_where_they_are_aligned():
    x = torch.zeros(2, 49, 65, dtype=torch.bfloat16)
    out = torch.empty(2, 3, 64, dtype=torch.bfloat16)

    def kernel(view):
        target = out if view.shape[2] == 64 else out[:, :, : view.shape[2]].contiguous()
        return cuda.plan("project", view, target, 7, 7, 0, triangle(8, 2), 8, False, 0)[0].expression

    assert kernel(x[:, :, :64].contiguous()) == "project<2, 1>"
    assert kernel(x[:, :, :64]) == "project<1, 1>"  # rows start at odd elements
    assert kernel(x[:, :, 1:].contiguous()) == "project<2, 1>"
    assert kernel(torch.zeros(2, 49, 66, dtype=torch.bfloat16)[:, :, 1:65]) == "project<1, 1>"  # address not aligned
    assert kernel(torch.zeros(2, 49, 33, dtype=torch.bfloat16)) == "project<1, 1>"
    assert kernel(torch.zeros(2, 64, 49, dtype=torch.bfloat16).transpose(1, 2)) == "project<1, 1>"


def test_plan_splits_rows_only_where_the_machine_would_idle():
    def launch(batch, channels):
        x = torch.empty(batch, 49, channels, device="meta")
        out = torch.empty(batch, 10, channels, device="meta")
        return cuda.plan("project", x, out, 7, 7, 0, triangle(8, 4), 8, False, 132)[0]

    assert launch(8, 448).expression == "project<1, 4>" and launch(8, 448).block == (32, 4)
    assert launch(1024, 448).expression == "project<1, 1>" and launch(1024, 448).block == (128, 1)


def test_wrong_dtype_and_shape_are_named():
    with pytest.raises(TypeError, match="float64"):
        cuda.project(torch.zeros(1, 64, 4, dtype=torch.float64), 8, 8, 0, (0, 0), 8, False)
    with pytest.raises(ValueError, match=r"needs \(B, 65, C\), got \(1, 64, 4\)"):
        cuda.project(torch.zeros(1, 64, 4), 8, 8, 1, (0, 0), 8, False)
    with pytest.raises(ValueError, match=r"needs \(B, 2, C\), got \(1, 64, 4\)"):
        cuda.expand(torch.zeros(1, 64, 4), 8, 8, 1, (0, 0), 8, True)


def test_cupy_is_not_imported_with_the_launcher():
    code = "import sys; from leanvit.kernels import cuda; assert 'cupy' not in sys.modules, 'cupy'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------- mutations


def mutated(tmp_path: Path, old: str, new: str, count: int = 1) -> Path:
    text = cuda.SOURCE.read_text()
    assert text.count(old) == count, f"{old!r} stands {text.count(old)} times in walsh.cu, not {count}: mend this test"
    path = tmp_path / "walsh.cu"
    path.write_text(text.replace(old, new))
    return path


def run_program(program: Path, tmp_path: Path, channels: int, split: bool, **env: str):
    """One projection of 14x14 tokens in a process of its own: `(completed process, its error or None)`."""
    bases = triangle(8, 4)
    matrix = dense(14, 14, 1, bases, 8, False)
    x = torch.randn(2, 197, channels, generator=torch.Generator().manual_seed(0))
    out = torch.empty(2, len(matrix), channels)
    (launch,) = cuda.plan("project", x, out, 14, 14, 1, bases, 8, False, 132 if split else 0)
    source, target = tmp_path / "in.bin", tmp_path / "out.bin"
    source.write_bytes(x.numpy().tobytes())
    target.unlink(missing_ok=True)
    arguments = [launch.expression, launch.grid, *launch.block, source, target, 4 * out.numel(), *launch.args[2:]]
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **env}, timeout=60
    )
    if done.returncode:
        return done, None
    got = torch.frombuffer(bytearray(target.read_bytes()), dtype=torch.float32).view_as(out)
    return done, (got.double() - matrix @ x.double()).abs().max().item()


def program(source: Path, *flags: str) -> Path:
    return build(torch.float32, triangle(8, 4), 8, source, ("-DSHIM_PROGRAM", *flags))


def test_mutation_barrier_removed(tmp_path):
    intact, broken = program(cuda.SOURCE), program(mutated(tmp_path, "__syncthreads();", ""))
    for thread_order in ("0", "1"):
        done, error = run_program(intact, tmp_path, 33, True, SHIM_REV=thread_order)
        assert done.returncode == 0 and error < 1e-5, done.stderr
        done, error = run_program(broken, tmp_path, 33, True, SHIM_REV=thread_order)
        assert done.returncode or not error < 1e-2, f"the removed barrier went unnoticed, SHIM_REV={thread_order}"


def test_mutation_divergent_barrier(tmp_path):
    broken = program(mutated(tmp_path, "__syncthreads();", "if (threadIdx.x < 16) __syncthreads();"))
    done, _ = run_program(broken, tmp_path, 33, True)
    assert done.returncode and "reached by 64 of 128 threads" in done.stderr


def test_mutation_early_return_before_the_barrier(tmp_path):
    """Lanes without a channel must reach the barrier: the guard of the plain kernel would be wrong in the split one."""
    broken = program(mutated(tmp_path, "if (GROUPS == 1 && !active) return;", "if (!active) return;"))
    done, _ = run_program(broken, tmp_path, 33, True)
    assert done.returncode and "of 128 threads" in done.stderr


def test_mutation_bounds_guard_removed(tmp_path):
    flags = ("-fsanitize=address",)
    try:
        intact = program(cuda.SOURCE, *flags)
    except AssertionError as error:
        if "asan" in str(error):
            pytest.skip("g++ has no AddressSanitizer here")
        raise
    quiet = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    done, error = run_program(intact, tmp_path, 33, False, **quiet)
    assert done.returncode == 0 and error < 1e-5, done.stderr
    broken = program(mutated(tmp_path, "if (GROUPS == 1 && !active) return;", ""), *flags)
    done, _ = run_program(broken, tmp_path, 33, False, **quiet)
    assert done.returncode and "heap-buffer-overflow" in done.stderr and "walsh.cu" in done.stderr, done.stderr


# ----------------------------------------------------------------------------------------------------------------- GPU


def gpu_case(dtype=torch.float32, batch=3, h=14, w=14, prefix=1, channels=192, k=4):
    bases = triangle(8, k)
    x = torch.randn(batch, prefix + h * w, channels, device="cuda", dtype=dtype)
    return x, (h, w, prefix, bases, 8)


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("cupy", reason="CuPy is not installed")
    assert cuda.available(), f"CuPy cannot run here: {cuda.unavailable()}"


@pytest.mark.gpu
@pytest.mark.parametrize("reflect", [False, True], ids=["zero", "reflect"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_error_against_float64(gpu, dtype, reflect):
    cases = itertools.product([(14, 14), (7, 7), (12, 20)], [1, 33, 192, 768], [2, 4, 6, 8, 15], [1, 64])
    for (h, w), channels, k, batch in cases:
        arguments = h, w, 1, triangle(8, k), 8
        matrix = dense(*arguments, reflect).cuda()
        for function, m in ((cuda.project, matrix), (cuda.expand, matrix.T)):
            values = torch.randn(batch, m.shape[1], channels, device="cuda").to(dtype)
            exact = m @ values.double()
            in_torch = ((m.to(dtype) @ values).double() - exact).abs().max()
            error = (function(values, *arguments, reflect).double() - exact).abs().max()
            bound = 2 * in_torch + torch.finfo(dtype).eps / 2 * exact.abs().max()
            assert error <= bound, (function.__name__, h, w, channels, k, batch, error.item(), bound.item())


@pytest.mark.gpu
def test_gpu_non_contiguous(gpu):
    x, arguments = gpu_case(torch.bfloat16)
    expected = cuda.project(x, *arguments, False)
    nchw = x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([x, x, x], dim=2)
    for view in (nchw, wide[:, :, 192:384], torch.cat([x[:, :, :1], x], dim=2)[:, :, 1:]):
        assert not view.is_contiguous()
        assert torch.equal(cuda.project(view, *arguments, False), expected)


@pytest.mark.gpu
def test_gpu_runs_on_the_current_stream(gpu):
    x, arguments = gpu_case(batch=256, channels=768)
    expected = cuda.project(2 * x, *arguments, False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would read x before it is doubled
        doubled = 2 * x
        got = cuda.project(doubled, *arguments, False)
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.gpu
def test_gpu_same_bits_and_graph_capture(gpu):
    for batch in (1, 256):  # rows split, and not
        x, arguments = gpu_case(torch.bfloat16, batch)
        expected = cuda.project(x, *arguments, False)
        assert all(torch.equal(cuda.project(x, *arguments, False), expected) for _ in range(5))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = cuda.project(x, *arguments, False)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)
