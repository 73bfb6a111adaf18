"""Loading never executes code and never writes elsewhere: safetensors and JSON, .pth with weights_only=True."""

import ast
import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import PARAMETERS
from safetensors.torch import save_file
from torch import nn

import leanvit
from leanvit import block_expansion, claims, comcat, elevater, models, params, record, run, state, train, uvc
from leanvit.head import language_head

LIBRARY = Path(leanvit.__file__).parent
SMALL = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
PRIVATE = {"several.py"}  # hands its own job to processes of its own, in a file that it made a moment ago


class Bomb:
    """Unpickled, it makes a folder: code of the file's author has run."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def vit():
    return timm.create_model("vit_tiny_patch16_224", **SMALL)


# ---- the source: nothing that could execute a file


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile", "extractall", "unpack_archive"}
FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "tarfile", "runpy"}


def problems(source: str) -> list[str]:
    """Calls and imports by which a file could execute code, or write where its author likes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"line {node.lineno}: import {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        last = text.rpartition(".")[2]
        wrong = text in FORBIDDEN_CALLS or last in FORBIDDEN_CALLS - {"eval", "compile"}
        wrong |= text.startswith(("pickle.", "_pickle.")) or "Unpickler" in text
        wrong |= text == "torch.load" and keywords.get("weights_only") != "True"
        wrong |= text in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False"
        wrong |= text in ("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "os.system")
        wrong |= keywords.get("shell") == "True" or (text == "YAML" and keywords.get("typ") != "'safe'")
        found += [f"line {node.lineno}: {ast.unparse(node)[:80]}"] if wrong else []
    return found


def test_the_library_holds_nothing_that_executes_a_file():
    files = [f for f in LIBRARY.rglob("*.py") if f.name not in PRIVATE]
    root = Path(__file__).parent.parent
    cells = {f: json.loads(f.read_text())["cells"] for f in (root / "notebooks").glob("*.ipynb")}
    found = {f.name: problems(f.read_text()) for f in [*files, *(root / "tools").glob("*.py")]}
    for file, contents in cells.items():
        code = ["".join(c["source"]) for c in contents if c["cell_type"] == "code"]
        plain = ["\n".join(line for line in c.splitlines() if not line.lstrip().startswith(("%", "!"))) for c in code]
        found[file.name] = [p for c in plain for p in problems(c)]
    assert len(files) > 50 and len(cells) >= 8
    assert {name: p for name, p in found.items() if p} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=x)", "pickle.load(f)",
        "np.load(p, allow_pickle=True)", "eval(text)", "exec(text)", "import yaml", "from joblib import load",
        "YAML(typ='unsafe')", "YAML()", "zipfile.ZipFile(p).extractall(q)", "subprocess.run(c, shell=True)",
        "pickle.Unpickler(f)", "torch.hub.load(r, m)", "__import__(name)", "shutil.unpack_archive(p)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source):
    assert len(problems(source)) == 1


# ---- files of an attacker


def bombs(folder: Path, mark: Path) -> dict[str, Path]:
    """Files that make the folder `mark` when they are unpickled, under every suffix that a loader knows."""
    bomb, files = Bomb(mark), {}
    for suffix in ("pth", "pt", "bin", "safetensors", "json", "npz", "ckpt", "yaml"):
        files[f"pickle as .{suffix}"] = folder / f"raw.{suffix}"
        files[f"pickle as .{suffix}"].write_bytes(pickle.dumps({"weight": bomb}))
    for name, content in {"zip": bomb, "state_dict": {"state_dict": {"head.weight": bomb}}}.items():
        files[name] = folder / f"{name}.pth"
        torch.save(content, files[name])
    files["old torch format"] = folder / "old.pth"
    torch.save({"a": bomb}, files["old torch format"], _use_new_zipfile_serialization=False)
    files["array of objects"] = folder / "objects.npz"
    array = np.empty(1, object)
    array[0] = bomb
    np.savez(files["array of objects"], **{"embedding/kernel": array, "Transformer/encoderblock_0/x": array})
    header = {"py/object": "os.system", "__reduce__": ["os.mkdir", str(mark)], "cuts": [["os", "system"]]}
    for i, text in enumerate([json.dumps(header), "[1]", "{", "[" * 100_000, '"text"', '{"cuts": [1]}', '{"cuts": 3}']):
        files[f"header {i}"] = folder / f"header{i}.safetensors"
        save_file({"a": torch.zeros(1)}, files[f"header {i}"], {"format": "pt", "header": text, "kept": "{}"})
    files["kept"] = folder / "kept.safetensors"
    save_file({"a": torch.zeros(1)}, files["kept"], {"format": "pt", "kept": '{"a": 7}', "settings": "[[]]"})
    files["huge header"] = folder / "huge.safetensors"
    files["huge header"].write_bytes((2**62).to_bytes(8, "little") + b"{}")
    files["yaml"] = folder / "tags.yaml"
    files["yaml"].write_text(f"!!python/object/apply:os.mkdir ['{mark}']")
    return files


