"""Kill a batch with `kill -9` at random moments, start it again, and compare its results with an undisturbed run's.

    python tools/kill_test.py CLONE                                  `make reproduce` in CLONE, killed 20 times
    python tools/kill_test.py CLONE --moments 50 --seed 1
    python tools/kill_test.py CLONE --command "make smoke NOTEBOOK=1_lbp_wht"
    python tools/kill_test.py CLONE --command ".venv/bin/leanvit run --tier smoke --notebook 0_backbone 1_lbp_wht"

CLONE is a clone of this repository made for this test, with its .venv (`make -C CLONE setup`): its outputs/ and .cache/
are removed, again and again. At each moment the runner, a worker or a kernel is killed, whichever runs; once the runner
is dead nothing may compute any more, and what is in outputs/ must be whole. In the end every result must have the
undisturbed run's numbers, and no file may be left over. Numbers that measure time or memory are not compared; --ignore
says which (a regular expression of their names). The exit code is 0 when all is well. It takes about three times as
long as the command itself.
"""

import argparse
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from leanvit import record

KINDS = {"runner": r"leanvit(\.run)? run", "worker": r"leanvit\.worker", "kernel": r"ipykernel_launcher"}
MEASURED = r"(?i)seconds|_s$|_ms|\bms\b|latency|time|speed|faster|throughput|per_s|memory|mib|clock|threads"
MEASURED += "|advice|serving|fronts"  # of 6_side_by_side: chosen by measured times
COMPARED = "notebook run tier params_file overrides headline parameters seeds notes sources".split()
OWN = {process.pid for process in (psutil.Process(), *psutil.Process().parents())}  # may have been started in CLONE
GONE_S = 20.0  # for workers and kernels to notice that the runner is dead


class Failed(Exception):
    """What the batch left behind is not as it should be."""


