"""The result of a run: everything needed to read a number, to trust it, and to get it again.

A notebook calls `run = record.start("1_lbp_wht", globals())` right after its parameters and
`run.save()` in its last cell. The file is written atomically and is the only sign of success. Where it goes: to the
file that the runner names (environment variable LEANVIT_RESULT), else to outputs/interactive/<name>.json, so that
exploring in JupyterLab never touches a committed result.

Not in the record, on purpose: host and user names, and absolute paths. Numbers that are not finite become null, and
`notes` says so.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from leanvit import atomic, params

FIELDS = (
    "notebook run tier params_file overrides headline parameters seeds metrics verdicts notes sources hashes key "
    "checkout versions hardware commit seconds peak_memory"
).split()
PACKAGES = "leanvit torch torchvision timm accelerate peft numpy safetensors papermill ipykernel cupy-cuda13x".split()
# the command line, the site and the corners to play in are no part of what a notebook computes
NOT_HASHED = {
    "run.py", "pool.py", "worker.py", "cluster.py", "ledger.py", "extras.py", "atomic.py", "orphans.py",
    "report.py", "report_frame.py", "report_notebook.py", "report_api.py",
    "play.py", "play_bases.py", "play_plan.py",
}  # fmt: skip


def find_root(start: Path | None = None) -> Path:
    """The repository root: the nearest folder upwards from `start` (the working directory) with notebooks/ and
    params/ in it. Raises `FileNotFoundError` where there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
            return folder
    raise FileNotFoundError(f"no repository of leanvit in {start} or above it: none has both notebooks/ and params/")


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or nothing: a temporary file beside it, flushed to the disk, then renamed over it. `OSError`
    names `path`.
    """
    try:
        with atomic.replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {path.name} in {path.parent.name}/: {error.strerror or error}"
        ) from error


def staged(result: Path) -> Path:
    """Where a notebook under the runner writes; the runner renames it to `result` when everything else is in its
    place.
    """
    return result.with_name(f".{result.stem}.staged.json")


def notebook_hash(path: Path) -> str:
    """sha256 over the kinds and sources of the cells; outputs and metadata do not count."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return _sha256(*(part for cell in cells for part in (cell["cell_type"], "".join(cell["source"]))))


def library_hash(without: Iterable[str] = ()) -> str:
    """sha256 over what a notebook can use of the package: sources (.py, .cu), and assets (images, weights, tables)
    but those named in `without`.
    """
    package = Path(__file__).parent
    files = [file for kind in ("py", "cu") for file in package.rglob(f"*.{kind}") if file.name not in NOT_HASHED]
    files += [file for file in (package / "assets").glob("*") if file.name not in without]
    named = sorted((file.relative_to(package).as_posix(), file) for file in files)
    return _sha256(*(part for name, file in named for part in (name, hashlib.sha256(file.read_bytes()).hexdigest())))


def key_hashes(root: Path, notebook: str, parameters: dict[str, Any]) -> dict[str, str]:
    """The hashes of notebook, library and resolved parameters; a result is fresh while all three are unchanged.

    Assets that the notebook itself can write do not count: they stand in its metadata, {"leanvit": {"writes": [...]}}.
    """
    path = root / "notebooks" / f"{notebook}.ipynb"
    written = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("leanvit", {}).get("writes", [])
    return {
        "notebook": notebook_hash(path),
        "library": library_hash(written),
        "parameters": _sha256(json.dumps(parameters, sort_keys=True)),
    }


def run_key(hashes: dict[str, str]) -> str:
    """The three hashes in one."""
    return _sha256(hashes["notebook"], hashes["library"], hashes["parameters"])


def checkout_id(root: Path) -> str:
    """A random name of this clone, kept in .cache/ (ignored by git): it tells results made here from results that
    came with git.
    """
    path = root / ".cache" / "checkout_id"
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()


def summary(values) -> dict[str, Any]:
    """Mean, sample standard deviation, number and the values themselves, e.g. of one metric over seeds; std is 0 for
    one value. Raises `ValueError` for none.

    >>> from leanvit import record
    >>> record.summary([80, 82, 84])
    {'mean': 82.0, 'std': 2.0, 'n': 3, 'values': [80.0, 82.0, 84.0]}
    """
    values = [float(value) for value in values]
    if not values:
        raise ValueError("summary of no values: there must be at least one")
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    return {"mean": mean, "std": std, "n": len(values), "values": values}


@dataclasses.dataclass
class Run:
    """One run of one notebook. Fill `metrics`, `verdicts` and `headline`, name the data and weights, then `save()`."""

    name: str
    parameters: dict[str, Any]
    root: Path
    tier: str
    seed: int
    seeds: list[int]
    result: Path
    checkpoints: Path
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    verdicts: list = dataclasses.field(default_factory=list)
    headline: str = ""
    sources: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    _hashes: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    _began: float = dataclasses.field(default_factory=time.monotonic, repr=False)

    def add_source(self, kind: str, name: str, sha256: str) -> None:
        """Record what the numbers rest on: kind "data" or "weights" (else `ValueError`), its name, and the sha256 of
        its content.
        """
        if kind not in ("data", "weights"):
            raise ValueError(f"source {name}: kind is {kind!r}; it must be 'data' or 'weights'")
        self.sources[name] = {"kind": kind, "sha256": sha256}

    def save(self) -> Path:
        """Write the result, atomically; returns its path relative to the repository. Times are in seconds, memory in
        MiB. Raises `ValueError` when there is no headline, `TypeError` for a metric that JSON cannot hold, `OSError`
        when the file cannot be written.
        """
        if not self.headline:
            raise ValueError(
                "run.headline is empty: one line with the number that this notebook is about belongs there"
            )
        notes: dict[str, str] = {}
        result = {
            "notebook": self.name,
            "run": self.result.stem,
            "tier": self.tier,
            "params_file": os.environ.get("LEANVIT_PARAMS"),
            "overrides": json.loads(os.environ.get("LEANVIT_OVERRIDES", "{}")),
            "headline": self.headline,
            "parameters": self.parameters,
            "seeds": self.seeds,
            "metrics": _plain(self.metrics, "metrics", notes),
            "verdicts": _plain(self.verdicts, "verdicts", notes),
            "notes": notes,
            "sources": self.sources,
            "hashes": self._hashes,
            "key": run_key(self._hashes),
            "checkout": checkout_id(self.root),
            "versions": versions(),
            "hardware": hardware(),
            "commit": commit(self.root),
            "seconds": round(time.monotonic() - self._began, 2),
            "peak_memory": peak_memory(),
        }
        text = scrub(json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False), self.root) + "\n"
        path = self.root / self.result
        write_atomic(staged(path) if "LEANVIT_RESULT" in os.environ else path, text)
        return self.result


