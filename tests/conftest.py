"""Fixtures for the runner, and what nbval needs to compare executed notebooks (pytest --nbval-lax outputs/smoke)."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import nbformat
import pytest

os.environ.setdefault("TQDM_DISABLE", "1")
# a shell ignores Ctrl-C for what it starts in the background, and so would the commands that the tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

# the same examples each time, and no deadline: a test that passed passes again, on a slow machine too
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None, max_examples=100)
hypothesis.settings.load_profile("same")


def pytest_collectstart(collector):
    """Progress bars and warnings go to stderr; they are no result."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


LONG = ("test_kill", "test_several", "test_site", "test_package", "test_disk", "test_run", "test_soak")


def pytest_collection_modifyitems(items):
    """Long files first, so that no core waits for them at the end. nbval waits 5 s for the last output of a cell; on a
    busy machine that is too short.
    """
    items.sort(key=lambda item: item.path.stem not in LONG)
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = 60


PARAMETERS = """\
lr: float = 1e-3  # learning rate [> 0]
steps: int = 3  # steps of training [1..100]
method: str = "exact"  # which method [one of exact|lora]
seed: int = 0  # seed of every random number [>= 0]"""

START = """\
from leanvit import record
run = record.start("{name}", globals())"""

SAVE = """\
run.metrics["accuracy"] = record.summary([0.5, 0.7])
run.headline = f"{run.parameters['steps']} steps at {run.parameters['lr']}"
run.save()"""


class Repository:
    """A small repository of its own in a temporary folder, with notebooks that take no time."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("notebooks", "params"):
            (root / folder).mkdir()

    def notebook(self, name: str, *cells: str, parameters: str = PARAMETERS, save: str = SAVE, **metadata) -> Path:
        """notebooks/<name>.ipynb: parameters, start, `cells`, save."""
        sources = [parameters, START.format(name=name), *cells, save]
        code = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
        code[0]["metadata"]["tags"] = ["parameters"]
        title = nbformat.v4.new_markdown_cell(f"# {name}", id="title")
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=[title, *code], metadata={"kernelspec": kernel, **metadata})
        path = self.root / "notebooks" / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    def params(self, name: str, file: str = "smoke", text: str = "{}") -> Path:
        """params/<name>/<file>.yaml"""
        path = self.root / "params" / name / f"{file}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def result(self, path: str) -> dict:
        """A result below outputs/."""
        return json.loads((self.root / "outputs" / path).read_text(encoding="utf-8"))

    def leanvit(self, *arguments: str, **options) -> subprocess.Popen:
        """The command line as a process of its own, output in one pipe."""
        command = [sys.executable, "-m", "leanvit.run", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.root, **pipes, **options)

    def call(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of a command."""
        process = self.leanvit(*arguments)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output


@pytest.fixture
def repository(tmp_path) -> Repository:
    """A fake repository; commands run in it, never in ours."""
    return Repository(tmp_path)
