"""Runs on a Ray cluster: what a run asks for, and a sweep on two nodes of which one is killed in the middle."""

import json
import signal
import sys
import time
import types
import warnings
from pathlib import Path

import filelock
import psutil
import pytest

from leanvit import cluster, params, run
from leanvit.pool import Job

# Ray leaves sockets and processes to the garbage collector
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)


def job(result="outputs/paper/1_x.json", **parameters):
    """A run with these parameters."""
    return Job("1_x", "paper", "params/1_x/paper.yaml", {}, parameters, Path(result))


def wait_for(condition, seconds=90.0):
    """Until `condition()` is true, which is then returned; fails the test when it does not come true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return value


# ---- what a run asks for


@pytest.mark.parametrize(
    ("parameters", "nodes", "expected"),
    [
        ({}, [{"CPU": 16.0, "GPU": 4.0}], (4, 1)),  # a GPU and its share of the processors
        ({"processes": 2}, [{"CPU": 16.0, "GPU": 4.0}], (8, 2)),
        ({"processes": 2}, [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}], (8, 2)),
        ({"workers": 6}, [{"CPU": 16.0, "GPU": 4.0}], (7, 1)),  # a processor for each loader
        ({"workers": 99}, [{"CPU": 16.0, "GPU": 4.0}], (16, 1)),
        ({}, [{"CPU": 2.0, "GPU": 4.0}], (1, 1)),
        ({}, [{"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0}], (4, 1)),  # nodes without a GPU are no place for a run
        ({}, [{"CPU": 8.0}], (2, 0)),
        ({"processes": 3}, [{"CPU": 8.0}], (6, 0)),
        ({"processes": 3}, [{"CPU": 4.0}, {"CPU": 2.0}], (4, 0)),
        ({"workers": 3}, [{"CPU": 8.0}], (4, 0)),
        ({}, [{"CPU": 1.0}, {}], (1, 0)),
        ({"processes": None, "workers": None}, [{"CPU": 8.0}], (2, 0)),
    ],
)
def test_resources(parameters, nodes, expected):
    assert cluster.resources(job(**parameters), nodes) == expected


def test_a_run_that_fits_nowhere_is_named():
    with pytest.raises(params.ParameterError, match="paper/1_x: needs 4 GPUs; no node of the cluster has over 2"):
        cluster.resources(job(processes=4), [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}])
    with pytest.raises(params.ParameterError, match="needs 4 CPUs; no node of the cluster has over 2"):
        cluster.resources(job(processes=4), [{"CPU": 2.0}])


# ---- the work on a node, without Ray


def test_an_attempt_that_ended_well_is_not_made_again(repository):
    repository.notebook("1_x")
    planned = run.plan(repository.root, repository.params("1_x", "paper"))
    code, seconds = cluster.work_off(repository.root, planned, 1, before=None)
    assert code == 0 and seconds > 0
    path = repository.root / planned.result
    made = path.stat().st_mtime_ns
    assert cluster.work_off(repository.root, planned, 1, before=None) == (0, 0.0)
    assert path.stat().st_mtime_ns == made


def test_a_killed_process_is_no_failed_run(repository):
    """Ray tries again after WorkerDied; an exit code other than 0 is the notebook's own failure."""
    repository.notebook(
        "1_dies", "import os, psutil, signal\npsutil.Process().parent().kill()\nimport time\ntime.sleep(60)"
    )
    repository.notebook("2_fails", "1 / 0")
    dies, fails = (run.plan(repository.root, repository.params(name)) for name in ("1_dies", "2_fails"))
    with pytest.raises(cluster.WorkerDied, match="smoke/1_dies: its process was killed by signal 9"):
        cluster.work_off(repository.root, dies, 1, before=None)
    assert cluster.work_off(repository.root, fails, 1, before=None)[0] == 1


class FakeRay(types.ModuleType):
    """As much of Ray as a Task touches; `outcome` is what the task gives, None while it runs."""

    class exceptions:
        class RayError(Exception):
            """As in Ray."""

    def __init__(self, outcome=None):
        self.outcome, self.asked, self.cancelled = outcome, {}, []

    def remote(self, **options):
        self.asked |= options
        task = types.SimpleNamespace(remote=lambda *arguments: "ref")
        return lambda function: types.SimpleNamespace(options=lambda **more: self.asked.update(more) or task)

    def wait(self, refs, timeout):
        assert timeout == 0
        return (refs, []) if self.outcome is not None else ([], refs)

    def get(self, ref):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self, ref, force=False):
        self.cancelled.append(force)


