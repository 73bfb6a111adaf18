"""The 20 data sets of ELEVATER's image classification (arXiv 2204.08790), and its table of results.

Sizes, classes, metrics and numbers of prompts are the toolkit's own registry's. Where torchvision's split is another
one, `note` says so; a set that torchvision does not have, or the toolkit's own split of one, is read from a folder
<root>/<id>/{train,test}/<class>/<image>. The toolkit fetches all of them by its repository
Computer-Vision-in-the-Wild/DataDownload.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from leanvit import data, record
from leanvit.evaluate import pe
from leanvit.images import DataError, ImageSet

FIELDS = ("method", "dataset", "seed", "score", "metric", "parameters", "selection")


@dataclass(frozen=True)
class Entry:
    """One data set: classes, images of train, val (0: none; not used by the protocol) and test, metric, prompts a
    class, its name in `data.load` (None: not there), and what differs there, or where it comes from.
    """

    id: str
    title: str
    classes: int
    train: int
    val: int
    test: int
    metric: str
    prompts: int
    loads: str | None
    note: str = ""


_CUT = "torchvision has no published split: one image in five of each class is for testing"
_ROWS = [
    Entry("caltech-101", "Caltech-101", 102, 3060, 0, 6084, "mean_per_class", 34, "caltech101",
          f"{_CUT}, and no background class (101 classes)"),
    Entry("cifar-10", "CIFAR-10", 10, 50000, 0, 10000, "accuracy", 18, "cifar10"),
    Entry("cifar-100", "CIFAR-100", 100, 50000, 0, 10000, "accuracy", 18, "cifar100"),
    Entry("country211", "Country211", 211, 31650, 10550, 21100, "accuracy", 5, "country211"),
    Entry("dtd", "Describable Textures", 47, 1880, 1880, 1880, "accuracy", 8, "dtd"),
    Entry("eurosat_clip", "EuroSAT", 10, 5000, 5000, 5000, "accuracy", 3, "eurosat", f"{_CUT}, of 27,000 images"),
    Entry("fer-2013", "FER 2013", 7, 28709, 3589, 3589, "accuracy", 6, "fer2013",
          "torchvision's test split is val and test together, 7,178 images"),
    Entry("fgvc-aircraft-2013b-variants102", "FGVC Aircraft", 100, 3334, 3333, 3333, "mean_per_class", 2,
          "fgvcaircraft", "train is train and val together, 6,667 images"),
    Entry("food-101", "Food-101", 101, 75750, 0, 25250, "accuracy", 1, "food101"),
    Entry("gtsrb", "German Traffic Signs", 43, 26640, 12569, 12630, "accuracy", 3, "gtsrb"),
    Entry("hateful-memes", "Hateful Memes", 2, 8500, 0, 500, "roc_auc", 1, None,
          "Meta AI's Hateful Memes challenge, hatefulmemeschallenge.com, after accepting its licence"),
    Entry("kitti-distance", "KITTI Distance", 4, 6347, 423, 711, "accuracy", 1, None,
          "KITTI's object detection images, www.cvlibs.net/datasets/kitti, labelled by the distance to the nearest "
          "vehicle; images are resized to 224 x 224 without a crop"),
    Entry("mnist", "MNIST", 10, 60000, 0, 10000, "accuracy", 1, "mnist"),
    Entry("oxford-flower-102", "Oxford Flowers", 102, 1020, 1020, 6149, "mean_per_class", 1, "flowers102"),
    Entry("oxford-iiit-pets", "Oxford-IIIT Pets", 37, 3680, 0, 3669, "mean_per_class", 1, "oxfordiiitpet"),
    Entry("patch-camelyon", "PatchCamelyon", 2, 262144, 32768, 32768, "accuracy", 1, "pcam"),
    Entry("rendered-sst2", "Rendered SST-2", 2, 6920, 827, 1821, "accuracy", 1, "renderedsst2"),
    Entry("resisc45_clip", "RESISC45", 45, 3150, 3150, 25200, "accuracy", 18, None,
          "NWPU-RESISC45 of Northwestern Polytechnical University, 31,500 images"),
    Entry("stanford-cars", "Stanford Cars", 196, 8144, 0, 8041, "accuracy", 8, "stanfordcars"),
    Entry("voc-2007-classification", "PASCAL VOC 2007", 20, 2501, 2510, 4952, "map11", 1, "voc2007",
          "several classes an image"),
]  # fmt: skip
DATASETS = {row.id: row for row in _ROWS}


def entry(name: str) -> Entry:
    """The data set of that id. Raises `DataError` for an unknown one."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(DATASETS)}"
        raise DataError(f"unknown data set {name!r} of ELEVATER: {hint}")
    return DATASETS[name]


