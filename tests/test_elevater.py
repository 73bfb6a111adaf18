"""The 20 data sets of ELEVATER, laid out on disk as torchvision expects them, and the table of results."""

import itertools
import json
import math
import pickle

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from leanvit import data, elevater, record
from leanvit.evaluate import METRICS, pe
from leanvit.images import DataError
from leanvit.images import few_shot as sample

# ---- the 20 data sets ----------------------------------------------------------------------------------------------


def test_t22_the_table_of_data_sets():
    rows = elevater.DATASETS.values()
    assert len(rows) == 20 and sum(row.classes for row in rows) == 1151
    assert {row.metric for row in rows} == {"accuracy", "mean_per_class", "roc_auc", "map11"} <= METRICS.keys()
    assert {row.loads for row in rows} - {None} <= set(data.NAMES) and sum(row.loads is None for row in rows) == 3
    assert sum(row.train for row in rows) == 638429 and sum(row.test for row in rows) == 192677
    assert 513 * 1151 // 20 == 29523  # the published size of a linear probe


def test_unknown_and_missing_sets_name_the_source(tmp_path):
    with pytest.raises(DataError, match="unknown data set 'cifar-1000' of ELEVATER: did you mean cifar-100"):
        elevater.load("cifar-1000", "train")
    for name, source in (("resisc45_clip", "NWPU"), ("hateful-memes", "hatefulmemeschallenge.com")):
        with pytest.raises(DataError, match=f"{name} is not in torchvision.*{source}.*{name}.*<class>"):
            elevater.load(name, "train", root=tmp_path)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "teal").save(path)


