"""Data: embedded sets, torchvision sets on disk, folders, image files of every kind, and what can be wrong."""

import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from leanvit import data, evaluate, images, models
from leanvit.images import DataError, Files


def picture(path, size=(8, 6), mode="RGB", colour=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- the embedded sets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, split, per_class", [("fashion_mnist_10k", "train", 1000), ("fashion_mnist_10k", "test", 200)]
    + [("digits", "train", 400), ("digits", "test", 100)],
)  # fmt: skip
def test_embedded_sets_are_balanced_real_and_shown_as_32_pixels(name, split, per_class):
    images = data.load(name, split)
    assert images.labels.bincount().tolist() == [per_class] * 10 and len(images.classes) == 10
    image, label = images[3]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and isinstance(label, int)
    assert image.min() == 0 and 0.5 < image.max() <= 1 and torch.equal(image[0], image[2])
    whole = images.images
    border = torch.ones(32, 32, dtype=bool)
    border[2:-2, 2:-2] = False
    assert whole[:, 0, border].max() == 0 and 0.08 < whole.float().mean() / 255 < 0.35
    assert whole.flatten(1).unique(dim=0).shape[0] > 0.99 * len(whole)  # photographs, hardly one of them twice
    # an untrained eye's classifier, the nearest class mean, tells the labels fit the images
    means = torch.stack([whole[images.labels == c].float().mean(0) for c in range(10)]).flatten(1)
    nearest = torch.cdist(whole.flatten(1).float(), means).argmin(1)
    assert (nearest == images.labels).float().mean() > 0.65


def test_embedded_train_and_test_share_no_image():
    for name in data.EMBEDDED:
        train, test = (data.load(name, s).images.flatten(1).numpy() for s in ("train", "test"))
        assert not {row.tobytes() for row in test} & {row.tobytes() for row in train}


def test_damaged_embedded_file_is_named(tmp_path, monkeypatch):
    shutil.copytree(data.ASSETS, tmp_path / "assets", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(data, "ASSETS", tmp_path / "assets")
    file = tmp_path / "assets" / "digits.test.npz"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DataError) as error:
        data.load("digits", "test")
    assert "digits.test.npz" in one_line(error) and "bytes" in str(error.value)
    file.unlink()
    with pytest.raises(DataError, match=r"digits.test.npz.*0 bytes"):
        data.load("digits", "test")
    data.load("digits", "train")  # the other half is not touched


def test_batches_equal_single_images_and_pass_the_loader():
    model = models.create("embedded_vit")
    images = data.load("digits", "test", transform=models.transforms(model, False))
    batch, labels = images.__getitems__([5, 1, 7])
    assert torch.equal(batch[1], images[1][0]) and labels.tolist() == [images[i][1] for i in (5, 1, 7)]
    for batch, labels in DataLoader(images, 400, collate_fn=data.collate):
        assert batch.shape[1:] == (3, 32, 32) and labels.dtype == torch.long
    assert torch.equal(batch[-1], images[-1][0])
    plain = data.load("digits", "test", transform=lambda pil: torch.tensor(pil.size))  # a transform for PIL images
    batch, labels = next(iter(DataLoader(plain, 2, collate_fn=data.collate)))
    assert batch.tolist() == [[32, 32]] * 2 and len(labels) == 2
    with pytest.raises(IndexError):
        images[len(images)]


def test_limit_subset_and_few_shot():
    small = data.load("digits", "train", limit=25, seed=1)
    assert len(small) == 25 and set(small.labels.bincount().tolist()) == {2, 3}
    again = data.load("digits", "train", limit=25, seed=1)
    assert torch.equal(small.images, again.images) and small.sha256 == again.sha256
    assert small.sha256 != data.load("digits", "train", limit=25, seed=2).sha256
    whole = data.load("digits", "train", transform=len)
    part = data.subset(whole, [4, 2, 4])
    assert part.labels.tolist() == whole.labels[[4, 2, 4]].tolist() and part.transform is len
    five = data.few_shot(whole, 5, seed=3)
    assert five.labels.bincount().tolist() == [5] * 10
    assert five.images.flatten(1).unique(dim=0).shape[0] == 50
    assert not torch.equal(five.images, data.few_shot(whole, 5, seed=4).images)
    with pytest.raises(DataError, match=r"401 shots of digits: too few images of 0 \(400\)"):
        data.few_shot(whole, 401, seed=0)
    with pytest.raises(DataError, match="outside 0..3999"):
        data.subset(whole, [4000])


