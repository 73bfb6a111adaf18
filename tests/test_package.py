"""What an installation of the package alone brings, what works with it, and what the rest says that it needs."""

import re
import subprocess
import sys
import textwrap
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest

from leanvit import extras

ROOT = Path(__file__).parent.parent
ELSEWHERE = (
    "jupyter jupyterlab jupyter_client jupyter_core notebook ipykernel ipywidgets IPython papermill nbconvert nbformat "
    "nbclient nbval traitlets latex2mathml ray cupy peft transformers torch_pruning onnx onnxruntime onnxscript pytest "
    "hypothesis seaborn"
).split()


def names(lines) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}


def closure(package: str) -> set[str]:
    """Names of what an installation of the package brings, as far as it is installed here; no extras."""
    found, new = set(), {package}
    while new:
        name = new.pop()
        found.add(name)
        try:
            needed = requires(name) or []
        except ModuleNotFoundError:  # for another system
            continue
        new |= names(line for line in needed if "extra ==" not in line) - found
    return found


def test_the_package_alone_pulls_neither_jupyter_nor_cupy_nor_ray():
    alone = names(line for line in requires("leanvit") if "extra ==" not in line)
    assert {"torch", "timm", "accelerate", "safetensors"} <= alone, "make setup"
    everything = closure("leanvit")
    assert alone < everything and "triton" not in alone
    wrong = [n for n in everything if re.match(r"jupyter|ipy|papermill|nb|notebook|cupy|ray$|peft|torch-pruning", n)]
    assert not wrong, f"{wrong}; make setup, where pyproject.toml has changed"


def test_extras_hold_the_rest():
    by_extra = {}
    for line in requires("leanvit"):
        if match := re.search(r"extra == ['\"](\w+)['\"]", line):
            by_extra.setdefault(match[1], set()).update(names([line]))
    assert set(distribution("leanvit").metadata.get_all("Provides-Extra")) == set(by_extra)
    assert {"papermill", "jupyterlab", "ipykernel", "ipywidgets", "nbconvert", "leanvit"} <= by_extra["notebooks"]
    assert by_extra["peers"] == {"peft", "torch-pruning"} and by_extra["cluster"] == {"ray"}
    assert by_extra["cuda"] == {"cupy-cuda13x"} and {"nbval", "leanvit"} <= by_extra["dev"]
    locked = names(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1].isalnum())
    apart = {"leanvit"} | by_extra["cluster"]  # Ray is as large as the rest and asked for by few
    assert set().union(*by_extra.values()) - apart <= locked


BLOCKED = f"""
import sys
for name in {ELSEWHERE}:
    sys.modules[name] = None  # its import fails as if it were not there
import pkgutil
import leanvit
ROOMS = [m.name for m in pkgutil.walk_packages(leanvit.__path__, "leanvit.")]
"""


def blocked(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-c", BLOCKED + textwrap.dedent(code)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_every_room_of_a_training_loop_works_with_the_package_alone(tmp_path):
    done = blocked("""
        import importlib
        for name in ROOMS:
            if not name.startswith("leanvit.report"):  # the site
                importlib.import_module(name)
        from leanvit import baselines, data, kadaptation, lbp_wht, models, throughput, train
        model = models.create("embedded_vit")
        images = data.load("digits", "train", limit=16, transform=models.transforms(model, True))
        lbp_wht.attach(model, bases="LP_L1-2")
        history = train.fit(model, images, train.Recipe(8, 1e-3, steps=2), test_set=images, progress=False)
        leanvit.save(model, "small.safetensors")
        print(history.steps, len(ROOMS) > 50)
        from leanvit import controls, counts_uvc
        model = models.create("embedded_vit")
        for call in (
            lambda: baselines.vera(model), counts_uvc.torch_pruning_macs,
            lambda: controls.cut(model, "isomorphic", 0.5, batches=[images[0]]),
        ):
            try:
                call()
            except ImportError as error:
                print(error)
    """, tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2 True",
        "vera needs peft: pip install 'leanvit[peers]'",
        "Torch-Pruning's count needs torch_pruning: pip install 'leanvit[peers]'",
        "isomorphic pruning needs torch_pruning: pip install 'leanvit[peers]'",
    ]


@pytest.mark.parametrize(
    ("command", "words"),
    [(["run", "--tier", "smoke"], "running notebooks needs papermill and ipykernel: pip install 'leanvit[notebooks]'"),
     (["report"], "rendering needs nbformat and nbconvert and latex2mathml: pip install 'leanvit[notebooks]'")],
)  # fmt: skip
def test_the_command_line_names_the_extra_in_one_line(command, words, repository):
    repository.notebook("toy")
    repository.params("toy")
    done = blocked(f"from leanvit import run\nsys.exit(run.main({command}))", repository.root)
    assert done.returncode == 2 and done.stderr == f"leanvit: {words}\n"
    listed = blocked("from leanvit import run\nsys.exit(run.main(['list']))", repository.root)
    assert listed.returncode == 0 and "params/toy/smoke.yaml" in listed.stdout


def test_what_is_missing_is_named():
    extras.need("this", "peers", "json", "torch")
    with pytest.raises(extras.MissingExtra, match=r"^this needs one and two: pip install 'leanvit\[peers\]'$"):
        extras.need("this", "peers", "one", "json", "two")
