"""Images with labels: the embedded sets, any torchvision set of the papers, any folder in the ImageFolder layout.

`load(name, split)` returns an `ImageSet`. The embedded sets (`fashion_mnist_10k`, `digits`) are stored as they are,
28 x 28 and grey, and shown as 32 x 32 (a border of 2 zero pixels) in three equal channels, so that patches of
4 pixels give a grid of 8 x 8. `tools/make_embedded_data.py` made the files; `assets/data.json` holds their checksums.

Published splits are kept where there are any. EuroSAT, SUN397 and Caltech101 have none in torchvision: there, and for
a plain folder of classes, one image in five of every class is for testing, by a choice that never changes.

VOC 2007 is read as classification with several classes an image: those of its objects that are not marked difficult.
"""

import difflib
import gzip
import json
import os
import pickle
import shutil
import socket
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.datasets as tv

from leanvit.images import DataError, ImageSet, balanced, collate, few_shot, open_image, sha256, subset
from leanvit.surgery import is_whole

__all__ = ["NAMES", "DataError", "ImageSet", "collate", "few_shot", "load", "open_image", "subset"]

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ("fashion_mnist_10k", "digits")
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it

# name -> torchvision class, its arguments for (train, test); one entry: no published split, see `_cut`
_TORCHVISION: dict[str, tuple[str, list[dict]]] = {
    "mnist": ("MNIST", [{"train": True}, {"train": False}]),
    "cifar10": ("CIFAR10", [{"train": True}, {"train": False}]),
    "cifar100": ("CIFAR100", [{"train": True}, {"train": False}]),
    "svhn": ("SVHN", [{"split": "train"}, {"split": "test"}]),
    "stl10": ("STL10", [{"split": "train"}, {"split": "test"}]),
    "flowers102": ("Flowers102", [{"split": "train"}, {"split": "test"}]),
    "food101": ("Food101", [{"split": "train"}, {"split": "test"}]),
    "oxfordiiitpet": ("OxfordIIITPet", [{"split": "trainval"}, {"split": "test"}]),
    "stanfordcars": ("StanfordCars", [{"split": "train"}, {"split": "test"}]),
    "fgvcaircraft": ("FGVCAircraft", [{"split": "trainval"}, {"split": "test"}]),
    "dtd": ("DTD", [{"split": "train"}, {"split": "test"}]),
    "gtsrb": ("GTSRB", [{"split": "train"}, {"split": "test"}]),
    "pcam": ("PCAM", [{"split": "train"}, {"split": "test"}]),
    "country211": ("Country211", [{"split": "train"}, {"split": "test"}]),
    "renderedsst2": ("RenderedSST2", [{"split": "train"}, {"split": "test"}]),
    "imagenet": ("ImageNet", [{"split": "train"}, {"split": "val"}]),
    "fer2013": ("FER2013", [{"split": "train"}, {"split": "test"}]),
    "voc2007": ("VOCDetection", [{"year": "2007", "image_set": k} for k in ("train", "test")]),
    "eurosat": ("EuroSAT", [{}]),
    "sun397": ("SUN397", [{}]),
    "caltech101": ("Caltech101", [{}]),
}
# what torchvision raises where a set is not there, or not whole
_NOT_THERE = (RuntimeError, FileNotFoundError, NotADirectoryError, ModuleNotFoundError)
_NOT_THERE += (EOFError, pickle.UnpicklingError)
_FER_CLASSES = ["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"]
_VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
NAMES = (*EMBEDDED, "fashion_mnist", "imagefolder", *_TORCHVISION)

# What torchvision cannot fetch, and where it can be had.
_BY_HAND = {
    "fer2013": "get fer2013.csv of the Kaggle challenge on facial expression recognition into fer2013/ there",
    "stanfordcars": "torchvision can no longer download it (its server is gone); get images and devkit elsewhere and "
    "lay them out there as cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat, or sort the images "
    "into one folder per class and use imagefolder",
    "imagenet": "get ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from "
    "image-net.org into it, or use imagefolder on an unpacked copy",
}


