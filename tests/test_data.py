"""Data: embedded sets, torchvision sets on disk, folders, image files of every kind, and what can be wrong."""

import gzip
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from leanvit import data, models
from leanvit.images import DataError


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
    with pytest.raises(DataError, match="limit=0"):
        data.load("digits", "test", limit=0)


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