@pytest.mark.parametrize(
    "call, words",
    [
        (("cifra100", "train"), ["cifra100", "did you mean cifar100"]),
        (("digits", "val"), ["'val'", "train or test"]),
        (("imagefolder", "train"), ["root="]),
    ],
)
def test_wrong_names(call, words):
    with pytest.raises(DataError) as error:
        data.load(*call)
    assert all(word in one_line(error) for word in words)
    for limit in (0, -3, 2.5, True):
        with pytest.raises(DataError, match=f"limit={limit} of digits: a whole number of at least 1"):
            data.load("digits", "test", limit=limit)
    for shots in (0, 2.5, True):
        with pytest.raises(DataError, match=f"{shots} shots of digits: it must be a whole number of at least 1"):
            data.few_shot(data.load("digits", "test"), shots, seed=0)


# ---- sets that the user brings -------------------------------------------------------------------------------------


def idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_complete_fashion_mnist_is_read_and_checked(tmp_path):
    values = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
    idx(tmp_path / "t10k-images-idx3-ubyte.gz", values)
    idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([9, 0, 1], np.uint8))
    found = data.load("fashion_mnist", "test", root=tmp_path)
    assert found.labels.tolist() == [9, 0, 1] and found.images[:, 0, 2:-2, 2:-2].numpy().tolist() == values.tolist()
    with pytest.raises(DataError) as error:
        data.load("fashion_mnist", "train", root=tmp_path)
    assert all(w in one_line(error) for w in ["train-images-idx3-ubyte.gz", str(tmp_path), "dataset-fashion-mnist"])
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    with pytest.raises(DataError, match=r"t10k-images.*2367 bytes"):
        data.load("fashion_mnist", "test", root=tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="t10k-images.*damaged"):
        data.load("fashion_mnist", "test", root=tmp_path)
    idx(file, values[:2])
    with pytest.raises(DataError, match="2 images but 3 labels"):
        data.load("fashion_mnist", "test", root=tmp_path)


def test_pets_keep_37_classes(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    breeds = [f"breed_{chr(97 + k // 26)}{chr(97 + k % 26)}" for k in range(37)]
    (base / "annotations").mkdir(parents=True)
    for split, first in (("trainval", 1), ("test", 2)):
        lines = [f"{b}_{first} {k + 1} {k % 2 + 1} 1" for k, b in enumerate(breeds)]
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines[::-1]))
        for k, breed in enumerate(breeds):
            picture(base / "images" / f"{breed}_{first}.jpg", colour=(6 * k, 0, 0))
    for split in ("train", "test"):
        pets = data.load("OxfordIIITPet", split, root=tmp_path)
        assert len(pets.classes) == 37 and sorted(pets.labels.tolist()) == list(range(37))
        for i in (0, 20, 36):
            assert abs(pets.pil(i).getpixel((0, 0))[0] - 6 * int(pets.labels[i])) < 3


