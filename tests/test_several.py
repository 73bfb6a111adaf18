"""Two processes against one, with the global batch equal; errors, Ctrl-C, kill, torchrun by hand."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from leanvit import block_expansion, comcat, head, kadaptation, lbp_wht, several, train, uvc
from leanvit.distill import Distill

SIZE = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 4}
RECIPE = train.Recipe(batch_size=8, lr=2e-3, epochs=2, clip_norm=1.0)
EXECUTABLES = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, tmp_path):
    """Two processes do not need two GPUs; what they write is looked at."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def vit(seed=0):
    """In float64: AdamW divides by the root of squared gradients, so rounding shows where they are zero but for it."""
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **SIZE).double()


def data(n=24, seed=1):
    """Images of four classes, each with a brightness of its own."""
    labels = torch.arange(n) % 4
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float64) + 0.3 * labels[:, None, None, None]
    return TensorDataset(images, labels)


def loader():
    """Shuffled by the global generator, in whole batches."""
    return DataLoader(data(), 8, shuffle=True, drop_last=True)


# ---- what the paper's methods do, as a function for one process or several ----------------------------------------


def fitted(model, **how):
    """Epochs (loss, accuracy) and the weights after a training."""
    history = train.fit(model, data(), RECIPE, test_set=data(13, seed=2), progress=False, **how)
    return history.epochs, [p.detach().clone() for p in model.parameters()]


def by_lbp_wht():
    model = vit()
    assert lbp_wht.attach(model, "LP_L1-4", exact_when="never").matched
    return fitted(model)


def by_kadaptation():
    model = vit()
    kadaptation.attach(model, n=4, seed=0)
    return fitted(model)


def by_released_kadaptation():
    """Half of its factors have no part in the loss: they get no gradient, and stay."""
    model = vit()
    kadaptation.attach(model, mode="released", n=4, seed=0)
    return fitted(model)


def by_a_head_with_batch_norm():
    """ELEVATER's head; the running statistics are compared, too."""
    model = vit()
    kadaptation.attach(model, n=4, seed=0)
    head.few_shot_head(model, 4, batch_norm=True, frozen_after=4)
    epochs, weights = fitted(model)
    return epochs, weights + [b.double() for b in model.head.buffers()]


def by_batch_norm_in_convolutions():
    """With weights, on maps, and with a cumulative average."""
    model = vit()
    first, last = torch.nn.BatchNorm2d(3, momentum=None), torch.nn.BatchNorm1d(16)
    model.patch_embed.proj = torch.nn.Sequential(first, model.patch_embed.proj)
    model.fc_norm = last
    epochs, weights = fitted(model.double())
    return epochs, weights + [b.double() for b in model.buffers()]


def by_block_expansion():
    model = vit()
    block_expansion.attach(model, p=2)
    return fitted(model)


def by_comcat():
    """Ranks searched, the model cut, recovered by distillation; and the search that trains in between."""
    model, teacher = vit(), vit()
    batches, budget = loader(), comcat.authors_budget(model, 0.5)
    plan = comcat.search(model, batches, budget, epochs=2, schedule=comcat.Schedule(first=0))
    comcat.apply(model, plan)
    epochs, weights = fitted(model, loss=Distill(teacher, 0.5, hard=True))
    between = vit()

    def learn(net, epoch, renewed):
        train.fit(net, data(), train.Recipe(batch_size=8, lr=1e-3, steps=2, seed=epoch), progress=False)

    second = comcat.search(between, batches, budget, epochs=2, schedule=comcat.Schedule(first=0), train=learn)
    sizes = [entry["size"] for p in (plan, second) for entry in p.about["searches"]]
    logits = between(data(4).tensors[0]).detach()
    return epochs, [*weights, logits], (plan.ranks, second.ranks), sizes