def processes(root: Path) -> list[psutil.Process]:
    """All that run in the repository, whatever became of their parents; not this test, should it be started there."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        cwd, alive = process.info["cwd"], process.info["status"] != psutil.STATUS_ZOMBIE
        if cwd and alive and process.pid not in OWN and Path(cwd).is_relative_to(root):
            found.append(process)
    return found


def by_kind(root: Path) -> dict[str, list[psutil.Process]]:
    """Runner, workers and kernels that run just now, without launchers that only hand the command on."""
    found: dict[str, list[psutil.Process]] = {}
    for process in processes(root):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        kind = next((k for k, pattern in KINDS.items() if re.search(pattern, " ".join(words))), None)
        if kind:
            found.setdefault(kind, []).append(process)
    return found


def wait_until_gone(root: Path) -> None:
    """Until nothing computes any more; `Failed` names what does."""
    deadline = time.monotonic() + GONE_S
    while left := processes(root):
        if time.monotonic() > deadline:
            raise Failed(f"{len(left)} orphan(s) {GONE_S:.0f} s after the runner died: {left}")
        time.sleep(0.05)


def results(root: Path) -> dict[str, dict]:
    """The results below outputs/, each of which must be whole, with its notebook beside it."""
    found = {}
    for path in sorted((root / "outputs").glob("*/*.json")):
        if path.name.startswith(".") or path.parent.name == "site":
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise Failed(f"{path} is torn: {error}") from None
        if problems := record.incomplete(result):
            raise Failed(f"{path} is taken for whole, but: {problems}")
        cells = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
        if any(o.get("output_type") == "error" for c in cells for o in c.get("outputs", [])):
            raise Failed(f"{path.with_suffix('.ipynb')} stopped at an error")
        found[path.relative_to(root / "outputs").as_posix()] = result
    return found


def files(root: Path) -> set[str]:
    """Everything below outputs/, hidden files too."""
    return {p.relative_to(root).as_posix() for p in (root / "outputs").rglob("*") if p.is_file()}


def comparable(value, ignore: str):
    """A result without what was measured in time or memory."""
    if isinstance(value, dict):
        return {k: comparable(v, ignore) for k, v in value.items() if not (ignore and re.search(ignore, k))}
    return [comparable(v, ignore) for v in value] if isinstance(value, list) else value


def differences(before: dict[str, dict], after: dict[str, dict], ignore: str) -> list[str]:
    """Where two sets of results differ, in words."""
    found = [f"{name}: only in one of the two" for name in before.keys() ^ after.keys()]
    for name in before.keys() & after.keys():
        for key in (*COMPARED, "metrics"):
            a, b = (comparable(r[name].get(key), ignore if key == "metrics" else "") for r in (before, after))
            if a != b:
                found.append(f"{name}: {key} differs: {str(a)[:300]} | {str(b)[:300]}")
        verdicts = [[(v.get("id"), v.get("verdict")) for v in r[name]["verdicts"]] for r in (before, after)]
        if verdicts[0] != verdicts[1] and not ignore:
            found.append(f"{name}: verdicts differ")
    return found


def start(root: Path, command: list[str]) -> subprocess.Popen:
    """The batch, its words in a file outside of outputs/."""
    with open(root / "kill_test.log", "ab") as log:
        return subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def clear(root: Path) -> None:
    """As after a fresh clone."""
    for folder in ("outputs", ".cache"):
        shutil.rmtree(root / folder, ignore_errors=True)


def one_life(root: Path, command: list[str], gap, chance: random.Random, moments: int) -> tuple[list[str], int | None]:
    """Start the batch and kill parts of it until the runner is dead, or `moments` are used up, or it has ended: who was
    killed, and the exit code where it ended by itself.
    """
    batch, killed = start(root, command), []
    while len(killed) < moments:
        try:
            batch.wait(gap())
            wait_until_gone(root)
            return killed, batch.returncode
        except subprocess.TimeoutExpired:
            pass
        there = by_kind(root)
        kinds = [kind for kind in ("runner", "runner", "worker", "kernel") if kind in there]
        if not kinds:
            continue  # make is still setting up
        kind = chance.choice(kinds)
        for process in there[kind] if kind == "runner" else [chance.choice(there[kind])]:
            try:
                process.kill()
            except psutil.NoSuchProcess:  # it was just done
                continue
        killed.append(kind)
        if kind == "runner":
            batch.wait(GONE_S)
            wait_until_gone(root)
            return killed, None
        results(root)
    for process in by_kind(root).get("runner", []):
        process.kill()
    batch.wait(GONE_S)
    wait_until_gone(root)
    return killed, None


def run(root: Path, command: list[str], moments: int, seed: int, ignore: str, say=print, longest: float = 0) -> Counter:
    """The whole test; `Failed` tells what went wrong. Returns how often what was killed."""
    chance, counts = random.Random(seed), Counter()
    clear(root)
    began = time.monotonic()
    if start(root, command).wait() != 0:
        raise Failed(f"the undisturbed run failed, see {root / 'kill_test.log'}")
    seconds = time.monotonic() - began
    before, listed = results(root), files(root)
    notebooks = {p: (root / "outputs" / p).with_suffix(".ipynb").read_bytes() for p in before}
    say(f"undisturbed: {len(before)} result(s) in {seconds:.0f} s")
    longest = longest or max(6.0, 4 * seconds / moments)

    def complete() -> None:
        after = results(root)
        wrong = differences(before, after, ignore)
        if not ignore:
            changed = [p for p in after if (root / "outputs" / p).with_suffix(".ipynb").read_bytes() != notebooks[p]]
            wrong += [f"{p}: the executed notebook differs" for p in changed]
        if left := files(root) ^ listed:
            wrong.append(f"files left over, or lost: {sorted(left)}")
        if wrong:
            raise Failed("\n".join(wrong))

    clear(root)
    while (left := moments - counts.total()) > 0:
        killed, code = one_life(root, command, lambda: 0.1 + longest * chance.random() ** 2, chance, left)
        counts.update(killed)
        whole = results(root)
        how = f"ended with {code}" if code is not None else "dead"
        say(f"{counts.total():3d} of {moments}: killed {', '.join(killed) or 'nothing'}; {how}; {len(whole)} result(s)")
        if code == 0:
            complete()
            clear(root)
    for _ in range(2):  # a second call finds everything done
        if start(root, command).wait() != 0:
            raise Failed(f"the last call failed, see {root / 'kill_test.log'}")
        wait_until_gone(root)
        complete()
    say(f"killed {dict(counts)}; every result is the undisturbed run's")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--moments", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", default="make reproduce")
    parser.add_argument("--ignore", default=MEASURED, help="names of measured numbers (default: %(default)s)")
    options = parser.parse_args()
    root = options.clone.resolve()
    if not (root / "notebooks").is_dir() or root == Path(__file__).resolve().parent.parent:
        parser.error(f"{options.clone} must be a clone made for this test, another than the one this script lies in")
    try:
        run(root, shlex.split(options.command), options.moments, options.seed, options.ignore)
    except Failed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