def test_cifar100_and_food101_from_disk(tmp_path, monkeypatch):
    base = tmp_path / "cifar-100-python"
    base.mkdir()
    values = np.random.default_rng(0).integers(0, 255, (4, 3072), np.uint8)
    for split in ("train", "test"):
        (base / split).write_bytes(pickle.dumps({"data": values, "fine_labels": [99, 0, 7, 7]}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{k}" for k in range(100)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    cifar = data.load("cifar100", "test", root=tmp_path)
    assert cifar.labels.tolist() == [99, 0, 7, 7] and len(cifar.classes) == 100
    assert torch.equal(cifar.images, torch.from_numpy(values).view(4, 3, 32, 32))

    food = tmp_path / "food-101"
    (food / "meta").mkdir(parents=True)
    for split in ("train", "test"):
        listed = {c: [f"{c}/{split}"] for c in ("pie", "apple")}
        (food / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for c in listed:
            picture(food / "images" / c / f"{split}.jpg", colour="red" if c == "pie" else "lime")
    found = data.load("food101", "test", root=tmp_path)
    by_class = {found.classes[label]: found.pil(i).getpixel((0, 0)) for i, label in enumerate(found.labels.tolist())}
    assert by_class["pie"][0] > 200 > 60 > by_class["apple"][0]


def test_sets_without_a_published_split_are_cut_once_for_all(tmp_path):
    for name in ("Forest", "River", "SeaLake"):
        for k in range(10):
            picture(tmp_path / "eurosat" / "2750" / name / f"{name}_{k}.jpg")
    train, test = (data.load("eurosat", s, root=tmp_path, seed=s == "test") for s in ("train", "test"))
    assert train.labels.bincount().tolist() == [8, 8, 8] and test.labels.bincount().tolist() == [2, 2, 2]
    assert not set(train.images) & set(test.images) and train.classes == ["Forest", "River", "SeaLake"]


@pytest.mark.parametrize("name", ["cifar10", "flowers102", "dtd", "svhn", "food101", "stl10", "country211", "sun397"])
def test_missing_set_says_what_where_and_how(name, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("socket.socket.connect", unreachable)
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    with pytest.raises(DataError) as error:
        data.load(name, "train", root=tmp_path / "none")
    text = one_line(error)
    assert name in text
    if "needs the package" not in text:
        assert str(tmp_path / "none") in text and "download=True" in text and "no network" in text
    assert not (tmp_path / "none").exists()  # nothing is left behind


@pytest.mark.parametrize("name, words", [("stanfordcars", "imagefolder"), ("imagenet", "image-net.org")])
def test_sets_that_nobody_can_download(name, words, tmp_path):
    with pytest.raises(DataError) as error:
        data.load(name, "train", root=tmp_path)
    assert words in one_line(error) and str(tmp_path) in str(error.value) and name in str(error.value)


def test_default_root(tmp_path, monkeypatch):
    monkeypatch.setenv("LEANVIT_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError, match="mine"):
        data.load("stanfordcars", "train")
    monkeypatch.delenv("LEANVIT_DATA")
    monkeypatch.chdir(tmp_path)
    assert data.default_root(None) == tmp_path / "data"


# ---- folders and files ---------------------------------------------------------------------------------------------


def test_imagefolder_with_and_without_splits(tmp_path):
    for split, n in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for k in range(n):
                picture(tmp_path / split / name / f"{k}.png")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    train, test = (data.load("imagefolder", s, root=tmp_path) for s in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0] * 3 + [1] * 3 and test.labels.tolist() == [0] * 2 + [1] * 2
    flat = [data.load("imagefolder", s, root=tmp_path / "train") for s in ("train", "test")]
    assert [len(f) for f in flat] == [4, 2] and not set(flat[0].images) & set(flat[1].images)
    before = train.sha256
    picture(tmp_path / "train" / "cat" / "0.png", size=(900, 900))
    assert data.load("imagefolder", "train", root=tmp_path).sha256 != before
    picture(tmp_path / "val" / "fox" / "0.png")
    with pytest.raises(DataError, match=r"has classes that .*train has not: fox"):
        data.load("imagefolder", "test", root=tmp_path)


def test_imagefolder_refuses_no_class_one_class_and_an_empty_class(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        data.load("imagefolder", "train", root=tmp_path / "absent")
    with pytest.raises(DataError, match="no class folder"):
        data.load("imagefolder", "train", root=tmp_path)
    picture(tmp_path / "cat" / "0.png")
    with pytest.raises(DataError, match=r"only one class \(cat\)"):
        data.load("imagefolder", "train", root=tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match="dog holds no image"):
        data.load("imagefolder", "train", root=tmp_path)


@pytest.mark.parametrize("mode, colour", [("L", 200), ("1", 1), ("P", 3), ("RGB", "blue"), ("CMYK", (9, 9, 9, 9))])
def test_every_mode_becomes_rgb(mode, colour, tmp_path):
    path = picture(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), mode=mode, colour=colour)
    image = data.open_image(path)
    assert image.mode == "RGB" and image.size == (8, 6)
    if mode == "L":
        assert image.getpixel((0, 0)) == (200, 200, 200)


def test_transparent_and_16_bit(tmp_path):
    picture(tmp_path / "a.png", mode="RGBA", colour=(255, 0, 0, 0))
    assert data.open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    picture(tmp_path / "la.png", mode="LA", colour=(10, 255))
    assert data.open_image(tmp_path / "la.png").getpixel((0, 0)) == (10, 10, 10)
    for name in ("a.png", "a.tif"):
        Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)).save(tmp_path / name)
        assert np.asarray(data.open_image(tmp_path / name))[..., 1].tolist() == [[0, 100], [200, 255]]
    Image.fromarray(np.array([[0.0, 1.0]], np.float32)).save(tmp_path / "f.tif")
    assert np.asarray(data.open_image(tmp_path / "f.tif"))[..., 0].tolist() == [[0, 255]]


def test_huge_and_tiny_images(tmp_path, monkeypatch):
    monkeypatch.setattr("leanvit.images.SHORT_SIDE_KEPT", 64)
    for name in ("a.jpg", "a.png"):
        small = data.open_image(picture(tmp_path / name, size=(1000, 300), colour="teal"))
        assert 64 <= small.height < 150 and abs(small.width / small.height - 10 / 3) < 0.1
    for mode in ("1", "P", "RGBA", "CMYK"):
        assert data.open_image(picture(tmp_path / f"{mode}.tif", (200, 300), mode)).size == (67, 100)
    with monkeypatch.context() as limits:
        limits.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
        assert data.open_image(tmp_path / "a.png").mode == "RGB"  # above Pillow's warning, below its error
        limits.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
        with pytest.raises(DataError, match=r"a.png.*300000 pixels"):
            data.open_image(tmp_path / "a.png")
    model = models.create("embedded_vit")
    for size in ((1, 1), (1, 500), (3000, 20)):
        for train in (False, True):
            path = picture(tmp_path / "b.png", size=size)
            assert models.transforms(model, train)(data.open_image(path)).shape == (3, 32, 32)


def test_broken_images_are_named(tmp_path):
    good = tmp_path / "cat" / "good.jpg"
    picture(good, size=(64, 64))
    picture(tmp_path / "dog" / "good.png", size=(64, 64), colour="red")
    broken = {"cat/cut.jpg": good.read_bytes()[:400], "cat/empty.jpg": b"", "dog/text.png": b"<html>404</html>"}
    broken["dog/cut.png"] = (tmp_path / "dog" / "good.png").read_bytes()[:60]
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: cannot be read as an image") as error:
            data.open_image(tmp_path / name)
        one_line(error)
    transform = models.transforms(models.create("embedded_vit"), False)
    found = data.load("imagefolder", "train", root=tmp_path, transform=transform)
    with pytest.raises(DataError, match="cannot be read as an image"):
        next(iter(DataLoader(found, len(found), collate_fn=data.collate)))


def test_a_folder_that_leaves_nothing_to_learn_from_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "flat" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / name / "only.png")
        (tmp_path / "half" / "train" / name).mkdir(parents=True)
    with pytest.raises(data.DataError, match="a holds only one image; two are needed"):
        data.load("imagefolder", "train", root=tmp_path / "flat")
    with pytest.raises(data.DataError, match="has train/ but no test/ or val/"):
        data.load("imagefolder", "train", root=tmp_path / "half")


# ---- sets that are too large to be held ----------------------------------------------------------------------------


def tree(folder, classes=("cat", "dog", "fox"), count=12, size=(40, 30)):
    """`count` files a class, each picture another one."""
    rng = np.random.default_rng(0)
    for name in classes:
        for k in range(count):
            path = folder / name / f"{k:03d}.{'png' if k % 2 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return folder


def imagenet(root, count=4):
    """ImageNet's folders as torchvision leaves them, with three classes, two of which share a name."""
    names = {"n01531178": ("goldfinch", "Carduelis carduelis"), "n02012849": ("crane",), "n03126707": ("crane",)}
    for split, images_per_class in (("train", count), ("val", 2)):
        tree(root / "imagenet" / split, names, images_per_class)
    torch.save((names, sorted(names) * 2), root / "imagenet" / "meta.bin")
    return names


def test_files_are_a_sequence_of_paths_in_two_arrays(tmp_path):
    paths = [str(tmp_path / "é" / f"{k}.png") for k in range(5)]
    files = Files(Path(path) for path in paths)
    assert list(files) == paths and len(files) == 5 and files[-1] == paths[-1]
    assert list(files.take([3, 1, -1])) == [paths[3], paths[1], paths[4]]
    assert list(pickle.loads(pickle.dumps(files))) == paths and len(Files([])) == 0
    with pytest.raises(IndexError):
        files[5]
    many = Files(f"/images/n{k % 1000:08d}/n{k % 1000:08d}_{k}.JPEG" for k in range(100_000))
    assert many.text.nbytes + many.ends.nbytes < 60 * len(many)  # a Path takes several hundred bytes
    assert many[99_999] == "/images/n00000999/n00000999_99999.JPEG"


def test_labels_are_known_and_parts_are_chosen_without_opening_an_image(tmp_path, monkeypatch):
    tree(tmp_path / "folder")
    imagenet(tmp_path)

    def opened(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", opened)
    monkeypatch.setattr(images, "open_image", opened)
    for name, root in (("imagefolder", tmp_path / "folder"), ("imagenet", tmp_path)):
        found = data.load(name, "train", root=root, limit=6, seed=1)
        assert isinstance(found.images, Files) and found.labels.bincount().tolist() == [2, 2, 2]
        folders = [Path(p).parent for p in found.images]
        assert [p.name for p in folders] == [sorted(os.listdir(folders[0].parent))[y] for y in found.labels]
        assert len(data.few_shot(found, 1, seed=0)) == 3
        with pytest.raises(AssertionError, match="an image was opened"):
            found[0]


def test_each_file_of_a_folder_is_asked_for_its_size_once(tmp_path, monkeypatch):
    tree(tmp_path / "train"), tree(tmp_path / "val", count=2)
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: asked.append(str(path)) or stat(path, **how))
    data.load("imagefolder", "train", root=tmp_path)
    files = [path for path in asked if path.endswith((".png", ".jpg"))]
    assert len(files) == len(set(files)) <= 36 and not any("val" in path for path in files)


def test_order_of_a_folder_is_that_of_its_parts_and_links_count(tmp_path):
    for name in ("a/b/1.png", "a/b.c/2.png", "a/b-c/3.png", "b/4.png", "b/5.PNG"):
        picture(tmp_path / "train" / name)
    (tmp_path / "train" / "b" / "6.png").symlink_to(tmp_path / "train" / "a" / "b" / "1.png")
    (tmp_path / "train" / "b" / "7.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "test" / "a").mkdir(parents=True), (tmp_path / "test" / "b").mkdir()
    found = data.load("imagefolder", "train", root=tmp_path)
    names = [Path(p).relative_to(tmp_path / "train").as_posix() for p in found.images]
    assert names == ["a/b/1.png", "a/b-c/3.png", "a/b.c/2.png", "b/4.png", "b/5.PNG", "b/6.png"]


def test_imagenet_as_torchvision_lays_it_out(tmp_path):
    names = imagenet(tmp_path)
    train, test = (data.load("imagenet", split, root=tmp_path) for split in ("train", "test"))
    assert train.classes == ["goldfinch", "crane", "crane"] == [names[w][0] for w in sorted(names)]
    assert train.labels.bincount().tolist() == [4] * 3 and test.labels.bincount().tolist() == [2] * 3
    assert [sorted(names)[y] for y in test.labels] == [Path(p).parent.name for p in test.images]
    assert np.array_equal(np.asarray(train.pil(1)), np.asarray(Image.open(train.images[1])))


def test_imagenet_that_is_there_but_incomplete_says_what_is_missing(tmp_path):
    imagenet(tmp_path)
    for file in (tmp_path / "imagenet" / "val" / "n02012849").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"imagenet.*n02012849") as error:
        data.load("imagenet", "test", root=tmp_path)
    one_line(error)
    (tmp_path / "imagenet" / "meta.bin").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"imagenet.*meta.bin.*remove it") as error:
        data.load("imagenet", "train", root=tmp_path)
    one_line(error)
    (tmp_path / "imagenet" / "meta.bin").unlink()
    with pytest.raises(DataError, match=r"devkit_t12.*imagefolder") as error:
        data.load("imagenet", "train", root=tmp_path)
    one_line(error)


@pytest.mark.parametrize("name", ["imagefolder", "imagenet"])
def test_workers_give_the_same_batches_of_files(name, tmp_path):
    imagenet(tmp_path)
    root = tmp_path / "imagenet" if name == "imagefolder" else tmp_path
    model = models.create("embedded_vit", num_classes=3)
    found = data.load(name, "train", root=root, transform=models.transforms(model, False))
    alone, many = (list(evaluate.loader(found, 5, workers=workers)) for workers in (0, 2))
    assert [len(y) for _, y in alone] == [5, 5, 2] and torch.equal(torch.cat([y for _, y in many]), found.labels)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(alone, many, strict=True))
    predicted = [evaluate.predict(model, found, 5, workers=workers)[0] for workers in (0, 2)]
    assert torch.equal(*predicted)


