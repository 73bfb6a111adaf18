"""The record of a run: complete, finite or explained, free of the machine's names, written whole or not at all."""

import errno
import json
import os
import socket
import sys
from pathlib import Path

import numpy
import pytest
import torch

from leanvit import claims, params, record

VALUES = {"lr": 1e-3, "steps": 3, "method": "exact", "seed": 7}


@pytest.fixture
def run(repository, monkeypatch):
    """A run started in a notebook by hand."""
    repository.notebook("1_x")
    monkeypatch.chdir(repository.root / "notebooks")
    for name in [name for name in os.environ if name.startswith("LEANVIT_")]:
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    yield record.start("1_x", {**VALUES, "unrelated": object()})
    torch.set_num_threads(threads)


def saved(run):
    """The result as it stands in the file."""
    return json.loads((run.root / run.save()).read_text(encoding="utf-8"))


def test_a_run_by_hand_is_complete_and_stays_out_of_the_tiers(run):
    run.headline = "all well"
    run.add_source("data", "digits", "0" * 64)
    assert run.save() == Path("outputs/interactive/1_x.json")
    result = saved(run)
    assert record.incomplete(result) == []
    assert result["parameters"] == VALUES and result["tier"] == "interactive" and result["seeds"] == [7]
    assert result["sources"] == {"digits": {"kind": "data", "sha256": "0" * 64}}
    assert result["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert result["hardware"]["threads"] == torch.get_num_threads() and result["peak_memory"]["process_mib"] > 10


def test_no_name_of_the_machine_in_a_record(run):
    run.headline = f"see {run.root / 'outputs'} and {Path.home() / 'data'}"
    text = (run.root / run.save()).read_text(encoding="utf-8")
    assert str(run.root) not in text and socket.gethostname() not in text and str(Path.home()) not in text
    assert "see outputs and ~/data" in text


def test_the_runner_decides_where_a_result_goes(repository, monkeypatch):
    repository.notebook("1_x")
    monkeypatch.chdir(repository.root)
    monkeypatch.setenv("LEANVIT_RESULT", "outputs/paper/1_x.efl1_cifar100.json")
    monkeypatch.setenv("LEANVIT_TIER", "paper")
    run = record.start("1_x", VALUES)
    run.headline = "x"
    assert run.save() == Path("outputs/paper/1_x.efl1_cifar100.json")
    staged = repository.root / "outputs/paper/.1_x.efl1_cifar100.staged.json"
    assert json.loads(staged.read_text())["run"] == "1_x.efl1_cifar100"
    assert not (repository.root / run.result).exists()  # the runner puts it there, last
    assert run.checkpoints.relative_to(run.root).parts[:4] == ("outputs", "paper", "checkpoints", "1_x.efl1_cifar100")


def test_numbers_of_numpy_and_torch_and_what_is_not_finite(run):
    run.headline = "x"
    run.metrics |= {
        "scalar": numpy.float32(0.5),
        "tensor": torch.tensor([1, 2]),
        "half": torch.tensor(0.25, dtype=torch.bfloat16),
        "flag": numpy.bool_(True),
        "loss": float("nan"),
        "curve": [1.0, float("inf")],
        "array": numpy.array([numpy.nan, 1.0]),
        "file": Path("a/b"),
    }
    result = saved(run)
    assert result["metrics"] == {
        "scalar": 0.5,
        "tensor": [1, 2],
        "half": 0.25,
        "flag": True,
        "loss": None,
        "curve": [1.0, None],
        "array": [None, 1.0],
        "file": "a/b",
    }
    assert sorted(result["notes"]) == ["metrics.array[0]", "metrics.curve[1]", "metrics.loss"]
    assert result["notes"]["metrics.loss"] == "nan: not a finite number"
    run.metrics["model"] = object()
    with pytest.raises(TypeError, match="metrics.model is a object"):
        run.save()


def test_verdicts_are_stored(run):
    claim = claims.Claim("a", "p", "t", "c", 2.0, "C", "structural", "equal", "nothing")
    run.headline = "x"
    run.verdicts += claims.check([claim], {"a": 2.0})
    assert saved(run)["verdicts"][0] | {"why": ""} == vars(run.verdicts[0]) | {"why": ""}


def test_a_run_without_headline_is_not_saved(run):
    with pytest.raises(ValueError, match="headline is empty"):
        run.save()


def test_wrong_parameters_are_caught_by_hand_too(repository, monkeypatch):
    repository.notebook("1_x")
    monkeypatch.chdir(repository.root)
    with pytest.raises(params.ParameterError, match="notebooks/1_x.ipynb: lr = -1"):
        record.start("1_x", {**VALUES, "lr": -1})
    with pytest.raises(KeyError, match="steps of notebooks/1_x.ipynb not in scope"):
        record.start("1_x", {name: value for name, value in VALUES.items() if name != "steps"})
    with pytest.raises(params.ParameterError, match=r"no such notebook \(did you mean 1_x\?\)"):
        record.start("1_xx", VALUES)


def test_seeds(repository, monkeypatch):
    cell = "seed: int = 3\nseeds: int = 2"
    repository.notebook("1_x", parameters=cell)
    repository.notebook("2_x", parameters="seeds: list[int] = [4, 9]")
    monkeypatch.chdir(repository.root)
    assert record.start("1_x", {"seed": 3, "seeds": 2}).seeds == [3, 4]
    first = torch.rand(3)
    record.start("1_x", {"seed": 3, "seeds": 2})
    assert torch.equal(first, torch.rand(3))
    assert record.start("2_x", {"seeds": [4, 9]}).seeds == [4, 9]


def test_outside_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="none has both notebooks/ and params/"):
        record.start("1_x", {})


