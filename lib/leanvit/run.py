"""The command line: check the parameters of every run, execute each in a process of its own, skip what is done, tell.

    leanvit run params/1_lbp_wht/embedded.yaml [-p lr 1e-3]   one run, or several files; -p overrides
    leanvit run --tier smoke [--notebook 1_lbp_wht]           every notebook that has this tier
    leanvit run --tier paper --cluster auto                   on a Ray cluster (--print-commands: for Slurm arrays)
    leanvit list                                              parameter files, and the state of each result
    leanvit claims [--paper comcat] [--verdict differs]       every published number beside ours
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
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from leanvit import atomic, claims, extras, params, pool, record
from leanvit.pool import Job, Outcome

TIERS = ("smoke", "embedded", "gpu", "paper")


def plan(root: Path, file: Path, overrides: dict[str, str] | None = None) -> Job:
    """The job of a parameters file, everything checked; `params.ParameterError` says what is wrong."""
    file = (file if file.is_absolute() else Path.cwd() / file).resolve()
    shown = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
    if not file.is_file():
        known = [path.relative_to(root).as_posix() for path in parameter_files(root)]
        hint = params.near(shown, known)
        raise params.ParameterError(f"{shown}: no such file{hint}; `leanvit list` shows what there is")
    notebook = file.parent.name
    try:
        known = params.declared(root / "notebooks" / f"{notebook}.ipynb")
        values = params.resolve(known, params.read_values(file), shown)
    except params.ParameterError as error:
        raise params.ParameterError(str(error).replace(str(file), shown).replace(f"{root}/", "")) from None
    word, _, rest = file.stem.partition("_")
    own = file.is_relative_to(root / "params")  # a file from elsewhere must not replace a committed result
    tier, stem = (word, rest) if word in TIERS and own else ("custom", file.stem)
    parsed = {name: params.parse_value(text) for name, text in (overrides or {}).items()}
    if parsed:
        asked = params.resolve(known, parsed, "-p")
        values.update({name: asked[name] for name in parsed})
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
    failed = (root / job.failed).exists()
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        problems = record.incomplete(result)
    except FileNotFoundError:
        return ("failed", f"see {job.failed.as_posix()}") if failed else ("missing", "")
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
    """The parameter files of a tier, of the notebooks named (or of all); `ParameterError` when there are none."""
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
            print(f"  {name}: skipped, {message}", file=sys.stderr)
    files = [file for file in files if file.parent.name in (notebooks or known)]
    if not files:
        raise params.ParameterError(f"no notebook has the tier {tier}: there is no params/*/{tier}*.yaml")
    return files


def check_writable(root: Path, jobs: list[Job]) -> None:
    """`OSError` that names the folder, before hours of computing, when results could not be written."""
    for folder in sorted({job.result.parent for job in jobs}):
        try:
            atomic.check_writable(root / folder)
        except OSError as error:
            raise OSError(f"{folder.as_posix()}/ cannot be written: {error.strerror or error}") from None


def run_command(root: Path, options: argparse.Namespace) -> int:
    """`leanvit run`: the exit code, 1 where a run failed.

    Raises, before anything runs, `params.ParameterError` with every problem of the files and options, `OSError` where
    results cannot be written, `MissingExtra` without papermill.
    """
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
    if options.cluster and options.print_commands:
        raise params.ParameterError("--cluster and --print-commands exclude each other")
    check_writable(root, jobs)
    if options.print_commands:
        return _print_commands(root, dict(zip([job.result for job in jobs], files, strict=True)), jobs, options)
    extras.need("running notebooks", "notebooks", "papermill", "ipykernel")
    outcomes, due = _sort_out(root, jobs, options.force)
    launch, at_once, threads, where = _place(root, jobs, [job for job, _ in due], options)
    print(f"{len(due)} run(s), {where}" if due else f"all {len(jobs)} run(s) are up to date", flush=True)
    outcomes += pool.execute(
        root,
        due,
        at_once=at_once,
        threads=threads,
        launch=launch,
        after=lambda: _render(root) if options.report else None,
    )
    if options.report and (index := _render(root)):
        print(f"rendered: {index}")
    print(f"\n{summary_table(root, outcomes)}")
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _sort_out(root: Path, jobs: list[Job], force: bool) -> tuple[list[Outcome], list[tuple[Job, str]]]:
    """What is done already, tidied up, and what is due with the reason why."""
    checkout = record.checkout_id(root)
    fresh, due = [], []
    for job in jobs:
        kind, why = state(root, job, checkout)
        if kind == "fresh":
            pool.tidy(root, job)
        if kind == "fresh" and not force:
            print(f"  {job.label}: up to date", flush=True)
            fresh.append(Outcome(job, "up to date"))
        else:
            due.append((job, "forced" if kind == "fresh" else why or kind))
    return fresh, due


def _place(root: Path, jobs: list[Job], due: list[Job], options: argparse.Namespace) -> tuple[Callable, int, int, str]:
    """What starts a run, how many at once, threads of each, and this in words.

    The threads follow from all jobs that were asked for, whichever are due: sums in another order round differently,
    and a batch that was interrupted should end with the numbers of one that was not.
    """
    if options.cluster:
        from leanvit.cluster import Cluster

        nodes = Cluster(root, options.cluster)
        nodes.check(due)
        return nodes.launch, options.jobs or max(1, len(due)), 1, f"on a cluster of {len(nodes.nodes)} node(s)"
    on_gpu = any(job.tier in ("gpu", "paper") for job in jobs)
    at_once = min(options.jobs or (1 if on_gpu else record.cores()), len(jobs))
    threads = max(1, record.cores() // at_once)
    return pool.Local, at_once, threads, f"{min(at_once, len(due))} at once, {threads} thread(s) each"


def _print_commands(root: Path, files: dict[Path, Path], jobs: list[Job], options: argparse.Namespace) -> int:
    """A shell command for each run that is due, one a line; what is up to date is told on standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        _, due = _sort_out(root, jobs, options.force)
    for job, _ in due:
        words = [sys.executable, "-m", "leanvit.run", "run", str(files[job.result].resolve())]
        words += [word for name, value in options.p for word in ("-p", name, value)]
        print(f"cd {shlex.quote(str(root))} && {shlex.join(words + ['--force'] * options.force)}")
    return 0