def by_uvc():
    """Both solvers, and the post-training of what the default one leaves."""
    model, teacher, told, batches = vit(), vit(), [], loader()
    settings = uvc.Settings(round_units=4, round_dims=2, lr=1e-3)
    plan = uvc.search(model, batches, 0.5, steps=12, settings=settings, loss=Distill(teacher), history=told)
    searched = [p.detach().clone() for p in model.parameters()]
    uvc.apply(model, plan)
    epochs, weights = fitted(model, loss=Distill(teacher))
    released = vit()
    flags = uvc.Flags(num_epochs=2, warmup_epochs=1, warmup_steps=1, zlr_schedule_list="1", learning_rate=1e-3)
    as_released = uvc.search(released, batches, mode="faithful", settings=flags, history=told)
    weights += [*searched, *(p.detach().clone() for p in released.parameters())]
    return epochs, weights, (plan.to_json(), as_released.to_json()), [entry["loss"] for entry in told]


METHODS = {
    "LBP-WHT": by_lbp_wht,
    "KAdaptation": by_kadaptation,
    "KAdaptation, released": by_released_kadaptation,
    "KAdaptation, head with BatchNorm": by_a_head_with_batch_norm,
    "BatchNorm in convolutions": by_batch_norm_in_convolutions,
    "block expansion": by_block_expansion,
    "ComCAT": by_comcat,
    "UVC": by_uvc,
}


def everything():
    """The results of all methods, and of which processes."""
    results = {}
    for name, method in METHODS.items():
        torch.manual_seed(3)
        results[name] = method()
    return results, (several.world(), torch.get_num_threads())


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """Once in this process, and once in two; a launch takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("tmp")))
        threads = torch.get_num_threads()
        (one, (alone, _)), (two, (world, each)) = everything(), several.run(everything, processes=2)
    assert alone == 1 and world == 2 and each == max(1, threads // 2)
    return one, two


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(one_and_two, method):
    (epochs, weights, *rest), (epochs2, weights2, *rest2) = (results[method] for results in one_and_two)
    assert [e["step"] for e in epochs] == [3, 6] and len(weights) == len(weights2)
    for a, b in zip(epochs, epochs2, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for a, b in zip(weights, weights2, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    moved = [not torch.equal(a, b) for a, b in zip(weights, vit().parameters(), strict=False)]
    assert any(moved) and epochs[1]["loss"] != epochs[0]["loss"]
    if rest:
        (plans, numbers), (plans2, numbers2) = rest, rest2
        assert plans == plans2 and numbers == pytest.approx(numbers2, rel=1e-5)


def test_parameters_that_all_have_a_part_are_no_cause_for_a_warning(capfd):
    train.fit(vit(), data(8), RECIPE, processes=2, progress=False)
    assert "find_unused_parameters" not in capfd.readouterr().err


# ---- what travels, and what comes back -----------------------------------------------------------------------------


def changed(same, cut, plan):
    """Train one model, cut the other, draw random numbers."""
    with torch.no_grad():
        same.head.weight.add_(several.rank() + 1)
    same.head.bias.requires_grad_(False)
    same.blocks[0].train()
    comcat.apply(cut, plan)
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_a_job_by_hand_brings_the_models_back(tmp_path):
    """`torchrun -m leanvit.several JOB` is what `run` starts."""
    same, cut = vit().eval(), vit().eval()
    plan = comcat.greedy(cut, comcat.authors_budget(cut, 0.5))
    twin, twin_cut, weight, job = copy.deepcopy(same), copy.deepcopy(cut), same.head.weight, tmp_path / "job.pt"
    _seed(5)
    several.write(job, changed, same, cut, plan)
    with pytest.raises(FileNotFoundError, match="torchrun"):
        several.read(job, same, cut)
    told = changed(twin, twin_cut, plan)
    after = torch.rand(())

    done = _torchrun(tmp_path, "-m", "leanvit.several", job)
    assert done.returncode == 0, done.stderr
    _seed(6)
    with pytest.raises(ValueError, match="2 modules; here are 1"):
        several.read(job, same)
    assert several.read(job, same, cut) == told and torch.rand(()) == after
    assert same.head.weight is weight and torch.equal(weight, twin.head.weight)
    assert not same.head.bias.requires_grad and [m.training for m in same.modules()] == [
        m.training for m in twin.modules()
    ]
    x = data(4).tensors[0]
    assert torch.equal(cut(x), twin_cut(x)) and comcat.plan_of(cut).ranks == plan.ranks
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job.pt", "job.pt.result", "tmp"]


def _seed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _torchrun(folder, *arguments):
    """Its logs go where the test's other files are."""
    command = [EXECUTABLES / "torchrun", "--standalone", "--nproc-per-node", "2", "--log-dir", folder / "tmp"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=_environment(), timeout=120)