def test_summary():
    assert record.summary([1, 3]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "n": 2, "values": [1.0, 3.0]}
    assert record.summary(torch.tensor([5.0]))["std"] == 0.0
    with pytest.raises(ValueError, match="no values"):
        record.summary([])


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    record.write_atomic(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(OSError, match="cannot write result.json in .*No space left on device") as caught:
        record.write_atomic(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_changes_the_key(repository, monkeypatch):
    path = repository.notebook("1_x")
    hashes = record.key_hashes(repository.root, "1_x", VALUES)
    assert record.key_hashes(repository.root, "1_x", dict(reversed(VALUES.items()))) == hashes
    notebook = json.loads(path.read_text())
    notebook["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["x"]}]
    path.write_text(json.dumps(notebook))
    assert record.key_hashes(repository.root, "1_x", VALUES) == hashes  # outputs do not count
    notebook["cells"][1]["source"] += ["\n"]
    path.write_text(json.dumps(notebook))
    changed = record.key_hashes(repository.root, "1_x", {**VALUES, "lr": 2.0})
    assert changed["notebook"] != hashes["notebook"] and changed["parameters"] != hashes["parameters"]
    assert record.run_key(changed) != record.run_key(hashes)


def test_the_library_hash_covers_sources_of_kernels(tmp_path, monkeypatch):
    for name in ("train.py", "kernels/walsh.cu", "run.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    before = record.library_hash()
    for name, counts in (("run.py", False), ("notes.txt", False), ("kernels/walsh.cu", True), ("train.py", True)):
        (tmp_path / name).write_text("two")
        after = record.library_hash()
        assert (after != before) == counts, name
        before = after


def test_scrub_spares_what_is_not_of_this_machine(tmp_path):
    text = f"{tmp_path}/a {tmp_path} {sys.prefix}/lib {Path.home()}/b /usr/share/datasets"
    assert record.scrub(text, tmp_path) == "a . <python>/lib ~/b /usr/share/datasets"


def test_the_checkout_keeps_its_id(tmp_path):
    first = record.checkout_id(tmp_path)
    assert len(first) == 32 and record.checkout_id(tmp_path) == first


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert record.commit(tmp_path) == {"hash": None, "dirty": None}


def test_what_is_missing_in_a_result_is_named():
    assert record.incomplete([]) == ["it is not a mapping"]
    complete = {field: "x" for field in record.FIELDS}
    assert record.incomplete(complete) == []
    assert record.incomplete({**complete, "headline": ""}) == ["empty headline"]
    del complete["key"]
    assert record.incomplete(complete) == ["no key"]


def test_only_complete_results_are_read(tmp_path):
    complete, path = {field: "x" for field in record.FIELDS}, tmp_path / "1_x.json"
    assert record.read(path) is None
    for text in ('{"notebook": ', "[]", json.dumps({**complete, "headline": ""})):
        path.write_text(text)
        assert record.read(path) is None
    path.write_text(json.dumps(complete))
    assert record.read(path) == complete


def test_the_library_hash_covers_assets_but_those_a_notebook_writes(tmp_path, monkeypatch):
    package = tmp_path / "leanvit"
    (package / "assets").mkdir(parents=True)
    (package / "assets" / "weights.bin").write_bytes(b"1")
    monkeypatch.setattr(record, "__file__", str(package / "record.py"))
    before, without = record.library_hash(), record.library_hash(["weights.bin"])
    (package / "assets" / "weights.bin").write_bytes(b"2")
    assert record.library_hash() != before and record.library_hash(["weights.bin"]) == without