def test_memory_does_not_grow_with_the_files_opened(tmp_path):
    tree(tmp_path, count=8, size=(300, 200))
    model = models.create("embedded_vit", num_classes=3)
    found = data.load("imagefolder", "train", root=tmp_path, transform=models.transforms(model, False))

    def read(times):
        for _ in range(times):
            for _ in evaluate.loader(found, 6):
                pass

    read(2)
    files = psutil.Process().num_fds()
    tracemalloc.start()
    read(1)
    before, peak = tracemalloc.get_traced_memory()
    read(10)
    after, peaks = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 30_000 and peaks < peak + 100_000  # one picture as it is decoded: 180,000 bytes
    assert psutil.Process().num_fds() == files


GROWTH = """
import gc, os, sys
import psutil, torch
from leanvit.images import ImageSet
names = [f"{sys.argv[1]}/n{k % 1000:08d}/{k:08d}.JPEG" for k in range(100_000)]
kinds = names, [[name] for name in names]
sets = [ImageSet("many", ["a", "b"], torch.zeros(len(names)), kind, "0" * 64) for kind in kinds]
gc.disable()  # it writes to objects, too
for found in sets:
    ends = os.pipe()
    if os.fork() == 0:  # as a worker of a DataLoader is started
        before = psutil.Process().memory_full_info().uss
        for i in range(len(found)):
            found.images[i]
        os.write(ends[1], str(psutil.Process().memory_full_info().uss - before).encode())
        os._exit(0)
    print(os.read(ends[0], 100).decode())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork, and memory that is not shared, as Linux tells it")
def test_workers_share_the_names_of_the_files(tmp_path):
    # a list of objects is copied page by page, because looking at one counts a reference in it
    command = [sys.executable, "-c", GROWTH, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    files, objects = (int(word) / 2**20 for word in told.split())
    assert files < 2 < 5 < objects