def load(
    name: str,
    split: str,
    *,
    root: str | Path | None = None,
    transform: Callable | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """The set `name` (one of `NAMES`), `split` "train" or "test".

    `root` is the folder that holds the set; the default is `$LEANVIT_DATA`, else `data/` in the repository. `limit`
    keeps that many images, chosen with `seed`, as many of each class as can be. A torchvision set that is not there
    is downloaded. Raises `DataError`: unknown name, a set that is missing or damaged, fewer than two classes.

    >>> from leanvit import data
    >>> digits = data.load("digits", "train", limit=100)
    >>> digits
    ImageSet('digits', 100 images, 10 classes)
    >>> image, label = digits[0]
    >>> image.shape, image.dtype
    (torch.Size([3, 32, 32]), torch.float32)
    """
    key = name.lower().replace("-", "_")
    key = key if key in NAMES else key.replace("_", "")
    if key not in NAMES:
        near = difflib.get_close_matches(key, NAMES, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise DataError(f"unknown data set {name!r}: {hint}known are {', '.join(NAMES)}")
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r} of {name}: train or test")
    if limit is not None and not is_whole(limit):
        raise DataError(f"limit={limit!r} of {name}: a whole number of at least 1 image, or None for all")
    if key in EMBEDDED:
        found = _embedded(key, split)
    elif key == "fashion_mnist":
        found = _fashion_mnist(split, root)
    elif key == "imagefolder":
        found = _imagefolder(root, split)
    else:
        found = _torchvision(key, split, default_root(root))
    found.transform = transform
    if limit is not None and limit < len(found):
        # several classes an image cannot be balanced: then any of them
        found = subset(found, balanced(torch.zeros(len(found)) if found.several else found.labels, limit, seed))
    return found


def _sha256_of(images, labels: torch.Tensor) -> str:
    """Of pixels and labels in memory; of the names, sizes and labels of files (reading them all would take minutes)."""
    if isinstance(images, torch.Tensor):
        return sha256(images.contiguous().numpy().data, labels.numpy().astype("<i8").tobytes())
    names = (_name_and_size(p) if isinstance(p, str | Path) else "" for p in images)
    return sha256("\n".join(names).encode(), labels.numpy().astype("<i8").tobytes())


def _name_and_size(file: str | Path) -> str:
    folder, name = os.path.split(file)
    return f"{os.path.basename(folder)}/{name} {os.stat(file).st_size}"


def _cut(labels: torch.Tensor, split: str) -> torch.Tensor:
    """Indices of one half of a split that never changes: of every class every fifth image is for testing."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test = torch.cat([order[labels[order] == c][::5] for c in labels.unique()])
    mask = torch.zeros(len(labels), dtype=torch.bool).index_fill_(0, test, True)
    return torch.nonzero(mask if split == "test" else ~mask).flatten()


def default_root(root: str | Path | None) -> Path:
    """The folder that holds the sets: `root`, else `$LEANVIT_DATA`, else data/ in the repository."""
    if root is not None or "LEANVIT_DATA" in os.environ:
        return Path(root if root is not None else os.environ["LEANVIT_DATA"]).expanduser()
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "lib" / "leanvit").is_dir()), here) / "data"


def _embedded(name: str, split: str) -> ImageSet:
    entry = json.loads((ASSETS / "data.json").read_text())[name]
    parts = []
    for file in entry["files"][split]:
        raw = (ASSETS / file["file"]).read_bytes() if (ASSETS / file["file"]).is_file() else b""
        if sha256(raw) != file["sha256"]:
            raise DataError(
                f"embedded data: assets/{file['file']} is damaged or missing ({len(raw)} bytes, not the recorded "
                "checksum): install the package again, or `git checkout -- lib/leanvit/assets`"
            )
        with np.load(ASSETS / file["file"]) as part:
            parts.append((part["images"], part["labels"]))
    images = F.pad(torch.from_numpy(np.concatenate([p[0] for p in parts])), (2, 2, 2, 2))[:, None]
    digest = sha256(*(file["sha256"].encode() for file in entry["files"][split]))
    return ImageSet(name, entry["classes"], np.concatenate([p[1] for p in parts]), images, digest)


def _read_idx(path: Path) -> torch.Tensor:
    """One gzipped idx file of unsigned bytes, of one or three dimensions."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: damaged ({error}); get it again") from None
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4) if len(raw) >= 8 and raw[:3] == b"\0\0\x08" else None
    if sizes is None or len(raw) != 4 + 4 * raw[3] + int(np.prod(sizes, dtype=np.int64)):
        raise DataError(f"{path}: {len(raw)} bytes do not fit an idx header of unsigned bytes; get the file again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes.astype(int)).copy())


def _fashion_mnist(split: str, root: str | Path | None) -> ImageSet:
    prefix = {"train": "train", "test": "t10k"}[split]
    base = default_root(root)
    files = [f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"]
    folders = [base, base / "FashionMNIST" / "raw", *([DEBIAN_FASHION] if root is None else [])]
    folder = next((f for f in folders if all((f / name).is_file() for name in files)), None)
    if folder is None:
        raise DataError(
            f"fashion_mnist: {files[0]} and {files[1]} are in none of {', '.join(map(str, folders))}; get them with "
            "`apt-get install dataset-fashion-mnist` (Debian, Ubuntu) or "
            f"`{_command('FashionMNIST', base, {})}`, or use the embedded fashion_mnist_10k"
        )
    images, labels = (_read_idx(folder / name) for name in files)
    classes = json.loads((ASSETS / "data.json").read_text())["fashion_mnist_10k"]["classes"]
    digest = _sha256_of(images, labels.long())
    return ImageSet("fashion_mnist", classes, labels, F.pad(images, (2, 2, 2, 2))[:, None], digest)


def _imagefolder(root: str | Path | None, split: str) -> ImageSet:
    if root is None:
        raise DataError("imagefolder: give root=, a folder with {train,test}/<class>/<image>, or with <class>/<image>")
    base = Path(root).expanduser()
    if not base.is_dir():
        raise DataError(f"imagefolder: {base} is not a folder")
    test = next((base / n for n in ("test", "val", "valid", "validation") if (base / n).is_dir()), None)
    if (base / "train").is_dir() and test is None:
        raise DataError(f"imagefolder: {base} has train/ but no test/ or val/ beside it")
    has_splits = (base / "train").is_dir()
    folder = (base / "train" if split == "train" else test) if has_splits else base
    classes = _class_folders(base / "train" if has_splits else base)
    if has_splits and (unknown := sorted(set(_class_folders(folder)) - set(classes))):
        raise DataError(f"imagefolder: {folder} has classes that {base / 'train'} has not: {', '.join(unknown[:5])}")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(_images_below(folder / name), key=_by_parts)
        if not found and folder != test:
            endings = ", ".join(tv.folder.IMG_EXTENSIONS)
            raise DataError(f"imagefolder: class folder {folder / name} holds no image ({endings})")
        files += found
        labels += [label] * len(found)
    sizes = Counter(labels)
    few = [name for label, name in enumerate(classes) if sizes[label] < 2]
    if few and not has_splits:
        raise DataError(
            f"imagefolder: {base} has no train/ and test/, so one image in five of every class is for testing, but "
            f"{few[0]} holds only one image; two are needed at least"
        )
    labels = torch.tensor(labels, dtype=torch.long)
    whole = ImageSet("imagefolder", classes, labels, files, _sha256_of(files, labels))
    return whole if has_splits else subset(whole, _cut(labels, split).tolist())


def _images_below(folder: Path | str) -> Iterator[str]:
    """Image files at any depth; the system tells while listing what is a file, so no file is asked one by one."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _images_below(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in tv.folder.IMG_EXTENSIONS and entry.is_file():
                yield entry.path


def _by_parts(path: str | Path) -> str:
    """A key that sorts paths folder by folder, as `Path` compares, and much faster."""
    return str(path).replace(os.sep, "\0")


def _class_folders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    if len(names) < 2:
        what = f"only one class ({names[0]})" if names else "no class folder"
        raise DataError(f"imagefolder: {folder} holds {what}; at least two are needed, laid out as <class>/<image>")
    return names


def _command(cls: str, root: Path, args: dict) -> str:
    words = "".join(f", {k}={v!r}" for k, v in args.items())
    return f'python -c "import torchvision; torchvision.datasets.{cls}({str(root)!r}{words}, download=True)"'


def _torchvision(name: str, split: str, root: Path) -> ImageSet:
    cls, variants = _TORCHVISION[name]
    args = variants[0 if split == "train" or len(variants) == 1 else 1]
    if name == "imagenet":
        root = root / "imagenet"
    found = _open_torchvision(name, cls, root, args)
    images, labels, classes = _contents(name, found)
    whole = ImageSet(name, classes, labels, images, _sha256_of(images, labels))
    return whole if len(variants) == 2 else subset(whole, _cut(labels, split))


def _open_torchvision(name: str, cls: str, root: Path, args: dict):
    """The torchvision set, downloaded when it is not there; else a `DataError` of one line."""
    make, folder = getattr(tv, cls), "stanford_cars" if name == "stanfordcars" else ""
    try:
        return make(str(root), **args)
    except _NOT_THERE as error:
        if name == "imagenet" and all((root / part).exists() for part in ("meta.bin", args["split"])):
            raise DataError(_incomplete_imagenet(root, error)) from None
        package = _lacks_package(error)
        needs = f"torchvision needs the package {package} to read this set: pip install {package}" if package else ""
        if name in _BY_HAND and not (needs and (root / folder).is_dir()):
            more = f"; {needs}" if needs else ""
            raise DataError(f"{name} is not in {root / folder}: {_BY_HAND[name]}{more}") from None
        if needs:
            raise DataError(f"{name}: {needs}") from None
    timeout = socket.getdefaulttimeout()
    existed = root.exists()
    try:
        socket.setdefaulttimeout(30.0)  # a network that swallows packets must not hang the run
        root.mkdir(parents=True, exist_ok=True)
        return make(str(root), download=True, **args)
    except (OSError, RuntimeError, urllib.error.URLError, EOFError) as error:
        if not existed:
            shutil.rmtree(root, ignore_errors=True)
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name} is not under {root}, and it cannot be downloaded here ({why}); "
            f"on a machine with a network: `{_command(cls, Path('data'), args)}`, then copy data/ to {root}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _incomplete_imagenet(root: Path, error: Exception) -> str:
    if isinstance(error, OSError):  # a class without an image, a folder that may not be read
        return f"imagenet in {root} is not complete: {str(error).splitlines()[0]}"
    again = "remove it, and torchvision makes it again from ILSVRC2012_devkit_t12.tar.gz beside it"
    return f"imagenet: {root / 'meta.bin'} cannot be read ({type(error).__name__}); {again}"


def _lacks_package(error: Exception) -> str | None:
    if isinstance(error, ModuleNotFoundError):
        return error.name
    return next((p for p in ("scipy", "h5py") if f"{p} is not found" in str(error).lower()), None)


def _contents(name: str, found) -> tuple[torch.Tensor | list, torch.Tensor, list[str]]:
    """Images (a uint8 tensor, files, or functions), labels and class names of a torchvision set."""
    if name == "pcam":
        import h5py

        with h5py.File(found._base_folder / found._FILES[found._split]["targets"][0]) as file:
            labels = torch.from_numpy(file["y"][:].reshape(-1).astype(np.int64))
        return [lambda i=i: found[i][0] for i in range(len(found))], labels, ["no tumour", "tumour"]
    if name == "fer2013":
        pictures, labels = zip(*found._samples, strict=True)
        if None in labels:
            raise DataError("fer2013: test.csv holds no labels; fer2013.csv or icml_face_data.csv is needed")
        return torch.stack(pictures)[:, None], torch.tensor(labels), _FER_CLASSES
    if name == "voc2007":
        return [Path(p) for p in found.images], _voc_labels(found.annotations), _VOC_CLASSES
    if name == "caltech101":
        base = Path(found.root) / "101_ObjectCategories"
        files = [base / found.categories[y] / f"image_{k:04d}.jpg" for y, k in zip(found.y, found.index, strict=True)]
        return files, torch.tensor(found.y), found.categories
    if hasattr(found, "data"):  # MNIST (N, H, W), CIFAR (N, H, W, 3), SVHN and STL10 (N, 3, H, W)
        images = torch.as_tensor(found.data)
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        labels = np.asarray(found.targets if hasattr(found, "targets") else found.labels)
        classes = getattr(found, "classes", [str(digit) for digit in range(10)])
        return images.contiguous(), torch.as_tensor(labels, dtype=torch.long), list(classes)
    pairs = getattr(found, "_samples", None) or getattr(found, "samples", None)
    if pairs is None:  # Flowers102, Food101, FGVCAircraft, DTD, SUN397; OxfordIIITPet
        pairs = zip(getattr(found, "_image_files", None) or found._images, found._labels, strict=True)
    pairs = sorted(pairs, key=lambda pair: _by_parts(pair[0]))  # some list a folder in the file system's order
    labels = torch.tensor([int(y) for _, y in pairs])
    classes = getattr(found, "classes", None) or [str(c) for c in range(int(labels.max()) + 1)]
    return [str(p) for p, _ in pairs], labels, [c[0] if isinstance(c, tuple) else c for c in classes]


def _voc_labels(annotations: list[str]) -> torch.Tensor:
    """Zeros and ones (N, 20): the classes of the objects of an image that are not marked difficult."""
    labels = torch.zeros(len(annotations), len(_VOC_CLASSES))
    for row, path in zip(labels, annotations, strict=True):
        for thing in ElementTree.parse(path).iter("object"):
            if thing.findtext("difficult", "0") == "0":
                row[_VOC_CLASSES.index(thing.findtext("name"))] = 1
    return labels