def load(
    name: str,
    split: str,
    *,
    root: str | Path | None = None,
    transform: Callable | None = None,
    limit: int | None = None,
) -> ImageSet:
    """`split` "train" or "test" of a set: from the folder <root>/<id> where there is one, else by `data.load`.

    Raises `DataError`: unknown id, a folder with another number of classes, a set that torchvision does not have (it
    names the source), and what `data.load` raises.
    """
    row = entry(name)
    folder = data.default_root(root) / row.id
    # torchvision's own folder for a set can be of the same name ("dtd", "gtsrb", "country211")
    if (folder / "train").is_dir() and (row.loads is None or (folder / "test").is_dir()):
        found = data.load("imagefolder", split, root=folder, transform=transform, limit=limit)
        if len(found.classes) != row.classes:
            raise DataError(f"{row.id}: {folder} has {len(found.classes)} class folders; {row.title} has {row.classes}")
        return found
    if row.loads is None:
        raise DataError(
            f"{row.id} is not in torchvision; get it ({row.note}) and sort it into {folder}/{{train,test}}/<class>/"
        )
    return data.load(row.loads, split, root=root, transform=transform, limit=limit)


# ---- results -------------------------------------------------------------------------------------------------------


def read(paths: Iterable[str | Path]) -> list[dict]:
    """The rows (`FIELDS` each) that result files hold under metrics.few_shot, in the files' order.

    Raises `ValueError` naming the file that is no complete result, or has no such rows.
    """
    rows = []
    for path in map(Path, paths):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if missing := record.incomplete(result):
            raise ValueError(f"{path} is not a complete result: {', '.join(missing[:3])}")
        found = result["metrics"].get("few_shot") if isinstance(result["metrics"], dict) else None
        if not isinstance(found, list):
            raise ValueError(f"{path} has no list metrics.few_shot; notebook 3 writes it")
        rows += found
    return rows


def table(rows: Iterable[dict]) -> pd.DataFrame:
    """One line for each (method, dataset), and one, "mean", over the data sets, for methods that have all of them.

    A row is a score in [0, 1] of one method, dataset and seed, with its metric, the trained `parameters` (head
    included) and the `selection` rule. Columns: metric, n (seeds), mean and spread (sample standard deviation) over
    the seeds, parameters, pe (of the mean). In the line "mean", `mean` is the plain mean over data sets and
    `spread` that of the seeds' own means (NaN where data sets have different seeds); `parameters` is the mean, as
    published. Raises `ValueError` for a row twice, for one that lacks a field or whose score is out of 0..1, and
    for different selection rules in one table.
    """
    frame, lines = _checked(rows), {}
    datasets = list(frame["dataset"].unique())
    for method, of_method in frame.groupby("method", sort=False):
        scores = of_method.pivot(index="seed", columns="dataset", values="score")
        first = of_method.groupby("dataset").first()
        for name in [d for d in datasets if d in scores]:
            lines[method, name] = _line(first["metric"][name], scores[name].dropna(), first["parameters"][name])
        if len(scores.columns) == len(datasets):
            complete = not scores.isna().any(axis=None)
            line = _line("", scores.mean(axis=1), first["parameters"].mean(), mean=scores.mean(axis=0).mean())
            lines[method, "mean"] = line if complete else line | {"spread": math.nan}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis(["method", "dataset"])


def _checked(rows: Iterable[dict]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows))
    if absent := [f for f in FIELDS if f not in frame]:
        raise ValueError(f"table: no rows with {', '.join(absent)}")
    key = ["method", "dataset", "seed"]
    wrong = frame[~frame["score"].map(lambda s: isinstance(s, float | int) and 0 <= s <= 1)]
    if len(wrong):
        raise ValueError(f"table: the score of {_named(wrong, key)} is {wrong['score'].iloc[0]}; it must lie in 0..1")
    for field in FIELDS:
        if len(absent := frame[frame[field].isna()]):
            raise ValueError(f"table: the row of {_named(absent, key)} has no {field}")
    twice = frame[frame.duplicated(key)]
    if len(twice):
        raise ValueError(f"table: {_named(twice, key)} is there twice")
    if frame["selection"].nunique() > 1:
        raise ValueError(f"table: rows of different selection rules: {', '.join(frame['selection'].unique())}")
    cells = frame.groupby(["method", "dataset"], sort=False)
    for field in ("metric", "parameters"):
        if (several := cells[field].nunique() > 1).any():
            raise ValueError(f"table: {' on '.join(several.idxmax())} has rows of different {field}")
    return frame.astype({"score": float})


def _line(metric: str, scores: pd.Series, parameters: float, mean: float | None = None) -> dict:
    mean = float(scores.mean()) if mean is None else float(mean)
    spread = float(scores.std()) if len(scores) > 1 else math.nan
    return {"metric": metric, "n": len(scores), "mean": mean, "spread": spread, "parameters": float(parameters),
            "pe": pe(mean, float(parameters))}  # fmt: skip


def _named(frame: pd.DataFrame, key: list[str]) -> str:
    return ", ".join(f"{k} {frame[k].iloc[0]}" for k in key)