def _environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}


SCRIPT = """
import json, sys, torch
from test_several import RECIPE, data, loader, vit
from leanvit import comcat, several, train, uvc

torch.manual_seed(0)
model = vit(seed=torch.initial_seed())
history = train.fit(model, data(), RECIPE, progress=False)
assert train.fit(vit(), data(), RECIPE, progress=False, processes=2).epochs == history.epochs
torch.manual_seed(0)
plan = uvc.search(vit(), loader(), 0.5, steps=4)
size = comcat.authors_budget(vit(), 0.5)
found = comcat.search(vit(), loader(), size, epochs=1, schedule=comcat.Schedule(first=0))
refused = []
for processes in (3, 0):
    try:
        several.run(print, processes=processes)
    except ValueError as error:
        refused.append(str(error))
try:
    several.share(torch.zeros(3, 1), torch.zeros(3))
except ValueError as error:
    refused.append(str(error))
if several.rank() == 0:
    print(json.dumps([several.world(), history.epochs[-1]["loss"], plan.ratio(), found.about["searches"][0]["size"], refused]))
"""  # noqa: E501


def test_a_script_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = _torchrun(tmp_path, script)
    assert done.returncode == 0, done.stderr
    world, loss, ratio, size, refused = json.loads(done.stdout.splitlines()[-1])
    assert world == 2 and loss == pytest.approx(train.fit(vit(), data(), RECIPE, progress=False).epochs[-1]["loss"])
    torch.manual_seed(0)
    assert ratio == uvc.search(vit(), loader(), 0.5, steps=4).ratio()
    asked = {"epochs": 1, "schedule": comcat.Schedule(first=0)}
    plan = comcat.search(vit(), loader(), comcat.authors_budget(vit(), 0.5), **asked)
    assert size == pytest.approx(plan.about["searches"][0]["size"], rel=1e-5)
    assert "inside a group of 2" in refused[0] and "processes=0" in refused[1] and "3 images" in refused[2]


CELL = """\
import timm, torch
import torch.nn.functional as F
from leanvit import train

calls = []

def softer(net, images, labels):
    calls.append(1)
    return F.cross_entropy(net(images) / temperature, labels)

class Bright(torch.utils.data.Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, i):
        return torch.full((3, 16, 16), i / 16), i % 4

def trained(processes):
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2,
                                  num_classes=4)
    recipe = train.Recipe(batch_size=8, lr=1e-2, steps=3, optimizer="sgd")
    history = train.fit(net, Bright(), recipe, test_set=Bright(), loss=softer, processes=processes)
    return history.epochs[-1]["loss"], history.epochs[-1]["accuracy"], net.head.weight.detach().flatten().tolist()

temperature = 2.0
one, two = trained(1), trained(processes)
run.metrics["one"], run.metrics["two"], run.metrics["calls"] = one, two, len(calls)
"""


def test_a_notebook_trains_on_two_processes(repository):
    """Loss, data set and what they refer to are the notebook's own."""
    parameters = "steps: int = 3  # steps [1..9]\nlr: float = 1e-2  # rate [> 0]\nseed: int = 0  # seed [>= 0]\n"
    parameters += "processes: int = 1  # processes that train one run [1..64]"
    repository.notebook("one", CELL, parameters=parameters)
    repository.params("one", text="processes: 2\n")
    code, told = repository.call("run", "params/one/smoke.yaml")
    assert code == 0, told
    metrics = repository.result("smoke/one.json")["metrics"]
    (loss, accuracy, weight), (loss2, accuracy2, weight2) = metrics["one"], metrics["two"]
    assert loss == pytest.approx(loss2, abs=1e-5) and accuracy == pytest.approx(accuracy2, abs=1e-5)
    assert weight == pytest.approx(weight2, abs=1e-5) and any(weight)
    assert metrics["calls"] == 3  # of one process: the other ones' list stayed with them