def test_a_task_waits_ends_and_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "VISIBLE_TIMEOUT_S", 0.05)
    ray, one = FakeRay(), job("1_x.json")
    task = cluster.Task(ray, tmp_path, one, 4, 1)
    assert (ray.asked["num_cpus"], ray.asked["num_gpus"]) == (4, 1)
    assert ray.asked["max_retries"] > 0 and ray.asked["retry_exceptions"] == [cluster.WorkerDied]
    assert task.poll() is None
    ray.outcome = (0, 7.5)
    assert task.poll() is None  # the result is not to be seen here yet
    (tmp_path / "1_x.json").write_text("{}")
    assert task.poll() == 0 and task.seconds == 7.5
    task.kill()
    assert ray.cancelled == []  # nothing left to end

    never_seen = cluster.Task(FakeRay((0, 1.0)), tmp_path, job("2_x.json"), 1, 0)
    wait_for(lambda: never_seen.poll() == 0, 5)  # the runner then finds no result and says so

    lost = cluster.Task(FakeRay(FakeRay.exceptions.RayError("a\nthe node died")), tmp_path, one, 1, 0)
    silent = cluster.Task(FakeRay(FakeRay.exceptions.RayError()), tmp_path, job("3_x.json"), 1, 0)
    assert silent.poll() == 1 and "Ray: RayError" in (tmp_path / "3_x.log").read_text()
    assert lost.poll() == 1 and "Ray: the node died" in (tmp_path / "1_x.log").read_text()


def test_an_interrupted_task_has_ended_when_nobody_executes_it(tmp_path):
    """Ray calls a cancelled task ended at once; its kernel still saves."""
    ray = FakeRay()
    task = cluster.Task(ray, tmp_path, job("paper/1_x.json"), 1, 0)
    (tmp_path / ".cache").mkdir()
    with filelock.FileLock(tmp_path / ".cache" / "paper-1_x.lock"):
        task.interrupt()
        ray.outcome = FakeRay.exceptions.RayError()
        assert ray.cancelled == [False] and task.poll() is None
    assert task.poll() == 130
    task.kill()
    assert ray.cancelled == [False, True]


def test_without_ray_the_command_says_what_to_install(repository, monkeypatch, capsys):
    repository.notebook("1_x")
    repository.params("1_x")
    monkeypatch.chdir(repository.root)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert run.main(["run", "--tier", "smoke", "--cluster", "auto"]) == 2
    assert "pip install 'leanvit[cluster]'" in capsys.readouterr().err


# ---- a real cluster: two nodes on this machine

TINY = """\
import os, time
attempts = run.root / "attempts"
attempts.mkdir(exist_ok=True)
note = attempts / f"{run.result.stem}-{os.getpid()}.json"
place = [os.environ["RAY_RAYLET_PID"], os.environ["CUDA_VISIBLE_DEVICES"]]
run.checkpoints.mkdir(parents=True, exist_ok=True)
progress = run.checkpoints / "progress"
began_at = int(progress.read_text()) if progress.exists() else 0
progress.write_text("1")
began = time.time()
def tell(): note.write_text(__import__("json").dumps([*place, os.getpid(), began, time.time()]))
tell()
try:
    for _ in range(run.parameters["steps"]):
        time.sleep(0.1)
        tell()
except KeyboardInterrupt:
    time.sleep(2)  # a checkpoint takes its time
    progress.write_text("saved")
    raise
run.metrics["began_at"] = began_at"""


