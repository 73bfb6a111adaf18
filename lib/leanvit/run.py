"""The command line: check the parameters of every run, execute each in a process of its own, skip what is done, tell.

    leanvit run params/1_lbp_wht/embedded.yaml [-p lr 1e-3]   one run, or several files; -p overrides
    leanvit run --tier smoke [--notebook 1_lbp_wht]           every notebook that has this tier
    leanvit list                                              parameter files, and the state of each result
    leanvit report                                            outputs/ -> outputs/site/index.html

Where results go: params/<notebook>/smoke.yaml leads to outputs/smoke/<notebook>.ipynb and .json, paper_x.yaml to
outputs/paper/<notebook>.x.*, and anything run with -p to outputs/custom/, so that an experiment never replaces a
committed result.

A result is fresh, and its run is skipped, when it was made in this checkout from the same notebook, library and
resolved parameters. Results that came with the clone are "from elsewhere": the first call runs them again on this
machine, later calls skip them. An interrupted run goes on from its checkpoint. Exit codes: 0 all is well, 1 a run
failed, 2 wrong parameters, 130 interrupted.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvit import claims, params, record

TIERS = ("smoke", "embedded", "gpu", "paper")
CELL_TIMEOUT_S = {"smoke": 300, "embedded": 3600}  # elsewhere a cell may take days
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


def plan(root: Path, file: Path, overrides: dict[str, str] | None = None) -> Job:
    """The job of a parameters file, everything checked; params.ParameterError says what is wrong."""
    file = (file if file.is_absolute() else Path.cwd() / file).resolve()
    if not file.is_file():
        known = [path.relative_to(root).as_posix() for path in parameter_files(root)]
        shown = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        raise params.ParameterError(
            f"{shown}: no such file{params.near(shown, known)}; `leanvit list` shows what there is"
        )
    shown = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
    notebook = file.parent.name
    known = params.declared(root / "notebooks" / f"{notebook}.ipynb")
    try:
        given = params.read_values(file)
        values = params.resolve(known, given, shown)
    except params.ParameterError as error:
        raise params.ParameterError(str(error).replace(str(file), shown)) from None
    word, _, rest = file.stem.partition("_")
    tier, stem = (word, rest) if word in TIERS else ("custom", file.stem)
    parsed = {name: params.parse_value(text) for name, text in (overrides or {}).items()}
    if parsed:
        own = params.resolve(known, parsed, "-p")
        values.update({name: own[name] for name in parsed})
        digest = hashlib.sha256(json.dumps([tier, stem, values], sort_keys=True).encode()).hexdigest()[:8]
        result = Path("outputs", "custom", f"{notebook}-{digest}.json")
    else:
        result = Path("outputs", tier, f"{notebook}.{stem}.json" if stem else f"{notebook}.json")
    return Job(notebook, tier, shown, parsed, values, result)


def parameter_files(root: Path) -> list[Path]:
    """All parameter files, by notebook and tier."""
    return [file for file in sorted((root / "params").glob("*/*.yaml")) if file.name != "claims.yaml"]


def state(root: Path, job: Job, checkout: str) -> tuple[str, str]:
    """("fresh" | "stale" | "from elsewhere" | "failed" | "missing", why)."""
    path = root / job.result
    failed = path.with_suffix(".failed.ipynb").exists()
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        problems = record.incomplete(result)
    except FileNotFoundError:
        return ("failed", f"see {job.result.with_suffix('.failed.ipynb').as_posix()}") if failed else ("missing", "")
    except (OSError, ValueError):
        return "missing", "the result cannot be read"
    if problems:
        return "stale", "; ".join(problems)
    hashes = record.key_hashes(root, job.notebook, job.parameters)
    if changed := [name for name, value in hashes.items() if result["hashes"].get(name) != value]:
        return ("failed" if failed else "stale"), f"{' and '.join(changed)} changed"
    if not path.with_suffix(".ipynb").exists():
        return "stale", "the executed notebook is gone"
    return ("fresh", "") if result["checkout"] == checkout else ("from elsewhere", "same sources, another checkout")


class Local:
    """A run as a process of this machine, in a session of its own."""

    def __init__(self, root: Path, job: Job, threads: int):
        log = root / job.result.with_suffix(".log")
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
            "parent": os.getpid(),
        }
        with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code tells
            self.process.stdin.write(json.dumps(request))
            self.process.stdin.close()

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.poll()

    def interrupt(self) -> None:
        """Ctrl-C for the kernel: training saves a checkpoint, the notebook stops."""
        import psutil

        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                child.send_signal(signal.SIGINT) if os.name == "posix" else child.kill()

    def kill(self) -> None:
        """End the process and its kernel now."""
        import psutil

        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for child in family:
                with contextlib.suppress(psutil.Error):
                    child.kill()
        self.process.wait()


class OnRay:
    """A run as a Ray task, on whatever node has the cores; all nodes must see the repository under the same path."""

    def __init__(self, root: Path, job: Job, threads: int):
        import ray

        def work() -> int:
            local = Local(root, job, threads)
            try:
                while local.poll() is None:
                    time.sleep(0.2)
            finally:
                local.kill()
            return local.poll()

        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self.ray, self.task = ray, ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(work).remote()

    def poll(self) -> int | None:
        """The exit code, None while it waits or runs."""
        done, _ = self.ray.wait([self.task], timeout=0)
        try:
            return self.ray.get(self.task) if done else None
        except self.ray.exceptions.RayError:
            return 1

    def interrupt(self) -> None:
        """Ray tasks cannot be told to save; they go on from their last periodic checkpoint."""
        self.ray.cancel(self.task)

    def kill(self) -> None:
        """End the task now."""
        self.ray.cancel(self.task, force=True)


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
    inherited = {
        name: value for name, value in os.environ.items() if name != "MPLBACKEND"
    }  # figures belong in the notebook
    return {**inherited, **ours}


@dataclass
class Outcome:
    """How a job ended: "done", "up to date" or "failed", after how many seconds."""

    job: Job
    status: str
    seconds: float = 0.0


def execute(
    root: Path, jobs: list[Job], *, at_once: int, force: bool = False, ray: bool = False, after=lambda: None
) -> list[Outcome]:
    """Run what is not fresh, `at_once` at a time, a line for each start and finish; `after()` follows each finish.

    Jobs whose notebook has the metadata {"leanvit": {"alone": true}} (they measure time) run last, one at a time.
    """
    checkout = record.checkout_id(root)
    outcomes, waiting, running = [], [], {}
    for job in sorted(jobs, key=lambda job: _alone(root, job)):
        kind, why = state(root, job, checkout)
        if kind == "fresh" and not force:
            print(f"  {job.label}: up to date", flush=True)
            outcomes.append(Outcome(job, "up to date"))
        else:
            waiting.append((job, why or kind))
    threads = max(1, record.cores() // at_once)
    try:
        while waiting or running:
            while waiting and len(running) < at_once and _may_start(root, waiting[0][0], running):
                job, why = waiting.pop(0)
                print(f"> {job.label}: started ({'forced' if force else why})", flush=True)
                running[job.result] = (job, (OnRay if ray else Local)(root, job, threads), time.monotonic())
            for job, process, began in list(running.values()):
                if (code := process.poll()) is None:
                    continue
                del running[job.result]
                outcomes.append(_finish(root, job, code, time.monotonic() - began))
                after()
            _show_progress(root, running)
            time.sleep(0.1)
    except KeyboardInterrupt:
        _stop(running)
        raise
    return outcomes


def _alone(root: Path, job: Job) -> bool:
    notebook = json.loads((root / "notebooks" / f"{job.notebook}.ipynb").read_text(encoding="utf-8"))
    return bool(notebook["metadata"].get("leanvit", {}).get("alone"))


def _may_start(root: Path, job: Job, running: dict) -> bool:
    return not running or not (_alone(root, job) or any(_alone(root, other) for other, _, _ in running.values()))


def _finish(root: Path, job: Job, code: int, seconds: float) -> Outcome:
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    log = root / job.result.with_suffix(".log")
    if code == 0 and (root / job.result).exists():
        headline = json.loads((root / job.result).read_text(encoding="utf-8"))["headline"]
        print(f"  {job.label}: done in {seconds:.0f} s: {headline}", flush=True)
        _remove_checkpoints(root, job)
        log.unlink(missing_ok=True)
        return Outcome(job, "done", seconds)
    print(f"x {job.label}: failed after {seconds:.0f} s (exit code {code})\n{why_failed(root, job)}", flush=True)
    return Outcome(job, "failed", seconds)


def why_failed(root: Path, job: Job) -> str:
    """The cell that failed and the last lines of its error, from the notebook it left or else from the log."""
    failed, log = root / job.result.with_suffix(".failed.ipynb"), root / job.result.with_suffix(".log")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    with contextlib.suppress(OSError, ValueError):
        cells = json.loads(failed.read_text(encoding="utf-8"))["cells"]
        added = {"injected-parameters", "papermill-error-cell-tag"}  # these do not count: they are not in notebooks/
        cells = [cell for cell in cells if not added & set(cell["metadata"].get("tags", []))]
        for number, cell in enumerate(cells, 1):
            for output in cell.get("outputs", []):
                if output["output_type"] == "error":
                    trace = ANSI.sub("", "\n".join(output["traceback"])).splitlines()[-6:]
                    code = "".join(cell["source"]).strip().splitlines()[:2]
                    shown = [
                        f"cell {number}: {' / '.join(code)}",
                        *trace,
                        f"notebook: {failed.relative_to(root).as_posix()}",
                    ]
                    return "\n".join(f"    {line}" for line in shown)
    cell = _current_cell(lines)
    tail = [line for line in lines if line.strip() and not NOISE.search(line)][-4:]
    return "\n".join(f"    {line}" for line in ([f"last cell: {cell}"] if cell else []) + tail)


def _current_cell(lines: list[str]) -> int | None:
    numbers = [match[1] for line in lines if (match := re.match(r"Executing Cell (\d+)", line))]
    return int(numbers[-1]) if numbers else None


def _show_progress(root: Path, running: dict) -> None:
    if not sys.stdout.isatty() or not running:
        return
    texts = []
    for job, _, began in running.values():
        log = root / job.result.with_suffix(".log")
        cell = _current_cell(log.read_text(encoding="utf-8", errors="replace").splitlines()) if log.exists() else None
        texts.append(f"{job.label} {f'cell {cell}' if cell else 'starting'} {time.monotonic() - began:.0f} s")
    print(f"\r\033[K{' | '.join(texts)}"[: os.get_terminal_size().columns + 3], end="", flush=True)


def _remove_checkpoints(root: Path, job: Job) -> None:
    import shutil

    shutil.rmtree(root / job.result.parent / "checkpoints" / job.name, ignore_errors=True)
    with contextlib.suppress(OSError):
        (root / job.result.parent / "checkpoints").rmdir()


def _stop(running: dict) -> None:
    print(
        f"\nstopping {len(running)} run(s): training saves a checkpoint, the next call goes on from there", flush=True
    )
    for _, process, _ in running.values():
        process.interrupt()
    deadline = time.monotonic() + SAVE_TIMEOUT_S
    try:
        while any(process.poll() is None for _, process, _ in running.values()) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:  # also on a second Ctrl-C
        for _, process, _ in running.values():
            process.kill()


def summary_table(root: Path, outcomes: list[Outcome]) -> str:
    """Notebook, headline number, claims matched / differing / not run, time; one line a run."""
    rows = [("notebook", "headline", "matched", "differ", "not run", "time")]
    for outcome in sorted(outcomes, key=lambda outcome: outcome.job.result):
        label = outcome.job.label
        if outcome.status == "failed":
            rows.append((label, "FAILED", "", "", "", f"{outcome.seconds:.0f} s"))
            continue
        result = json.loads((root / outcome.job.result).read_text(encoding="utf-8"))
        number = [str(count) for count in claims.counts(result["verdicts"]).values()]
        rows.append((label, result["headline"], *number, f"{outcome.seconds or result['seconds']:.0f} s"))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def select(root: Path, tier: str, notebooks: list[str]) -> list[Path]:
    """The parameter files of a tier, of the notebooks named (or of all); params.ParameterError when there are none."""
    if tier not in TIERS:
        raise params.ParameterError(f"there is no tier {tier}{params.near(tier, TIERS)}; known are {', '.join(TIERS)}")
    known = sorted(path.stem for path in (root / "notebooks").glob("*.ipynb"))
    for name in notebooks:
        if name not in known:
            raise params.ParameterError(
                f"there is no notebook {name}{params.near(name, known)}; known are {', '.join(known)}"
            )
    files = [file for file in parameter_files(root) if file.stem.partition("_")[0] == tier]
    for name in notebooks or known:
        if not any(file.parent.name == name for file in files):
            message = f"params/{name}/{tier}.yaml is not there"
            if notebooks:
                raise params.ParameterError(message)
            print(f"  {name}: skipped, {message}")
    return [file for file in files if file.parent.name in (notebooks or known)]


def check_writable(root: Path, jobs: list[Job]) -> None:
    """OSError that names the folder, before hours of computing, when results could not be written."""
    for folder in sorted({job.result.parent for job in jobs}):
        probe = root / folder / f".probe-{os.getpid()}"
        try:
            record.write_atomic(probe, "can this be written?")
        except OSError as error:
            raise OSError(error.errno, f"{folder.as_posix()}/: {error.strerror}") from None
        probe.unlink()


def run_command(root: Path, options: argparse.Namespace) -> int:
    """`leanvit run`."""
    problems, jobs = [], []
    if bool(options.params) == bool(options.tier) or (options.notebook and not options.tier):
        raise params.ParameterError("name either parameter files or --tier, e.g. `leanvit run --tier smoke`")
    files = [Path(file) for file in dict.fromkeys(options.params)] or select(root, options.tier, options.notebook)
    for file in files:
        try:
            jobs.append(plan(root, file, dict(options.p)))
        except params.ParameterError as error:
            problems.append(str(error))
    if problems:
        raise params.ParameterError("\n".join(problems))
    check_writable(root, jobs)
    if options.ray:
        _connect_to_ray()
    per_run = (
        1 if any(job.tier in ("gpu", "paper") for job in jobs) and not options.ray else max(1, record.cores() // 2)
    )
    at_once = options.jobs or per_run
    print(f"{len(jobs)} run(s), {min(at_once, max(1, len(jobs)))} at once", flush=True)
    outcomes = execute(
        root,
        jobs,
        at_once=at_once,
        force=options.force,
        ray=options.ray,
        after=lambda: _render(root) if options.report else None,
    )
    if options.report:
        print(f"rendered: {_render(root)}")
    print(f"\n{summary_table(root, outcomes)}")
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _connect_to_ray() -> None:
    try:
        import ray
    except ImportError:
        raise params.ParameterError("--ray needs Ray, which is not installed: pip install 'leanvit[cluster]'") from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)


def _render(root: Path) -> str:
    from leanvit import report

    return report.build(root).relative_to(root).as_posix()


def list_command(root: Path) -> int:
    """`leanvit list`."""
    checkout = record.checkout_id(root)
    rows = []
    for file in parameter_files(root):
        try:
            job = plan(root, file)
            kind, why = state(root, job, checkout)
            rows.append((job.params_file, kind, f"{job.result.as_posix()}{f' ({why})' if why else ''}"))
        except params.ParameterError as error:
            rows.append((file.relative_to(root).as_posix(), "invalid", str(error).splitlines()[0]))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    for name, kind, where in rows:
        print(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {where}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line as argparse sees it."""
    top = argparse.ArgumentParser("leanvit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run", help="execute notebooks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run.add_argument("params", nargs="*", help="parameter files, params/<notebook>/<run>.yaml")
    run.add_argument("--tier", help=f"all files of a tier: {', '.join(TIERS)}")
    run.add_argument("--notebook", nargs="+", default=[], metavar="NAME", help="with --tier: only these")
    run.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="override a parameter (repeatable)"
    )
    run.add_argument("--force", action="store_true", help="run even what is up to date")
    run.add_argument(
        "--jobs", type=int, metavar="N", help="runs at once (default: one for each two cores; one on a GPU)"
    )
    run.add_argument("--ray", action="store_true", help="spread the runs over a Ray cluster (needs leanvit[cluster])")
    run.add_argument("--report", action="store_true", help="render outputs/site/ after each run")
    commands.add_parser("list", help="parameter files and the state of their results")
    commands.add_parser("report", help="render outputs/ as a static site")
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console command; returns the exit code."""
    options = parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is a Ctrl-C
    try:
        root = record.find_root()
        if options.command == "run":
            if options.jobs is not None and options.jobs < 1:
                raise params.ParameterError(f"--jobs {options.jobs}: must be at least 1")
            return run_command(root, options)
        if options.command == "list":
            return list_command(root)
        print(_render(root))
        return 0
    except (params.ParameterError, FileNotFoundError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"leanvit: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