SLOW_CELL = """
import os, time
import torch
import torch.nn.functional as F
from leanvit import models, train

def slow(net, images, labels):
    time.sleep(float(os.environ["PAUSE"]))
    return F.cross_entropy(net(images), labels)

torch.manual_seed(seed)
net = models.create("embedded_vit", depth=1)
images = torch.utils.data.TensorDataset(torch.rand(32, 3, 32, 32), torch.arange(32) % 10)
history = train.fit(net, images, train.Recipe(batch_size=8, lr=lr, steps=steps), loss=slow, progress=False,
                    checkpoint_dir=run.checkpoints, checkpoint_every_s=0.0, processes=processes)
run.metrics["resumed_from"], run.metrics["loss"] = history.resumed_from or 0, history.epochs[-1]["loss"]
"""


def test_ctrl_c_stops_a_notebook_on_two_processes(repository):
    """Through runner, papermill, kernel and launcher: all are gone, the steps are saved, the next call goes on."""
    parameters = "steps: int = 20  # steps [1..99]\nlr: float = 1e-3  # rate [> 0]\nseed: int = 0  # seed [>= 0]\n"
    parameters += "processes: int = 1  # processes that train one run [1..64]"
    repository.notebook("one", SLOW_CELL, parameters=parameters)
    repository.params("one", text="processes: 2\n")
    saved = repository.root / "outputs" / "smoke" / "checkpoints" / "one"

    def reached():
        return max((int(p.name.removeprefix("step_")) for p in saved.glob("*/step_*")), default=0)

    running = repository.leanvit("run", "--tier", "smoke", env=os.environ | {"PAUSE": "0.3"})
    _wait(lambda: reached() >= 2)
    family = psutil.Process(running.pid).children(recursive=True)
    assert len(family) >= 4  # papermill, kernel, two processes
    running.send_signal(signal.SIGINT)
    told, _ = running.communicate(timeout=60)
    assert running.returncode == 130 and "stopping 1 run(s)" in told
    assert psutil.wait_procs(family, 5)[1] == []
    stopped = reached()
    assert 2 <= stopped < 20 and not (repository.root / "outputs" / "smoke" / "one.json").exists()

    again = repository.leanvit("run", "--tier", "smoke", env=os.environ | {"PAUSE": "0"})
    told, _ = again.communicate(timeout=120)
    assert again.returncode == 0, told
    assert repository.result("smoke/one.json")["metrics"]["resumed_from"] == stopped


# ---- errors, Ctrl-C, kill ------------------------------------------------------------------------------------------


class Odd(Exception):
    """Of the kind that pickle cannot make again."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def failing(how):
    if several.rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError(f"class {how}")
    several.average_([torch.zeros(1)], torch.device("cpu"))


@pytest.mark.parametrize("how, kind, words", [("own", KeyError, "class own"), ("killed", RuntimeError, "by signal 9")])
def test_an_error_of_a_worker(how, kind, words, tmp_path):
    """Its own type and message; nothing is left behind."""
    handlers, environment = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], dict(os.environ)
    with pytest.raises(kind, match=words) as error:
        several.run(failing, how, processes=2)
    if how == "own":
        assert "In process 1 of 2" in error.value.__notes__[0] and "in failing" in error.value.__notes__[0]
    assert not any((tmp_path / "tmp").iterdir()) and not _workers(tmp_path) and dict(os.environ) == environment
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_an_error_that_cannot_travel(tmp_path):
    several._tell(tmp_path / "job.pt", Odd(1, 2))
    error = several._first_error(tmp_path / "job.pt")
    assert type(error) is RuntimeError and str(error) == "Odd: 1 and 2"


def _workers(folder):
    """Processes that work on a job in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if "leanvit.several" in process.cmdline() and any(str(folder) in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.mark.parametrize("processes", [0, -1, 1.0, True, "2"])
def test_a_number_that_cannot_be(processes):
    with pytest.raises(ValueError, match="processes=.* must be a whole number of at least 1"):
        several.run(print, processes=processes)
    with pytest.raises(ValueError, match="processes=.* must be a whole number of at least 1"):
        train.fit(vit(), data(), RECIPE, processes=processes)


def test_asked_for_what_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match="batch_size=8 must be a multiple of 3"):
        train.fit(vit(), data(), RECIPE, processes=3)
    with pytest.raises(TypeError, match="changed cannot run in other processes.*pickle"):
        several.run(changed, (i for i in range(3)), processes=2)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="processes=2 need a GPU each, and there are 1"):
        several.check(2)