def _render(root: Path) -> str | None:
    """The path of the index; a page that cannot be rendered says so, and costs no run."""
    extras.need("rendering", "notebooks", "nbformat", "nbconvert", "latex2mathml")
    from leanvit import report

    try:
        return report.build(root).relative_to(root).as_posix()
    except Exception as error:
        print(f"leanvit: the site cannot be rendered: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None


def list_command(root: Path) -> int:
    """`leanvit list`; the exit code."""
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


def claims_command(root: Path, options: argparse.Namespace) -> int:
    """`leanvit claims`; the exit code. Raises `params.ParameterError` for a paper or verdict that is not there."""
    from leanvit import ledger

    rows = ledger.rows(root, options.paper, options.verdict)
    if options.out is None:
        print(ledger.text(rows), end="")
        return 0
    page = options.out.suffix == ".html"
    head = '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>leanvit: ledger</title>\n'
    record.write_atomic(options.out, f"{head}{ledger.html(rows)}</html>\n" if page else ledger.text(rows))
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
        "--jobs", type=int, metavar="N", help="runs at once (default: one a core; one on a GPU)"
    )
    run.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="spread the runs over a running Ray cluster: auto (the one this machine belongs to) or its address "
        "(needs leanvit[cluster])",
    )
    run.add_argument(
        "--print-commands", action="store_true", help="run nothing: print a shell command a run, for a Slurm array"
    )
    run.add_argument("--report", action="store_true", help="render outputs/site/ after each run")
    commands.add_parser("list", help="parameter files and the state of their results")
    ledger = commands.add_parser("claims", help="every published number beside ours")
    ledger.add_argument("--paper", help="only this paper or notebook, e.g. comcat")
    ledger.add_argument("--verdict", help=f"only these: {', '.join(claims.VERDICTS)}")
    ledger.add_argument("--out", type=Path, metavar="FILE", help="write it there: HTML to *.html, else text")
    commands.add_parser("report", help="render outputs/ as a static site")
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console command; returns the exit code. A `ParameterError` or `OSError` becomes a line and 2,
    Ctrl-C 130.
    """
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
        if options.command == "claims":
            return claims_command(root, options)
        index = _render(root)
        print(index or "")
        return int(index is None)
    except (params.ParameterError, extras.MissingExtra, OSError) as error:
        print(f"leanvit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
