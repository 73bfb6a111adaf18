"""The runner: parameters checked first, one process a run, fresh results skipped, nothing lost by kill or Ctrl-C."""

import base64
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import matplotlib.pyplot as plt
import numpy as np
import psutil
import pytest
from conftest import PARAMETERS
from PIL import Image

from leanvit import params, plots, pool, record, run, worker

CELL = "lr: float = 1e-3  # learning rate [> 0]\nfactor: float | None = None\nshots: list[int] = [5, 20]  # [1..64]"


def wait_for(condition, seconds=60.0):
    """Until `condition()` is true; fails the test when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


# ---- parameters


def test_declarations_carry_type_default_help_and_range():
    found = params.parse_cell(PARAMETERS + "\n" + "flag: bool = True", "here")
    assert list(found) == ["lr", "steps", "method", "seed", "flag"]
    assert found["lr"] == params.Parameter("lr", "float", 1e-3, "learning rate", low=0.0, low_open=True)
    assert (found["steps"].low, found["steps"].high) == (1, 100)
    assert found["method"].choices == ("exact", "lora")
    assert found["flag"].help == ""


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("lr = 1", "name: type = default"),
        ("lr: float", "name: type = default"),
        ("lr: complex = 1", "has the type complex"),
        ("lr: list[list[int]] = []", "has the type list"),
        ("lr: float = -1.0  # rate [> 0]", "the default of lr is -1.0"),
        ("lr: int = 1.5", "must be an integer"),
        ("lr: float = nothing", "must be a plain value"),
        ("lr: float = (", "parameters cell, line 1"),
    ],
)
def test_malformed_declarations_are_named(cell, message):
    with pytest.raises(params.ParameterError, match="nb.ipynb.*" + message.replace("[", r"\[")):
        params.parse_cell(cell, "nb.ipynb")


def test_yaml_numbers_are_numbers(tmp_path):
    file = tmp_path / "smoke.yaml"
    file.write_text("lr: 1e-3\nfactor: null\nshots: [1, 2]\n")
    values = params.resolve(params.parse_cell(CELL, "nb"), params.read_values(file), "smoke.yaml")
    assert values == {"lr": 0.001, "factor": None, "shots": [1, 2]}
    assert isinstance(
        params.resolve(params.parse_cell(CELL, "nb"), {"lr": 1}, "f")["lr"], float
    )  # int is fine for float
    assert params.parse_value("1e-3") == 0.001
    assert params.parse_value("[1, 2]") == [1, 2]
    assert params.parse_value("yes") == "yes"  # YAML 1.2: no surprise truth value
    assert params.parse_value("a: b: c") == "a: b: c"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lrr": 1}, r"f.yaml: lrr = 1 \(an integer\): there is no such parameter \(did you mean lr\?\)"),
        ({"qqqqq": 1}, "known are lr, steps, method, seed"),
        ({"lr": "1e-3"}, r"f.yaml: lr = '1e-3' \(text\): must be a number > 0 \(learning rate\)"),
        ({"lr": 0}, r"lr = 0 \(an integer\): must be a number > 0"),
        ({"lr": True}, "lr = True"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"lr": float("inf")}, "lr = inf"),
        ({"lr": None}, "lr = null: must be a number > 0"),
        ({"steps": True}, r"steps = True \(a truth value\): must be an integer from 1 to 100"),
        ({"steps": 3.0}, r"steps = 3.0 \(a number\): must be an integer from 1 to 100"),
        ({"steps": 101}, "from 1 to 100"),
        ({"steps": [1]}, r"steps = \[1\] \(a list\)"),
        ({"method": "Exact"}, "must be one of exact, lora"),
        ({"lr": -1, "seed": -1}, "(?s)lr = -1.*\n.*seed = -1"),  # all problems at once
    ],
)
def test_wrong_values_are_named(given, message):
    with pytest.raises(params.ParameterError, match=message):
        params.resolve(params.parse_cell(PARAMETERS, "nb"), given, "f.yaml")


def test_list_items_are_checked():
    with pytest.raises(params.ParameterError, match="a list, each item an integer from 1 to 64"):
        params.resolve(params.parse_cell(CELL, "nb"), {"shots": [5, 65]}, "f.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- lr: 1\n", r"a list.*must hold 'name: value' lines"),
        ("just text\n", "must hold 'name: value' lines"),
        ("lr: 1\nsteps: 2\nlr: 3\n", "line 3: the key lr stands twice"),
        ("lr: [1\n", "not valid YAML"),
        ("lr: !!python/object:os.system 1\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("\x00", "cannot be read"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    file = tmp_path / "smoke.yaml"
    file.write_text(text)
    with pytest.raises(params.ParameterError, match="smoke.yaml.*" + message):
        params.read_values(file)


# ---- what runs where


def test_results_of_tiers_and_overrides(repository):
    repository.notebook("1_x")
    files = [repository.params("1_x", name) for name in ("smoke", "paper_efl1_cifar100", "my_idea")]
    results = [run.plan(repository.root, file).result.as_posix() for file in files]
    assert results == [
        "outputs/smoke/1_x.json",
        "outputs/paper/1_x.efl1_cifar100.json",
        "outputs/custom/1_x.my_idea.json",
    ]
    first, second = (run.plan(repository.root, files[0], {"lr": lr}) for lr in ("0.1", "0.2"))
    assert first.result.parent.as_posix() == "outputs/custom"
    assert first.result != second.result
    assert first.parameters["lr"] == 0.1 and first.overrides == {"lr": 0.1}


def test_errors_before_anything_starts(repository):
    repository.notebook("1_x")
    repository.params("1_x", text="lr: 1\nstep: 3")
    repository.params("1_x", "embedded", "steps: many")
    code, output = repository.call("run", "params/1_x/smoke.yaml", "params/1_x/embedded.yaml")
    assert code == 2
    assert "params/1_x/smoke.yaml: step = 3 (an integer): there is no such parameter (did you mean steps?)" in output
    assert "params/1_x/embedded.yaml: steps = 'many' (text): must be an integer from 1 to 100" in output
    assert str(repository.root) not in output and "Traceback" not in output
    assert not (repository.root / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "name either parameter files or --tier"),
        (["run", "params/1_x/smok.yaml"], "did you mean params/1_x/smoke.yaml?"),
        (["run", "--tier", "smoke", "--notebook", "1_y"], "did you mean 1_x?"),
        (["run", "--tier", "gpu", "--notebook", "1_x"], "params/1_x/gpu.yaml is not there"),
        (["run", "--tier", "gpu"], "no notebook has the tier gpu"),
        (["run", "--tier", "smoek"], "did you mean smoke?"),
        (["run", "--tier", "smoke", "--cluster", "auto", "--print-commands"], "exclude each other"),
        (["run", "--tier", "smoke", "--jobs", "0"], "must be at least 1"),
        (["run", "params/1_x/smoke.yaml", "-p", "lr", "fast"], "-p: lr = 'fast' (text): must be a number > 0"),
    ],
)
def test_command_line_errors(repository, monkeypatch, capsys, arguments, message):
    repository.notebook("1_x")
    repository.params("1_x")
    monkeypatch.chdir(repository.root)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    assert run.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_outside_of_a_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    assert run.main(["list"]) == 2
    assert "no repository of leanvit" in capsys.readouterr().err


def test_unwritable_outputs_and_full_disk_are_named(repository, monkeypatch):
    repository.notebook("1_x")
    job = run.plan(repository.root, repository.params("1_x"))
    (repository.root / "outputs").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="outputs/smoke/ cannot be written"):
        run.check_writable(repository.root, [job])
    (repository.root / "outputs").unlink()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(OSError, match="outputs/smoke/ cannot be written: No space left on device"):
        run.check_writable(repository.root, [job])
    assert list((repository.root / "outputs" / "smoke").iterdir()) == []


# ---- running


VERDICTS = """\
for verdict in ("matches", "differs", "not run", "matches"):
    run.verdicts.append({"verdict": verdict, "why": "because"})"""


def test_runs_renders_skips_and_survives_failures(repository):
    """One sweep over a good, a failing and a silent notebook; then what is done is not done again."""
    hello = "import warnings\nprint('here:', run.root / 'x', run.tier)\nwarnings.warn('careful')"
    repository.notebook("1_good", hello, VERDICTS)
    repository.notebook("2_fails", "fine = 1", "1 / 0")
    repository.notebook("3_silent", save="print('forgot to save')")
    for name in ("1_good", "2_fails", "3_silent"):
        repository.params(name, text="lr: 1e-2")
    code, output = repository.call("run", "--tier", "smoke", "--jobs", "2", "--report")
    assert code == 1
    assert "smoke/1_good: done in" in output and ": 3 steps at 0.01" in output
    assert "cell 5: 1 / 0" in output and "ZeroDivisionError: division by zero" in output
    assert "wrote none; its last cell must call run.save()" in output
    assert output.count("FAILED") == 2
    row = next(line for line in output.splitlines() if line.startswith("smoke/1_good    3 steps at 0.01"))
    assert row.split()[5:8] == ["2", "1", "1"]
    assert (repository.root / "outputs" / "site" / "smoke" / "1_good.html").exists()
    smoke = repository.root / "outputs" / "smoke"
    assert [path.name for path in smoke.glob("*.json")] == ["1_good.json"]
    assert sorted(path.name for path in smoke.glob("*.failed.ipynb")) == [
        "2_fails.failed.ipynb",
        "3_silent.failed.ipynb",
    ]
    assert not list(smoke.glob("*.partial.ipynb")) and not list(smoke.glob(".*"))

    result = repository.result("smoke/1_good.json")
    assert record.incomplete(result) == []
    assert result["parameters"] == {"lr": 0.01, "steps": 3, "method": "exact", "seed": 0}
    assert (result["run"], result["tier"], result["params_file"]) == ("1_good", "smoke", "params/1_good/smoke.yaml")
    executed = (smoke / "1_good.ipynb").read_text()
    assert '"here: x smoke\\n"' in executed
    assert "<cell>:3: UserWarning: careful" in executed and "ipykernel_" not in executed
    assert str(repository.root) not in executed and "papermill" not in executed and 'execution"' not in executed

    code, output = repository.call("run", "--tier", "smoke", "--notebook", "1_good")
    assert code == 0 and "smoke/1_good: up to date" in output and "started" not in output
    assert repository.result("smoke/1_good.json") == result

    (repository.root / ".cache" / "checkout_id").write_text("another clone")
    assert "from elsewhere" in repository.call("list")[1]
    repository.params("1_good", text="lr: 2e-2")
    _, listing = repository.call("list")
    assert "stale" in listing and "parameters changed" in listing and "failed" in listing


def store_result(root, job, seconds):
    """A complete result of a job that took so long."""
    (root / job.result).parent.mkdir(parents=True, exist_ok=True)
    (root / job.result).write_text(json.dumps(dict.fromkeys(record.FIELDS, "x") | {"seconds": seconds}))


def standing(root, seconds):
    """Jobs named a, b, c ..., a result with its seconds on the disk for those that are given."""
    due = []
    for name, time_ in seconds.items():
        job = pool.Job(name, "smoke", f"params/{name}/smoke.yaml", {}, {}, Path("outputs/smoke") / f"{name}.json")
        due.append((job, "stale"))
        if time_ is not None:
            store_result(root, job, time_)
    return due


@pytest.mark.parametrize(
    "seconds, order",
    [
        ([None, None, None, None], "abcd"),
        ([40.0, 10.0, 90.0, 20.0], "bcad"),
        ([None, None, "soon", 10.0], "abcd"),
        ([float(n) for n in range(9, 0, -1)], "abcdefghi"),
        ([5.0], "a"),
        ([], ""),
    ],
)
def test_runs_are_balanced_by_the_seconds_of_their_results(seconds, order, tmp_path):
    due = standing(tmp_path, dict(zip("abcdefghi", seconds, strict=False)))
    assert "".join(job.notebook for job, _ in pool.balanced(tmp_path, due, 2)) == order


def test_no_core_waits_at_the_end(tmp_path):
    """Seven runs on two cores, as they were measured: half of their sum, and a first page after the quickest."""
    seconds = dict(zip("abcdefg", (239.0, 378.0, 324.0, 455.0, 364.0, 363.0, 455.0), strict=True))
    order = [seconds[job.notebook] for job, _ in pool.balanced(tmp_path, standing(tmp_path, seconds), 2)]
    free = [0.0, 0.0]
    for t in order:
        free[free.index(min(free))] += t
    assert max(free) <= 1.01 * sum(seconds.values()) / 2 and 239.0 in order[:2]


SLOW = """\
import os, time
run.checkpoints.mkdir(parents=True, exist_ok=True)
progress = run.checkpoints / "progress"
began_at = int(progress.read_text()) if progress.exists() else 0
(run.checkpoints / "kernel").write_text(str(os.getpid()))
try:
    time.sleep(60 if began_at < 3 else 0)
