"""Save and load what was trained or cut: one safetensors file with a JSON header.

A file holds the trained tensors, the head and the persistent buffers (BatchNorm's statistics move without being
trained), and beside them the names and shapes of everything that was *not* stored. So loading can be strict without
storing a frozen backbone: the model must have exactly the stored and the named tensors, whatever is frozen just then.
"""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from leanvit import atomic
from leanvit.surgery import head_parameters


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the state dict, by name (without the extra state that some modules keep there)."""
    return {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}


def changed_names(model: nn.Module) -> list[str]:
    """State-dict names of what a training changes: trainable parameters, the head, and the persistent buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    head = head_parameters(model)
    return [n for n in _tensors(model) if n not in parameters or parameters[n].requires_grad or n in head]


def _settings(model: nn.Module) -> dict[str, dict]:
    """By module: what its tensors do not tell and its outputs depend on, in an attribute `settings` (a JSON dict)."""
    found = {n: getattr(m, "settings", None) for n, m in model.named_modules()}
    return {n: s for n, s in found.items() if isinstance(s, dict)}


def _near(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def save(model: nn.Module, path: str | Path, *, names: Iterable[str] | None = None, header: dict | None = None) -> Path:
    """Write the tensors `names` (default: `changed_names`) and the JSON `header` to `path`, atomically.

    Raises `ValueError` for a name that the model does not have or when there is nothing to store, `TypeError` for a
    header that is not JSON, `OSError` when the file cannot be written (an older file of that name is then untouched).

    >>> from torch import nn
    >>> from leanvit import state
    >>> path = state.save(nn.Linear(2, 1), "linear.safetensors", header={"seed": 0})
    >>> state.load(nn.Linear(2, 1), path)
    {'seed': 0}
    """
    path = Path(path)
    tensors = _tensors(model)
    chosen = list(dict.fromkeys(changed_names(model) if names is None else names))
    for name in chosen:
        if name not in tensors:
            raise ValueError(f"save: the model has no tensor {name!r}{_near(name, tensors)}")
    if not chosen:
        raise ValueError("save: nothing is trainable and the model has no head, there is nothing to store")
    try:
        text = json.dumps(header or {}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"save: the header is not JSON: {error}") from error
    kept = {n: list(t.shape) for n, t in tensors.items() if n not in set(chosen)}
    metadata = {"format": "pt", "header": text, "kept": json.dumps(kept), "settings": json.dumps(_settings(model))}
    # clones: safetensors refuses tensors that share memory (tied weights)
    stored = {n: tensors[n].detach().cpu().clone(memory_format=torch.contiguous_format) for n in chosen}
    try:
        with atomic.replacing(path) as temporary:
            save_file(stored, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise OSError(f"save: {path} cannot be written: {error}") from error
    return path


def _read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: there is no file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            return {n: f.get_tensor(n) for n in f.keys()}, f.metadata() or {}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"load: {path} is not a complete safetensors file: {error}") from error


def _entry(metadata: dict[str, str], key: str, path: str | Path) -> dict:
    """The JSON mapping that a file holds under `key`, `{}` without one; `ValueError` where it is something else."""
    try:
        found = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load: {path}: its {key} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"load: {path}: its {key} is a {type(found).__name__}; it must be a mapping")
    return found


def read_header(path: str | Path) -> dict:
    """The JSON header of a file, without loading a model (`{}` where the file has none).

    Raises `FileNotFoundError` where there is no file, `ValueError` where it is not safetensors with a JSON header.
    """
    return _entry(_read(path)[1], "header", path)


def load(model: nn.Module, path: str | Path) -> dict:
    """Put the tensors of `path` into `model` (built and attached as it was when saved) and return the header.

    Strict: `ValueError` lists every tensor that is missing in the file, unexpected, or of another shape, and every
    adapter of another scale or mode, and then the model is unchanged. Values are converted to the model's dtype and
    device. `FileNotFoundError` where there is no file.
    """
    stored, metadata = _read(path)
    tensors = _tensors(model)
    if "kept" not in metadata:
        raise ValueError(f"load: {path} was not written by leanvit.save; models.load_checkpoint reads plain weights")
    header, kept = (_entry(metadata, key, path) for key in ("header", "kept"))
    if not all(isinstance(shape, list) for shape in kept.values()):
        raise ValueError(f"load: {path}: its kept must map names to shapes")
    kept = {n: tuple(shape) for n, shape in kept.items()}
    shapes = kept | {n: tuple(t.shape) for n, t in stored.items()}
    problems = []
    missing = [n for n in tensors if n not in shapes]
    unexpected = [n for n in (*stored, *kept) if n not in tensors]  # what is in the file comes first
    for n in unexpected[:10]:
        what = "unexpected in the file" if n in stored else "not in this model"
        problems.append(f"{what}: {n} {shapes[n]}{_near(n, missing)}")
    for n in missing[:10]:
        problems.append(f"missing in the file: {n} {tuple(tensors[n].shape)}")
    for n in [n for n in tensors if n in shapes and tuple(tensors[n].shape) != shapes[n]][:10]:
        problems.append(f"shape of {n}: {shapes[n]} in the file, {tuple(tensors[n].shape)} in the model")
    mine, theirs = _settings(model), _entry(metadata, "settings", path)
    for n in [n for n in theirs if n in mine and theirs[n] != mine[n]][:10]:
        problems.append(f"settings of {n}: {theirs[n]} in the file, {mine[n]} in the model")
    if problems:
        raise ValueError(
            f"load: {path} does not fit this model ({len(missing)} missing, {len(unexpected)} unexpected); nothing was "
            "loaded. Was the same method attached with the same settings?\n  " + "\n  ".join(problems)
        )
    with torch.no_grad():
        for name, value in stored.items():
            tensors[name].copy_(value)
    return header