def embedding_head(path: Path):
    return language_head(path, ["a", "b", "c"])


LOADERS = {
    "leanvit.load": lambda p: leanvit.load(vit(), p),
    "state.load": lambda p: state.load(vit(), p),
    "models.create": lambda p: models.create("embedded_vit", checkpoint=p),
    "models.load_checkpoint": lambda p: models.load_checkpoint(vit(), p, new_head=True),
    "block_expansion.load": lambda p: block_expansion.load(vit(), p),
    "uvc.load": lambda p: uvc.load(vit(), p),
    "comcat.load": lambda p: comcat.load(vit(), p),
    "language_head": embedding_head,
    "claims.load": claims.load,
    "params.read_values": lambda p: params.read_values(Path(p)),
    "elevater.read": lambda p: elevater.read([p]),
    "uvc.Plan": lambda p: uvc.Plan.from_json(p.read_text(errors="replace")),
    "comcat.Plan": lambda p: comcat.Plan.from_json(p.read_text(errors="replace")),
}


def test_the_bombs_work(tmp_path):
    """Else the tests below would show nothing."""
    unsafe = functools.partial(torch.load, weights_only=False)
    for i, load in enumerate((lambda p: pickle.loads(p.read_bytes()), unsafe)):
        mark = tmp_path / f"mark{i}"
        load(bombs(tmp_path, mark)["pickle as .pth" if i == 0 else "zip"])
        assert mark.is_dir()


@pytest.mark.parametrize("name", LOADERS)
def test_no_loader_executes_a_file(tmp_path, name):
    """Each is refused with an error that names the file or says what it must be."""
    mark = tmp_path / "mark"
    for kind, path in bombs(tmp_path, mark).items():
        with pytest.raises((ValueError, OSError, models.WeightsError)) as caught:
            LOADERS[name](path)
        assert not mark.exists(), kind
        assert str(caught.value) and type(caught.value) is not json.JSONDecodeError, kind


def test_timm_reads_no_pickles_for_us(tmp_path):
    mark = tmp_path / "mark"
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(Bomb(mark), tmp_path / "pytorch_model.bin")
    with pytest.raises((models.WeightsError, ValueError, RuntimeError, pickle.UnpicklingError)):
        models.create(f"local-dir:{tmp_path}", pretrained=True)
    assert not mark.exists()