def lay_out(name: str, root, n: int) -> None:
    """On disk, as torchvision expects a set: one image of each of `n` classes (whole batches of 10 for CIFAR)."""
    both = ("train", "test")
    if name == "caltech-101":
        for c in ("BACKGROUND_Google", *(f"k{c}" for c in range(n))):
            for k in range(1, 6):
                picture(root / "caltech101" / "101_ObjectCategories" / c / f"image_{k:04d}.jpg")
    elif name == "cifar-10":
        base = root / "cifar-10-batches-py"
        base.mkdir()
        batch = {"data": np.zeros((n, 3072), np.uint8), "labels": list(range(n))}
        for file in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
            (base / file).write_bytes(pickle.dumps(batch))
        (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"k{c}" for c in range(n)]}))
    elif name in ("country211", "rendered-sst2"):
        for split, c in itertools.product((*both, "valid"), range(n)):
            word = ("negative", "positive")[c] if name == "rendered-sst2" else f"k{c:03d}"
            picture(root / name / split / word / f"{c}.png")
    elif name == "dtd":
        (root / "dtd/dtd/labels").mkdir(parents=True)
        for split in both:
            for c in range(n):
                picture(root / f"dtd/dtd/images/k{c:02d}/{split}.jpg")
            (root / f"dtd/dtd/labels/{split}1.txt").write_text("\n".join(f"k{c:02d}/{split}.jpg" for c in range(n)))
    elif name.startswith("fgvc"):
        base = root / "fgvc-aircraft-2013b/data"
        base.mkdir(parents=True)
        (base / "variants.txt").write_text("\n".join(f"k{c}" for c in range(n)))
        for split in ("trainval", "test"):
            for c in range(n):
                picture(base / f"images/{split}{c}.jpg")
            (base / f"images_variant_{split}.txt").write_text("\n".join(f"{split}{c} k{c}" for c in range(n)))
    elif name == "fer-2013":
        lines = [f"{c},{' '.join(['7'] * 2304)},{use}" for c in range(n) for use in ("Training", "PrivateTest")]
        (root / "fer2013").mkdir()
        (root / "fer2013/fer2013.csv").write_text("\n".join(["emotion,pixels,Usage", *lines]))
    elif name == "gtsrb":
        for c in range(n):
            picture(root / f"gtsrb/GTSRB/Training/{c:05d}/0.ppm")
            picture(root / f"gtsrb/GTSRB/Final_Test/Images/{c}.ppm")
        lines = [f"{c}.ppm;{c}" for c in range(n)]
        (root / "gtsrb/GT-final_test.csv").write_text("\n".join(["Filename;ClassId", *lines]))
    elif name == "mnist":
        (root / "MNIST/raw").mkdir(parents=True)
        for prefix in ("train", "t10k"):
            for kind, array in (("images-idx3", np.zeros((n, 28, 28), np.uint8)), ("labels-idx1", np.arange(n))):
                header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
                (root / f"MNIST/raw/{prefix}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    elif name == "oxford-flower-102":
        for k in range(1, 2 * n + 1):
            picture(root / f"flowers-102/jpg/image_{k:05d}.jpg")
        order = np.arange(1, 2 * n + 1)
        savemat(root / "flowers-102/imagelabels.mat", {"labels": (order - 1) % n + 1})
        savemat(root / "flowers-102/setid.mat", {"trnid": order[:n], "tstid": order[n:], "valid": order[:1]})
    elif name == "patch-camelyon":
        (root / "pcam").mkdir()
        for split in both:
            for kind, array in (("x", np.zeros((n, 96, 96, 3), np.uint8)), ("y", np.arange(n).reshape(n, 1, 1, 1))):
                with h5py.File(root / f"pcam/camelyonpatch_level_2_split_{split}_{kind}.h5", "w") as file:
                    file[kind] = array
    elif name == "stanford-cars":
        (root / "stanford_cars/devkit").mkdir(parents=True)
        kind = [("fname", object), ("class", object)]
        for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
            for c in range(n):
                picture(root / f"stanford_cars/cars_{split}/{c}.jpg")
            cars = np.array([(f"{c}.jpg", c + 1) for c in range(n)], dtype=kind)
            savemat(root / "stanford_cars" / file, {"annotations": cars})
        names = np.array([f"k{c}" for c in range(n)], dtype=object)
        savemat(root / "stanford_cars/devkit/cars_meta.mat", {"class_names": names})
    elif name.startswith("voc"):
        base = root / "VOCdevkit/VOC2007"
        for folder in ("ImageSets/Main", "Annotations"):
            (base / folder).mkdir(parents=True)
        thing = "<object><name>{}</name><difficult>{}</difficult></object>".format
        for k, words in enumerate([[("dog", 0), ("cat", 1)], [("cat", 0), ("dog", 0), ("dog", 1)], [("cat", 1)]]):
            picture(base / f"JPEGImages/{k}.jpg")
            text = "".join(thing(*word) for word in words)
            (base / f"Annotations/{k}.xml").write_text(f"<annotation>{text}</annotation>")
        (base / "ImageSets/Main/train.txt").write_text("0\n1\n")
        (base / "ImageSets/Main/test.txt").write_text("2\n1\n")


# cifar-100, eurosat, food-101 and pets are laid out in test_data.py
@pytest.mark.parametrize(
    "name",
    ["caltech-101", "cifar-10", "country211", "dtd", "fer-2013", "fgvc-aircraft-2013b-variants102", "gtsrb", "mnist",
     "oxford-flower-102", "patch-camelyon", "rendered-sst2", "stanford-cars"],
)  # fmt: skip
def test_sets_of_torchvision_are_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *args: True)
    monkeypatch.setattr("torchvision.datasets.fer2013.check_integrity", lambda *args, **kwargs: True)
    row = elevater.entry(name)
    classes = row.classes - (name == "caltech-101")  # torchvision leaves the background out
    lay_out(name, tmp_path, classes)
    for split in ("train", "test"):
        found = elevater.load(name, split, root=tmp_path)
        images = {"cifar-10": 5 if split == "train" else 1, "caltech-101": 4 if split == "train" else 1}.get(name, 1)
        assert found.labels.bincount().tolist() == [images] * classes and len(found.classes) == classes
        assert len(sample(found, 1, seed=0)) == classes
    if name in ("cifar-10", "fer-2013", "mnist"):
        assert found.in_memory and found[0][0].shape[0] == 3
    elif name == "patch-camelyon":
        assert found[1][0].shape == (3, 96, 96)


def test_voc_has_several_classes_an_image_and_leaves_difficult_objects_out(tmp_path):
    lay_out("voc-2007-classification", tmp_path, 20)
    train_set, test_set = (elevater.load("voc-2007-classification", s, root=tmp_path) for s in ("train", "test"))
    named = [[test_set.classes[c] for c in row.nonzero().flatten().tolist()] for row in train_set.labels]
    assert named == [["dog"], ["cat", "dog"]] and test_set.labels.sum(1).tolist() == [0, 2]
    assert train_set.labels.dtype == torch.float32 and len(train_set.classes) == 20
    assert len(data.load("voc2007", "train", root=tmp_path, limit=1)) == 1
    with pytest.raises(DataError, match=r"1 shots of voc2007: too few images of aeroplane \(0\)"):
        sample(train_set, 1, seed=0)