def test_one_process_is_a_call():
    model = vit()
    assert several.run(lambda *a, **k: (a, k), model, 1, processes=1, x=2) == ((model, 1), {"x": 2})
    assert several.world() == 1 and several.rank() == 0 and not several.inside()
    x, y = torch.zeros(3, 1), torch.zeros(3)
    assert several.share(x, y) == (x, y)


def _loss(net, images, labels):
    return F.cross_entropy(net(images).float(), labels, label_smoothing=0.1)


LONG = """
import tempfile
import time
tempfile.tempdir = {folder!r} + "/tmp"
from test_several import _loss, data, vit
from leanvit import train

def slow(net, images, labels):
    time.sleep({pause})
    return _loss(net, images, labels)

if __name__ == "__main__":
    recipe = train.Recipe(batch_size=8, lr=1e-3, steps={steps})
    history = train.fit(vit(), data(), recipe, loss=slow, checkpoint_dir={folder!r} + "/saved", checkpoint_every_s=0.0,
                        progress=False, processes=2)
    print(history.resumed_from, history.epochs[-1]["loss"])
"""


def long(folder, pause, steps):
    """A training that lasts, in a process of its own."""
    code = textwrap.dedent(LONG.format(folder=str(folder), pause=pause, steps=steps))
    (folder / "long.py").write_text(code, encoding="utf-8")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, folder / "long.py"], env=_environment(), cwd=folder, **pipes)


def _steps(folder):
    return max((int(p.name.removeprefix("step_")) for p in folder.glob("saved/step_*")), default=0)


def _wait(until, seconds=60):
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert until()


def test_interrupted_killed_and_finished(tmp_path):
    """Ctrl-C: the workers save and are gone. kill -9 of the caller: the workers follow. Both times it goes on."""
    steps = 20
    training = long(tmp_path, 0.2, steps)
    _wait(lambda: _steps(tmp_path) >= 2)
    training.send_signal(signal.SIGINT)
    _, told = training.communicate(timeout=40)
    assert f"KeyboardInterrupt: stopped after step {(reached := _steps(tmp_path))} of {steps}" in told
    assert 2 <= reached < steps and not _workers(tmp_path) and not any((tmp_path / "tmp").iterdir())

    training = long(tmp_path, 0.2, steps)
    _wait(lambda: _steps(tmp_path) > reached)
    assert len(_workers(tmp_path)) == 2
    training.kill()
    training.communicate()
    _wait(lambda: not _workers(tmp_path), 10)
    reached = _steps(tmp_path)

    out, told = long(tmp_path, 0.0, steps).communicate(timeout=60)
    assert not told.count("Error") and reached <= int(out.split()[0]) < steps
    whole = train.fit(vit(), data(), train.Recipe(batch_size=8, lr=1e-3, steps=steps), loss=_loss, progress=False)
    assert float(out.split()[1]) == pytest.approx(whole.epochs[-1]["loss"], abs=1e-5)


def busy_behind():
    """A daemon thread is inside of torch whenever Python ends; it would abort the process."""

    def multiply():
        while True:
            torch.ones(64, 64) @ torch.ones(64, 64)

    for _ in range(4):
        threading.Thread(target=multiply, daemon=True).start()
    return several.rank()


def told_late(path):
    """A file that is not closed, and a thread that ends after the function."""

    def write():
        time.sleep(1)
        Path(f"{path}.thread").write_text("whole")

    told_late.file = open(f"{path}.{several.rank()}", "w")  # noqa: SIM115
    told_late.file.write("whole")
    threading.Thread(target=write).start()


def test_files_and_threads_of_a_process_end_as_in_python(tmp_path):
    several.run(told_late, str(tmp_path / "a"), processes=2)
    assert [(tmp_path / f"a.{end}").read_text() for end in (0, 1, "thread")] == ["whole"] * 3


def test_threads_that_are_busy_when_a_process_ends(tmp_path):
    """Python would let them run into their end inside of C++, which aborts: "process 1 was killed by signal 6"."""
    for _ in range(2):
        assert several.run(busy_behind, processes=2) == 0
