"""What was cut off a model, by which plan and in which order; files that rebuild a cut model from a stock one.

ComCAT's and UVC's surgeries `record` their plans here, so that a model that was factored, pruned, or both in any order
is one file: all tensors, and the plans in the header. Models that were not cut are saved and loaded as in `state`.
"""

import copy
import importlib
import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from leanvit import state

CUTS = "leanvit_cuts"  # attribute of a cut model
SURGERIES = {"comcat": "leanvit.comcat_cut", "uvc": "leanvit.uvc_slicing"}  # rooms with a `rebuild(model, plan's text)`


def history(model: nn.Module) -> list[list[str]]:
    """`[[method, plan as JSON], ...]` in the order of the surgeries."""
    return [list(cut) for cut in getattr(model, CUTS, [])]


def record(model: nn.Module, method: str, plan: str, *, instead: bool = False) -> None:
    """Note that `method` has cut the model by `plan` (JSON); `instead` of the last entry, where that is its own."""
    done = history(model)
    if instead and done and done[-1][0] == method:
        done.pop()
    setattr(model, CUTS, [*done, [method, plan]])


def forget(model: nn.Module, method: str) -> None:
    """Take the last entry away, where it is of `method`: its cut was undone."""
    done = history(model)
    if done and done[-1][0] == method:
        setattr(model, CUTS, done[:-1])


def save(model: nn.Module, path: str | Path, *, names: Iterable[str] | None = None, header: dict | None = None) -> Path:
    """`state.save`, and of a cut model all tensors (unless `names` says otherwise) with its plans in the header.

    >>> import leanvit
    >>> from leanvit import baselines, models
    >>> model = models.create("embedded_vit")
    >>> report = baselines.lora_qv(model)
    >>> leanvit.save(model, "adapter.safetensors").stat().st_size < 100_000  # what is trained, and the head
    True
    """
    done = history(model)
    if not done:
        return state.save(model, path, names=names, header=header)
    if names is None:
        names = [n for n, t in model.state_dict().items() if isinstance(t, Tensor)]
    more = {"cuts": done, "num_classes": getattr(model, "num_classes", None)}
    return state.save(model, path, names=names, header={**(header or {}), **more})


def stored(path: str | Path, header: dict | None = None) -> list[list[str]]:
    """The `history` of the model saved in a file, [] of one that was not cut.

    Raises as `state.read_header` does, and `ValueError` for cuts that are malformed.
    """
    found = (state.read_header(path) if header is None else header).get("cuts", [])
    pairs = [c for c in found if isinstance(c, list) and len(c) == 2] if isinstance(found, list) else None
    if pairs != found or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError(f"load: {path}: its cuts must be pairs of a method and a plan, as leanvit.save writes them")
    return found


def load(model: nn.Module, path: str | Path) -> dict:
    """`state.load`; the plans of a cut model's file are applied first, as far as `model` was not cut by them already.

    A stock model of the saved architecture becomes the saved one: shapes, number of classes, tensors. In place. Raises
    as `state.load` does, and `ValueError` for a model that was cut otherwise; the model is then as it was.

    >>> import leanvit
    >>> from leanvit import comcat, models
    >>> small = models.create("embedded_vit", depth=1)
    >>> report = comcat.apply(small, comcat.make_plan(small, {"fc1": 32, "fc2": 32}))
    >>> path = leanvit.save(small, "small.safetensors")
    >>> stock = models.create("embedded_vit", depth=1)
    >>> header = leanvit.load(stock, path)
    >>> type(stock.blocks[0].mlp.fc1).__name__
    'FactoredLinear'
    """
    header = state.read_header(path)
    there, here = stored(path, header), history(model)
    if [_plain(c) for c in there[: len(here)]] != [_plain(c) for c in here]:
        how = ", then ".join(m for m, _ in there) or "not at all"
        raise ValueError(
            f"load: this model was cut by {', then '.join(m for m, _ in here)} with other plans than the model of "
            f"{path} ({how}); give the stock model"
        )
    if len(there) == len(here):
        return state.load(model, path)
    trial = copy.deepcopy(model)  # a cut cannot be taken back
    classes = header.get("num_classes")
    if classes is not None and not here and classes != getattr(trial, "num_classes", classes):
        trial.reset_classifier(classes)
    for method, plan in there[len(here) :]:
        if method not in SURGERIES:
            raise ValueError(f"load: {path} was cut by {method!r}, which is none of {', '.join(SURGERIES)}")
        importlib.import_module(SURGERIES[method]).rebuild(trial, plan)
    header = state.load(trial, path)
    model.__dict__.update(trial.__dict__)
    return header


def _plain(cut: list[str]) -> tuple[str, dict]:
    """A cut without the notes that a plan carries."""
    method, plan = cut
    return method, {k: v for k, v in json.loads(plan).items() if k not in ("about", "origin")}