def test_own_folder_in_place_of_torchvision(tmp_path):
    for split, c in itertools.product(("train", "test"), range(4)):
        picture(tmp_path / "kitti-distance" / split / f"k{c}" / "0.png")
    assert elevater.load("kitti-distance", "test", root=tmp_path).labels.tolist() == [0, 1, 2, 3]
    (tmp_path / "kitti-distance").rename(tmp_path / "resisc45_clip")
    with pytest.raises(DataError, match="has 4 class folders; RESISC45 has 45"):
        elevater.load("resisc45_clip", "train", root=tmp_path)


# ---- results -------------------------------------------------------------------------------------------------------


def rows(scores: dict, parameters: int = 1000, **more) -> list[dict]:
    return [
        {"method": m, "dataset": d, "seed": s, "score": v, "metric": "accuracy", "parameters": parameters,
         "selection": "last"} | more
        for (m, d), values in scores.items() for s, v in enumerate(values)
    ]  # fmt: skip


def test_table_by_hand():
    found = elevater.table(
        rows({("ka", "a"): [0.5, 0.7, 0.6], ("ka", "b"): [0.8, 0.4, 0.6], ("lp", "a"): [0.2]})
        + rows({("full", "a"): [0.5], ("full", "b"): [0.7]}, parameters=9 * 10**8)
    )
    assert list(found.index) == [
        ("ka", "a"), ("ka", "b"), ("ka", "mean"), ("lp", "a"), ("full", "a"), ("full", "b"), ("full", "mean"),
    ]  # fmt: skip
    line = found.loc["ka", "b"]
    assert line["mean"] == pytest.approx(0.6) and line["spread"] == pytest.approx(0.2) and line["n"] == 3
    assert line["pe"] == pytest.approx(pe(0.6, 1000)) and line["metric"] == "accuracy"
    mean = found.loc["ka", "mean"]  # seeds' own means: 0.65, 0.55, 0.6
    assert mean["mean"] == pytest.approx(0.6) and mean["spread"] == pytest.approx(0.05)
    assert found.loc["full", "mean"]["pe"] == pytest.approx(0.6 / math.e)
    assert math.isnan(found.loc["lp", "a"]["spread"])
    ragged = elevater.table(rows({("ka", "a"): [0.5, 0.7], ("ka", "b"): [0.8]})).loc["ka", "mean"]
    assert ragged["mean"] == pytest.approx(0.7) and math.isnan(ragged["spread"])


def test_table_refuses_what_cannot_be_averaged():
    good = rows({("ka", "a"): [0.5, 0.6]})
    for wrong, message in [
        (good + good[:1], "method ka, dataset a, seed 0 is there twice"),
        (good + [good[0] | {"seed": 2, "score": None}], "score of method ka, dataset a, seed 2 is nan"),
        (good + [good[0] | {"seed": 2, "score": 55.0}], "seed 2 is 55.0; it must lie in 0..1"),
        (good + [good[0] | {"seed": 2, "selection": "test-best"}], "selection rules: last, test-best"),
        (good + [good[0] | {"seed": 2, "parameters": 5}], "ka on a has rows of different parameters"),
        *(
            (good + [good[0] | {"seed": 2, field: None}], f"method ka, dataset a, seed 2 has no {field}")
            for field in ("metric", "parameters", "selection")
        ),
        (good + [good[0] | {"seed": None}], "method ka, dataset a, seed nan has no seed"),
        (good + [good[0] | {"method": None}], "dataset a, seed 0 has no method"),
        ([], "no rows with method"),
    ]:
        with pytest.raises(ValueError, match=message):
            elevater.table(wrong)


def test_results_are_read_from_files(tmp_path):
    complete = dict.fromkeys(record.FIELDS, "x") | {"versions": {"a": "1"}, "hashes": {"a": "1"}}
    for k in (0, 1):
        result = complete | {"metrics": {"few_shot": rows({("ka", f"d{k}"): [0.5, 0.6]})}}
        (tmp_path / f"{k}.json").write_text(json.dumps(result))
    found = elevater.table(elevater.read([tmp_path / "0.json", tmp_path / "1.json"]))
    assert found.loc["ka", "mean"]["mean"] == pytest.approx(0.55) and len(found) == 3
    for content, message in [("{", "is not JSON"), ("{}", "is not a complete result: no notebook"),
                             (json.dumps(complete), "has no list metrics.few_shot")]:  # fmt: skip
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            elevater.read([tmp_path / "x.json"])
