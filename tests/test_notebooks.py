"""notebooks/, params/ and outputs/ as they are committed: short, clean, complete, and not older than their sources."""

import ast
import getpass
import json
import re
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from leanvit import claims, params, record, run

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMS = run.parameter_files(ROOT)
CLAIMS = sorted((ROOT / "params").glob("*/claims.yaml"))
RESULTS = [path for tier in run.TIERS for path in sorted((ROOT / "outputs" / tier).glob("[!.]*.json"))]
MACHINE = re.compile(r"(?<![\w.~<])(/home/\w|/Users/\w|/root/|/work/|/tmp/|/var/folders/|[A-Z]:\\\\?Users)")


def name(path):
    """A path as the id of a test."""
    return path.relative_to(ROOT).as_posix()


def cells_of(path):
    """The cells of a notebook, each source as one text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


def tags_of(cell):
    """The tags of a cell."""
    return cell["metadata"].get("tags", [])


def sources_of(cells):
    """What makes a notebook: the kind and the source of each cell."""
    return [(cell["cell_type"], cell["source"]) for cell in cells]


def code_of(path):
    """The syntax trees of the code cells, without lines that only IPython knows."""
    sources = [cell["source"] for cell in cells_of(path) if cell["cell_type"] == "code"]
    return [ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source)) for source in sources]


# ---- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_are_stored_without_outputs(path):
    for number, cell in enumerate(cells_of(path), 1):
        assert not cell.get("outputs") and cell.get("execution_count") is None, f"cell {number} has outputs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_are_short_and_compose_only(path):
    assert len(cells_of(path)) <= 30
    for number, tree in enumerate(code_of(path), 1):
        for node in ast.walk(tree):
            assert not isinstance(node, ast.ClassDef), f"code cell {number}: class {node.name} belongs into lib/"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 10, f"code cell {number}: {node.name} has {lines} lines; it belongs into lib/"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_parameters_are_typed_and_commented(path):
    declared = params.declared(path)
    assert declared
    assert [parameter.name for parameter in declared.values() if not parameter.help] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_begin_and_end_with_the_record(path):
    code = [cell["source"] for cell in cells_of(path) if cell["cell_type"] == "code"]
    tagged = [cell["source"] for cell in cells_of(path) if "parameters" in tags_of(cell)]
    after = code[code.index(tagged[0]) + 1]
    assert re.search(rf"record\.start\(\s*[\"']{path.stem}[\"'],\s*globals\(\)\)", after)
    assert "run.save()" in code[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_have_the_tiers_that_run_everywhere(path):
    folder = ROOT / "params" / path.stem
    assert (folder / "smoke.yaml").exists() and (folder / "embedded.yaml").exists()


# ---- params


@pytest.mark.parametrize("path", PARAMS, ids=name)
def test_parameter_files_resolve(path):
    assert run.plan(ROOT, path).parameters


@pytest.mark.parametrize("path", PARAMS, ids=name)
def test_papermill_reads_the_same_values(path):
    """`python -m papermill -f` reads YAML 1.1, where 1e-3 is text; 1.0e-3 is a number in both."""
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == params.read_values(path)


@pytest.mark.parametrize("path", CLAIMS, ids=name)
def test_claims_load_and_say_what_they_need(path):
    for claim in claims.load(path):
        assert claim.needs.strip(), claim.id


# ---- outputs


@pytest.mark.parametrize("path", RESULTS, ids=name)
def test_results_are_complete(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    result = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert record.incomplete(result) == []
    assert (result["run"], result["tier"]) == (path.stem, path.parent.name)
    assert result["overrides"] == {}
    assert {"python", "torch", "timm"} <= result["versions"].keys()
    for verdict in result["verdicts"]:
        assert verdict["verdict"] in claims.VERDICTS and (verdict["verdict"] == "matches" or verdict["why"]), verdict


@pytest.mark.parametrize("path", RESULTS, ids=name)
def test_results_belong_to_the_present_notebook_and_parameters(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    again = f"stale: run `leanvit run {result['params_file']}` and commit what it leaves"
    job = run.plan(ROOT, ROOT / result["params_file"])
    assert (ROOT / job.result, job.parameters) == (path, result["parameters"]), again
    notebook = ROOT / "notebooks" / f"{result['notebook']}.ipynb"
    executed = [cell for cell in cells_of(path.with_suffix(".ipynb")) if "injected-parameters" not in tags_of(cell)]
    assert sources_of(executed) == sources_of(cells_of(notebook)), again
    assert result["hashes"]["notebook"] == record.notebook_hash(notebook), again


@pytest.mark.parametrize("path", RESULTS, ids=name)
def test_executed_notebooks_are_whole_and_normalised(path):
    executed = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert not {"papermill", "execution"} & executed["metadata"].keys()
    for cell in executed["cells"]:
        assert not {"papermill", "execution"} & cell["metadata"].keys()
        if cell["cell_type"] == "code":
            assert cell["execution_count"] is not None
            assert not [output for output in cell["outputs"] if output["output_type"] == "error"]


# ---- names of machines and people


def committed():
    """The text files that git holds or would hold."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for path in sorted({ROOT / line for line in done.stdout.splitlines()}):
        try:
            yield path, path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue


def texts_of(path, text):
    """What a reader sees of a file; of a notebook all but its images, where any text may turn up by chance."""
    return re.sub(r'"image/[\w+]+": (".*?"|\[.*?\])', "", text, flags=re.DOTALL) if path.suffix == ".ipynb" else text


def test_no_path_of_this_machine_in_any_file():
    own = {str(ROOT), str(Path.home())} - {"/", "/root"}
    for path, text in committed():
        for place in own:
            assert f"{place}/" not in texts_of(path, text), f"{name(path)} names {place}"


def test_no_absolute_path_user_or_host_in_notebooks_and_results():
    people = {getpass.getuser(), socket.gethostname()} - {"root", "user", "runner", "localhost"}
    people = [word for word in people if len(word) > 4]
    for path, text in committed():
        if path.relative_to(ROOT).parts[0] not in ("notebooks", "outputs", "params"):
            continue
        text = texts_of(path, text)
        found = MACHINE.search(text)
        assert not found, f"{name(path)}: {text[max(0, found.start() - 40) : found.end() + 40]}"
        for word in people:
            assert not re.search(rf"\b{re.escape(word)}\b", text), f"{name(path)} names {word}"