def start(name: str, scope: dict[str, Any]) -> Run:
    """Begin a run of notebooks/<name>.ipynb: take its parameters from `scope` (its globals()), check them, set seeds.

    Raises `params.ParameterError` for a wrong value, `FileNotFoundError` outside of a repository, `KeyError` when a
    parameter is not in scope.
    """
    root = find_root()
    if not params.PLAIN_NAME.fullmatch(name):
        raise params.ParameterError(f"record.start: {name!r} must be the plain name of a notebook in notebooks/")
    known = params.declared(root / "notebooks" / f"{name}.ipynb")
    absent = [parameter for parameter in known if parameter not in scope]
    if absent:
        raise KeyError(
            f"{', '.join(absent)} of notebooks/{name}.ipynb not in scope: run its parameters cell first, pass globals()"
        )
    values = params.resolve(known, {parameter: scope[parameter] for parameter in known}, f"notebooks/{name}.ipynb")
    hashes = key_hashes(root, name, values)
    tier = os.environ.get("LEANVIT_TIER", "interactive")
    result = Path(os.environ.get("LEANVIT_RESULT", f"outputs/interactive/{name}.json"))
    checkpoints = root / result.parent / "checkpoints" / result.stem / run_key(hashes)[:16]
    seed = int(values.get("seed") or 0)
    seeds = values.get("seeds") or [seed]
    seeds = list(range(seed, seed + seeds)) if isinstance(seeds, int) else seeds
    _set_up_torch(seed)
    return Run(name, values, root, tier, seed, seeds, result, checkpoints, _hashes=hashes)


def _set_up_torch(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores())))


def cores() -> int:
    """Logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def versions() -> dict[str, str]:
    """Python and the packages that can move a number; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What the run ran on: processor, cores, threads, memory in GiB, GPUs; no name of the machine."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "cuda": torch.version.cuda if gpus else None,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def peak_memory() -> dict[str, float | None]:
    """Highest resident memory of this process, and highest CUDA memory held by torch, in MiB; null where it cannot be
    known.
    """
    import torch

    from leanvit import cost

    def mib(peak: int | None) -> float | None:
        return None if peak is None else round(peak / 2**20, 1)

    cuda = cost.peak_memory_bytes("cuda") if torch.cuda.is_available() else None
    return {"process_mib": mib(cost.peak_memory_bytes()), "cuda_mib": mib(cuda)}


def commit(root: Path) -> dict[str, Any]:
    """The git commit of the checkout and whether tracked files outside of outputs/ differ from it; null, null without
    git.
    """
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", ".", ":!outputs")
    return {"hash": head or None, "dirty": None if changed is None else bool(changed)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def scrub(text: str, root: Path) -> str:
    """The text without absolute paths of this machine: the repository becomes relative, environment and home get
    short names.
    """
    text = text.replace(f"{root}/", "").replace(str(root), ".")
    for prefix in {sys.prefix, sys.base_prefix} - {"/usr", "/"}:
        text = text.replace(f"{prefix}/", "<python>/")
    text = text.replace(str(Path(tempfile.gettempdir()).resolve()) + "/", "<tmp>/")
    home = str(Path.home())
    return text.replace(f"{home}/", "~/") if len(home) > 1 else text


def read(path: Path) -> dict[str, Any] | None:
    """The complete result in a file; None for one that is missing, being written or damaged: `leanvit list` tells."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return None if incomplete(result) else result


def incomplete(result: Any) -> list[str]:
    """What is missing in a result read from JSON; [] when it is complete.

    >>> from leanvit import record
    >>> record.incomplete([])
    ['it is not a mapping']
    """
    if not isinstance(result, dict):
        return ["it is not a mapping"]
    missing = [f"no {field}" for field in FIELDS if field not in result]
    empty = [
        f"empty {field}" for field in ("headline", "key", "checkout", "versions", "hashes") if not result.get(field)
    ]
    return missing + [text for text in empty if text.removeprefix("empty ") in result]


def _plain(value: Any, where: str, notes: dict[str, str]) -> Any:
    """The value in JSON's own types; numbers that are not finite become null with a note under their place."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        notes[where] = f"{float(value)}: not a finite number"
        return None
    if isinstance(value, dict):
        return {str(name): _plain(item, f"{where}.{name}", notes) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]", notes) for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value), where, notes)
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        return _plain(value.tolist(), where, notes)
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"{where} is a {type(value).__name__}; a result holds numbers, text, lists and mappings")


def _sha256(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)  # the length keeps ("ab", "c") and ("a", "bc") apart
    return digest.hexdigest()