def tiny_training(folder: Path, keep=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    data = [(torch.full((1, 2, 2), float(i)), i % 2) for i in range(8)]
    recipe = train.Recipe(batch_size=4, lr=0.1, steps=3)
    train.fit(model, data, recipe, checkpoint_dir=folder, keep=keep, progress=False)
    return model.state_dict()


def test_a_checkpoint_executes_nothing(tmp_path):
    """Every file of a checkpoint, accelerate's own pickles included, as a pickle that would run: none does."""
    clean = tiny_training(tmp_path / "clean")
    names = [p.name for p in next((tmp_path / "clean").glob("step_*")).iterdir()]
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json"} <= set(names)
    for i, name in enumerate(names):
        for how in ("torch", "pickle"):
            folder, mark = tmp_path / f"{i}{how}", tmp_path / f"mark{i}{how}"
            tiny_training(folder)
            file = next(folder.glob("step_*")) / name
            torch.save({"x": Bomb(mark)}, file) if how == "torch" else file.write_bytes(pickle.dumps(Bomb(mark)))
            if name.startswith("random_states"):  # nothing in our loop depends on them, accelerate leaves them out
                assert all(torch.equal(a, clean[n]) for n, a in tiny_training(folder).items())
            else:
                with pytest.raises(train.CheckpointError, match="is damaged .*remove it to start anew"):
                    tiny_training(folder)
            assert not mark.exists(), name


# ---- names that would leave the outputs folder


def test_a_parameter_file_cannot_lead_outside(repository, monkeypatch):
    """Whatever the names of files, notebooks and overrides: results lie two levels below outputs/."""
    monkeypatch.chdir(repository.root)
    save_to = "save_to: str | None = None  # beside the result [a plain name]"
    repository.notebook("1_x", parameters=f"{PARAMETERS}\n{save_to}")
    outputs = repository.root / "outputs"
    for stem in ("smoke", "smoke_..", "..", "a b", "smoke_%2e%2e", "paper_x;y", "smoke_\\..\\x"):
        job = run.plan(repository.root, repository.params("1_x", stem), {"seed": "3"})
        again = run.plan(repository.root, repository.params("1_x", stem))
        for path in (job.result, again.result, again.log, again.failed):
            inside = (repository.root / path).resolve().relative_to(outputs)
            assert len(inside.parts) == 2 and not inside.is_absolute()
        lock = (repository.root / again.lock).resolve()
        assert lock.parent == repository.root / ".cache"
    for value in ("../../x", "/etc", "a/b", "..", ".hidden"):
        with pytest.raises(params.ParameterError, match="save_to = .* must be a plain name"):
            run.plan(repository.root, repository.params("1_x"), {"save_to": value})
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    for name in ("../1_x", "/1_x", "..", "", "1_x/../1_x"):
        assert run.main(["run", "--tier", "smoke", "--notebook", name]) == 2
    assert not outputs.exists()


@pytest.mark.parametrize("name", ["../1_x", "../../x", "/x", "..", "a/b", "", "a\\b"])
def test_a_notebook_cannot_name_a_result_elsewhere(repository, monkeypatch, name):
    repository.notebook("1_x")
    monkeypatch.chdir(repository.root)
    (repository.root / "x.ipynb").write_text((repository.root / "notebooks" / "1_x.ipynb").read_text())
    (repository.root / "1_x.ipynb").write_text((repository.root / "notebooks" / "1_x.ipynb").read_text())
    scope = {"lr": 1e-3, "steps": 3, "method": "exact", "seed": 0}
    with pytest.raises(params.ParameterError, match="must be the plain name of a notebook"):
        record.start(name, scope)


def test_a_damaged_name_of_a_result_is_not_followed(repository):
    """A result file that names another place changes nothing there: names are those of the plan."""
    repository.notebook("1_x")
    job = run.plan(repository.root, repository.params("1_x"))
    path = repository.root / job.result
    record.write_atomic(path, json.dumps({f: "../../../x" for f in record.FIELDS} | {"hashes": {}}))
    before = sorted(repository.root.parent.rglob("*"))
    assert run.state(repository.root, job, "here")[0] == "stale"
    assert sorted(repository.root.parent.rglob("*")) == before


def test_saving_beside_a_link_stays_in_the_folder(tmp_path):
    """What lies under the name, a link to a file elsewhere say, is replaced and not written through."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    for i, write in enumerate((lambda p: record.write_atomic(p, "x"), lambda p: leanvit.save(vit(), p))):
        link = tmp_path / f"outputs{i}" / "result"
        link.parent.mkdir()
        link.symlink_to(elsewhere)
        write(link)
        assert elsewhere.read_text() == "mine" and not link.is_symlink()


def test_the_command_line_reads_no_code(tmp_path):
    """`-p` values and YAML tags are data: the process ends with code 2 and nothing has run."""
    mark = tmp_path / "mark"
    text = f"!!python/object/apply:os.mkdir ['{mark}']"
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params" / "1_x").mkdir(parents=True)
    (tmp_path / "params" / "1_x" / "smoke.yaml").write_text(f"lr: {text}")
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "lr: float = 1.0"}
    (tmp_path / "notebooks" / "1_x.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {}}))
    command = [sys.executable, "-m", "leanvit.run", "run", "params/1_x/smoke.yaml", "-p", "lr", text]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not valid YAML" in done.stderr and not mark.exists()
    assert "Traceback" not in done.stderr