SIZE = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def head():
    """A cluster of one node with two (pretended) GPUs."""
    pytest.importorskip("ray", reason="needs leanvit[cluster]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={**SIZE, "include_dashboard": False})
        yield made
        made.shutdown()


@pytest.fixture
def second(head):
    """A second node like it."""
    node = head.add_node(**SIZE)
    head.wait_for_nodes()
    yield node
    if node in head.worker_nodes:
        head.remove_node(node)


@pytest.fixture
def sweep(repository, head):
    """Starts `leanvit run --tier paper` on the cluster; what is left of it is ended."""
    started = []

    def start():
        started.append(repository.leanvit("run", "--tier", "paper", "--cluster", head.address))
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.wait()


def notes(repository):
    """What the attempts told: {run: [[raylet, GPU, process, began, last], …]}"""
    found = {}
    for path in sorted((repository.root / "attempts").glob("*.json")):
        if text := path.read_text():
            found.setdefault(path.stem.rsplit("-", 1)[0], []).append(json.loads(text))
    return found


def test_a_sweep_survives_the_death_of_a_node(repository, head, second, sweep):
    """Twelve runs on two nodes, one killed in the middle: every result is there once, each run had its own GPU, and
    what was on the dead node went on from its checkpoint.
    """
    repository.notebook("1_x", TINY)
    for number in range(1, 13):
        repository.params("1_x", f"paper_{number:02d}", f"lr: {number}.0\nsteps: 15")
    raylet = second.all_processes["raylet"][0].process.pid
    process = sweep()
    paper = repository.root / "outputs" / "paper"

    def on_second():
        assert process.poll() is None, process.communicate()[0]
        told = {name: attempt for name, attempts in notes(repository).items() for attempt in attempts}
        done = {path.stem for path in paper.glob("*.json")}
        return done and [name for name, attempt in told.items() if int(attempt[0]) == raylet and name not in done]

    lost = wait_for(on_second)
    head.remove_node(second, allow_graceful=False)  # kill -9
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output

    results = [json.loads(path.read_text()) for path in sorted(paper.glob("*.json"))]
    assert [result["parameters"]["lr"] for result in results] == list(range(1, 13))
    assert {path.suffix for path in paper.glob("*.*")} == {".json", ".ipynb"}  # no log, nothing partial or failed
    assert len(list(paper.glob("*.ipynb"))) == 12 and not list((paper / "checkpoints").iterdir())
    began_at = {result["run"]: result["metrics"]["began_at"] for result in results}
    told = notes(repository)
    again = [name for name, attempts in told.items() if len(attempts) > 1]
    assert again and set(again) <= set(told) and all(began_at[name] == (name in again) for name in told)
    assert set(lost) & set(again)
    assert {int(attempts[-1][0]) for name, attempts in told.items() if name in again} != {raylet}

    places = sorted((raylet, gpu, began, last) for runs in told.values() for raylet, gpu, _, began, last in runs)
    assert {gpu for _, gpu, _, _ in places} == {"0", "1"}
    for (*place, _, last), (*following, began, _) in zip(places, places[1:], strict=False):
        assert place != following or last <= began, "two runs shared a GPU"
    assert output.count(": done in") == 12 and "12 run(s), on a cluster of 2 node(s)" in output


def test_ctrl_c_saves_on_the_nodes(repository, head, sweep):
    """The kernels are told, save, and leave nothing running; what waited never starts."""
    repository.notebook("1_x", TINY)
    for number in range(1, 8):
        repository.params("1_x", f"paper_{number}", "steps: 100")
    process = sweep()
    wait_for(lambda: len(notes(repository)) >= 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130 and "stopping 7 run(s)" in output, output
    told = notes(repository)
    wait_for(lambda: not any(psutil.pid_exists(attempt[2]) for attempts in told.values() for attempt in attempts), 30)
    paper = repository.root / "outputs" / "paper"
    saved = [path.read_text() for path in paper.glob("checkpoints/*/*/progress")]
    assert "saved" in saved and len(saved) == len(told) < 7
    assert [path.name for path in paper.iterdir()] == ["checkpoints"]


def test_nodes_that_do_not_see_the_checkout_are_named(repository, head, monkeypatch):
    repository.notebook("1_x")
    repository.params("1_x")
    code, output = repository.call("run", "--tier", "smoke", "--cluster", "127.0.0.1:1")
    assert code == 2 and "no Ray cluster answers" in output and "ray start --head" in output
    monkeypatch.setattr(cluster, "_read_checkout", lambda root: None)
    import ray

    try:
        with pytest.raises(params.ParameterError, match="does not see this checkout"):
            cluster.Cluster(repository.root, head.address)
    finally:
        ray.shutdown()