except KeyboardInterrupt:
    progress.write_text("1")
    raise
run.metrics["began_at"] = began_at"""


def gone(processes):
    """Whether none of them computes any more."""
    return all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in processes)


def test_an_interrupted_run_goes_on_from_its_checkpoint(repository):
    """Ctrl-C, kill -9 of the kernel, kill -9 of the runner: no process is left, the next call finds the checkpoint."""
    repository.notebook("1_slow", SLOW)
    repository.params("1_slow")
    smoke = repository.root / "outputs" / "smoke"
    seen = set()

    def new_kernel():
        found = [int(path.read_text() or 0) for path in smoke.glob("checkpoints/1_slow/*/kernel")]
        return next((pid for pid in found if pid and pid not in seen), None)

    for step, how in enumerate(("ctrl-c", "kill -9 of the kernel", "kill -9 of the runner")):
        process = repository.leanvit("run", "--tier", "smoke")
        wait_for(new_kernel)
        kernel = psutil.Process(new_kernel())
        seen.add(kernel.pid)
        family = psutil.Process(process.pid).children(recursive=True)
        assert kernel in family and kernel.parent() in family  # runner, worker, kernel
        if how == "ctrl-c":
            process.send_signal(signal.SIGINT)  # here the notebook saves
        else:
            next(smoke.glob("checkpoints/1_slow/*/progress")).write_text(str(step + 1))  # a periodic checkpoint
            (kernel if how == "kill -9 of the kernel" else process).kill()
        output, _ = process.communicate(timeout=30)
        expected = {"ctrl-c": (130, "stopping 1 run(s)"), "kill -9 of the kernel": (1, "Kernel died")}
        code, text = expected.get(how, (-signal.SIGKILL, ""))
        assert process.returncode == code and text in output, how
        wait_for(lambda family=family: gone(family), 5)
        assert not (smoke / "1_slow.json").exists()
        assert (smoke / "1_slow.failed.ipynb").exists() == (how != "ctrl-c"), how

    code, output = repository.call("run", "--tier", "smoke")
    assert code == 0, output
    assert repository.result("smoke/1_slow.json")["metrics"]["began_at"] == 3
    assert not list((smoke / "checkpoints").iterdir()) and not (smoke / "1_slow.failed.ipynb").exists()


def test_what_a_runner_killed_at_the_end_left_is_removed(repository):
    """The result is in place, its runner had no time to tidy up; what is younger belongs to a later call, and stays."""
    repository.notebook("1_ends", "(run.checkpoints / 'a').mkdir(parents=True)")
    job = run.plan(repository.root, repository.params("1_ends"))
    worker = pool.Local(repository.root, job, threads=1)
    wait_for(lambda: worker.poll() is not None)
    log, failed, checkpoints = (repository.root / path for path in (job.log, job.failed, job.checkpoints))
    assert worker.poll() == 0 and log.exists() and checkpoints.exists()
    failed.write_text("of an earlier call")
    os.utime(failed, (0, 0))
    code, told = repository.call("run", "--tier", "smoke")
    assert code == 0 and "1_ends: up to date" in told
    assert not any(path.exists() for path in (log, failed, checkpoints))

    rows = checkpoints / "key" / "rows.json"
    rows.parent.mkdir(parents=True)
    for path in (log, failed, rows):
        path.write_text("of a forced run")
    os.utime(checkpoints, (0, 0))
    os.utime(rows.parent, (0, 0))
    assert "up to date" in repository.call("run", "--tier", "smoke")[1]
    assert log.exists() and failed.exists() and rows.exists()

    os.utime(rows, (0, 0))  # a tidying that was killed itself leaves young folders
    os.utime(checkpoints)
    with filelock.FileLock(repository.root / job.lock):  # at work: a run that goes on from old rows
        assert "up to date" in repository.call("run", "--tier", "smoke")[1] and rows.exists()
    assert "up to date" in repository.call("run", "--tier", "smoke")[1]
    assert not checkpoints.exists() and log.exists() and failed.exists()


def test_a_forced_run_does_not_go_on_from_what_a_finished_one_left(repository):
    """Its runner was killed before it could remove the checkpoints."""
    repository.notebook("1_ends", "run.checkpoints.mkdir(parents=True, exist_ok=True)\n"
                        "run.metrics['rows'] = (run.checkpoints / 'rows').exists()\n"
                        "(run.checkpoints / 'rows').touch()")  # fmt: skip
    job = run.plan(repository.root, repository.params("1_ends"))
    worker = pool.Local(repository.root, job, threads=1)
    wait_for(lambda: worker.poll() is not None)
    assert (repository.root / job.checkpoints).exists()
    assert repository.call("run", "--tier", "smoke", "--force")[0] == 0
    assert repository.result("smoke/1_ends.json")["metrics"]["rows"] is False


def test_commands_for_a_slurm_array(repository):
    """One command for each run that is due, on standard output alone; nothing runs; each command does its run."""
    repository.notebook("1_x")
    for name in ("smoke", "paper_a", "paper_b b"):
        repository.params("1_x", name)
    command = [sys.executable, "-m", "leanvit.run", "run", "--print-commands"]

    def printed(*arguments):
        done = subprocess.run([*command, *arguments], cwd=repository.root, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), done.stderr

    lines, _ = printed("--tier", "paper")
    assert [line.rsplit("/", 1)[1] for line in lines] == ["paper_a.yaml", "paper_b b.yaml'"]
    assert not list((repository.root / "outputs").rglob("*.json"))
    with_override, _ = printed("params/1_x/smoke.yaml", "-p", "method", "lora")
    assert with_override[0].endswith("smoke.yaml -p method lora")
    elsewhere = repository.root.parent
    done = subprocess.run(lines[1], shell=True, cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert repository.result("paper/1_x.b b.json")["tier"] == "paper"
    lines, told = printed("--tier", "paper")
    assert len(lines) == 1 and "paper_a.yaml" in lines[0] and "paper/1_x.b b: up to date" in told
    lines, _ = printed("--tier", "paper", "--force")
    assert len(lines) == 2 and all(line.endswith(" --force") for line in lines)


def test_environment_of_a_run(repository, monkeypatch):
    repository.notebook("1_x")
    job = run.plan(repository.root, repository.params("1_x"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    environment = pool._environment(job, 2)
    assert "MPLBACKEND" not in environment  # the kernel's inline backend draws into the notebook
    assert (environment["OMP_NUM_THREADS"], environment["TQDM_DISABLE"]) == ("2", "1")


def test_a_notebook_that_measures_time_runs_alone(repository):
    for name, metadata in (("1_a", {}), ("2_b", {"leanvit": {"alone": True}}), ("3_c", {}), ("4_d", {})):
        repository.notebook(name, **metadata)
        repository.params(name)
    jobs = [run.plan(repository.root, file) for file in run.parameter_files(repository.root)]
    log, given = [], {}

    class Pretend:
        seconds = 0.0

        def __init__(self, root, job, threads):
            self.name, self.polls = job.name, 0
            log.append(("start", self.name))
            given[self.name] = threads

        def poll(self):
            self.polls += 1
            if self.polls < 2:
                return None
            log.append(("end", self.name))
            return 1

    pool.execute(repository.root, [(job, "missing") for job in jobs], at_once=2, threads=1, launch=Pretend)
    assert given == {"1_a": 1, "3_c": 1, "4_d": 1, "2_b": 2}  # alone, it has the cores of all
    assert log[:2] == [("start", "1_a"), ("start", "3_c")]
    assert log[-2:] == [("start", "2_b"), ("end", "2_b")]

    for job, seconds in zip(jobs, (5.0, 1.0, 5.0, 2.0), strict=True):  # known times
        store_result(repository.root, job, seconds)
    log.clear()
    pool.execute(repository.root, [(job, "stale") for job in jobs], at_once=2, threads=1, launch=Pretend)
    assert [name for what, name in log if what == "start"] == ["1_a", "4_d", "3_c", "2_b"]


def test_figures_of_an_executed_notebook_are_stored_with_a_palette():
    def png(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode() + "\n"

    def pixels(text):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)

    fig, ax = plots.figure(width=4, height=3)
    for k in range(8):
        ax.plot(np.sin(np.linspace(0, 9, 50) + k), label=f"curve {k}")
    ax.legend()
    file = io.BytesIO()
    fig.savefig(file)
    plt.close(fig)
    full = base64.b64encode(file.getvalue()).decode() + "\n"
    small = worker._with_palette(full)
    assert len(small) < 0.5 * len(full)
    assert small == worker._with_palette(full)  # the same bytes every time
    assert np.abs(pixels(small) - pixels(full)).mean() < 0.5  # of 255
    see_through = png(Image.new("RGBA", (50, 50), (0, 0, 0, 0)))
    assert worker._with_palette(see_through) == see_through  # a palette has no shades of transparency
    tiny = png(Image.new("RGB", (1, 1)))
    assert len(worker._with_palette(tiny)) <= len(tiny)  # never larger


def test_a_file_from_elsewhere_does_not_replace_a_committed_result(repository, tmp_path_factory):
    repository.notebook("1_x")
    own = repository.params("1_x", "embedded", "{}")
    other = tmp_path_factory.mktemp("elsewhere") / "1_x" / "embedded.yaml"
    other.parent.mkdir()
    other.write_text("lr: 0.5")
    assert run.plan(repository.root, own).result == Path("outputs/embedded/1_x.json")
    assert run.plan(repository.root, other).result == Path("outputs/custom/1_x.embedded.json")


@pytest.mark.parametrize(
    ("cores", "jobs", "asked", "at_once", "threads"),
    [(2, 8, None, 2, 1), (1, 8, None, 1, 1), (16, 8, None, 8, 2), (2, 1, None, 1, 2), (8, 8, 2, 2, 4)],
)
def test_one_run_a_core(monkeypatch, cores, jobs, asked, at_once, threads):
    monkeypatch.setattr(record, "cores", lambda: cores)
    job = SimpleNamespace(tier="embedded")
    options = SimpleNamespace(cluster=None, jobs=asked)
    for due in (jobs, 1):  # the last one of an interrupted batch has the threads, and so the numbers, of the others
        _, most, each, told = run._place(Path(), [job] * jobs, [job] * due, options)
        assert (most, each) == (at_once, threads) and told == f"{min(at_once, due)} at once, {threads} thread(s) each"


def test_a_damaged_result_is_not_fresh(repository):
    repository.notebook("1_x")
    job = run.plan(repository.root, repository.params("1_x"))
    path = repository.root / job.result
    record.write_atomic(path, '{"notebook": ')
    assert run.state(repository.root, job, "here")[0] == "missing"
    record.write_atomic(path, json.dumps({"notebook": "1_x"}))
    kind, why = run.state(repository.root, job, "here")
    assert kind == "stale" and "no parameters" in why
