"""Labelled images: the set, a part of it, and reading an image file of any kind."""

import hashlib
import os
import random
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from leanvit.surgery import is_whole

SHORT_SIDE_KEPT = 2048  # pixels of the shorter side: larger photographs are reduced while they are read
# what Pillow's decoders raise on damaged files
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, OverflowError)
_BROKEN += (struct.error, zlib.error)


class DataError(ValueError):
    """A set of images that is missing, damaged or malformed. The message is one line and says what would be right."""


class Files(Sequence):
    """Paths of N files as one array of bytes and one of N ends; `[i]` is a str.

    A million paths as objects take several hundred MB, and every process that loads images would copy them bit by bit,
    because looking at an object writes to its count of references. Arrays stay shared.
    """

    def __init__(self, paths: Iterable[str | Path]):
        names = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.text = np.frombuffer(b"".join(names), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]  # negative indices; IndexError past the end
        return os.fsdecode(self.text[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes())

    def take(self, indices: Iterable[int]) -> "Files":
        """The files at `indices`, in that order."""
        return Files(self[i] for i in indices)


class ImageSet(Dataset):
    """Labelled images.

    `images` is a uint8 tensor (N, C, H, W) with C 1 or 3 for sets in memory, or a sequence of N image files (a list of
    paths is kept as `Files`; a file is read when its image is asked for, and not kept), or of N functions that return a
    PIL image. `[i]` gives (image float32 (3, H, W), label int); without a transform the image
    is scaled to 0..1 and not normalised. A transform with the attribute `batched` (`models.transforms`) takes uint8
    tensors, whole batches of sets in memory at once; every other transform takes one RGB PIL image.

    Labels are whole numbers `(N,)`. Where an image has several classes, or none, they are zeros and ones
    `(N, classes)`, kept as float32, and `[i]` gives a row of them.

    Raises `DataError` for another number of labels than of images, and labels that are no class.
    """

    def __init__(self, name: str, classes: list[str], labels, images, sha256: str, transform: Callable | None = None):
        self.name, self.classes, self.sha256 = name, list(classes), sha256
        if isinstance(images, list) and images and isinstance(images[0], str | Path):
            images = Files(images)
        self.images, self.transform = images, transform
        labels = torch.as_tensor(labels)
        self.labels = labels.to(torch.float32 if labels.ndim == 2 else torch.long)
        if len(self.labels) != len(images):
            raise DataError(f"{name}: {len(images)} images but {len(self.labels)} labels")
        if self.several:
            if labels.shape[1] != len(self.classes) or not ((labels == 0) | (labels == 1)).all():
                raise DataError(f"{name}: labels of several classes must be 0 or 1, (N, {len(self.classes)})")
        elif len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            wrong = sorted({int(v) for v in self.labels if not 0 <= v < len(self.classes)})[:5]
            raise DataError(f"{name}: labels {wrong} lie outside 0..{len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"ImageSet({self.name!r}, {len(self)} images, {len(self.classes)} classes)"

    @property
    def several(self) -> bool:
        """May an image have several classes, or none?"""
        return self.labels.ndim == 2

    @property
    def in_memory(self) -> bool:
        """Is it one tensor, and no files or functions?"""
        return isinstance(self.images, torch.Tensor)

    def pil(self, i: int) -> Image.Image:
        """Image `i` as it is, RGB, before any transform."""
        if self.in_memory:
            return to_pil_image(self.images[i]).convert("RGB")
        image = self.images[i]
        return image() if callable(image) else open_image(image)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        i = range(len(self))[int(i)]  # negative indices; IndexError past the end
        if self.in_memory and (self.transform is None or getattr(self.transform, "batched", False)):
            images, labels = self.__getitems__([i])
            return images[0], labels[0] if self.several else int(labels[0])
        image = self.pil(i)
        image = pil_to_tensor(image).float().div(255) if self.transform is None else self.transform(image)
        return image, self.labels[i] if self.several else int(self.labels[i])

    def __getitems__(self, indices: list[int]):
        """A whole batch: (images (B, 3, H, W), labels (B,)) for sets in memory, else a list of pairs; see `collate`."""
        if not (self.in_memory and (self.transform is None or getattr(self.transform, "batched", False))):
            return [self[i] for i in indices]
        index = torch.as_tensor(indices)
        images = self.images[index].expand(-1, 3, -1, -1)
        images = images.float().div(255) if self.transform is None else self.transform(images)
        return images, self.labels[index]

    def with_transform(self, transform: Callable | None) -> "ImageSet":
        """The same images and labels, shared, under another transform."""
        return ImageSet(self.name, self.classes, self.labels, self.images, self.sha256, transform)


def collate(batch):
    """For `DataLoader(collate_fn=…)`: passes an already batched pair through, stacks a list of pairs."""
    if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[1], torch.Tensor):
        return batch
    return default_collate(batch)


def subset(dataset: ImageSet, indices: Sequence[int]) -> ImageSet:
    """The images at `indices`, in that order; classes, labels and transform are kept.

    Raises `DataError` for an index outside of the set.
    """
    index = torch.as_tensor(indices, dtype=torch.long)
    if len(index) and not -len(dataset) <= int(index.min()) <= int(index.max()) < len(dataset):
        raise DataError(f"subset of {dataset.name}: index outside 0..{len(dataset) - 1}")
    if dataset.in_memory:
        images = dataset.images[index]
    elif isinstance(dataset.images, Files):
        images = dataset.images.take(index.tolist())
    else:
        images = [dataset.images[i] for i in index.tolist()]
    digest = sha256(dataset.sha256.encode(), index.numpy().astype("<i8").tobytes())
    return ImageSet(dataset.name, dataset.classes, dataset.labels[index], images, digest, dataset.transform)


def few_shot(dataset: ImageSet, shots: int, seed: int) -> ImageSet:
    """`shots` images of every class, as ELEVATER samples them: the set is shuffled with Python's `random.Random(seed)`
    and walked through, and an image is kept while its class has fewer than `shots`; their order is kept.

    Several classes an image: one is passed over when each of its classes has `shots`, and else kept when its rarest
    class has at most half of `shots` or its commonest at most one and a half; up to `shots` images without a class are
    kept; the walk ends when every class has `shots`. A class may then end with more than `shots`, and rarely with
    fewer. Raises `DataError` where the whole set has fewer than `shots` of a class.

    >>> from leanvit import data
    >>> data.few_shot(data.load("digits", "train"), shots=5, seed=0)
    ImageSet('digits', 50 images, 10 classes)
    """
    if not is_whole(shots):
        raise DataError(f"{shots!r} shots of {dataset.name}: it must be a whole number of at least 1")
    owned = classes_of(dataset)
    available = Counter(label for labels in owned for label in labels)
    short = [f"{name} ({available[c]})" for c, name in enumerate(dataset.classes) if available[c] < shots]
    if short:
        raise DataError(f"{shots} shots of {dataset.name}: too few images of {', '.join(short[:5])}")
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    kept, without, counts = [], 0, [0] * len(dataset.classes)
    for i in order:
        have = [counts[c] for c in owned[i]]
        if not have:
            without += 1
            keep = without <= shots
        else:
            keep = min(have) < shots and (2 * min(have) <= shots or 2 * max(have) <= 3 * shots)
        if keep:
            kept.append(i)
            for c in owned[i]:
                counts[c] += 1
            if min(counts) >= shots:
                break
    return subset(dataset, kept)


def classes_of(dataset: ImageSet) -> list[list[int]]:
    """For every image the numbers of its classes: one, or any number where the set has several."""
    if not dataset.several:
        return [[label] for label in dataset.labels.tolist()]
    return [[c for c, present in enumerate(row) if present] for row in dataset.labels.tolist()]


def open_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB. 16-bit is scaled, transparency is laid on white, the first frame is taken.

    A photograph whose shorter side is above 2 x 2048 pixels is reduced by a whole factor while it is read. Raises
    `DataError` naming the file when it is broken, or larger than Pillow takes for safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # reduced below; the error stays
            with Image.open(path) as image:
                image.draft(None, (SHORT_SIDE_KEPT, SHORT_SIDE_KEPT))  # JPEG: decodes at 1/2, 1/4, 1/8
                image.load()
                return _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}; reduce it first") from None
    except _BROKEN as error:
        why = "not an image" if isinstance(error, Image.UnidentifiedImageError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: cannot be read as an image ({why}); mend or remove the file") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            scale = 255 if values.max(initial=0) <= 1 else 1
        else:
            scale = 1 / 257 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 1
        image = Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    if (factor := min(image.size) // SHORT_SIDE_KEPT) > 1:
        image = (image.convert("RGBA") if image.mode in ("1", "P", "PA", "LA") else image).reduce(factor)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def sha256(*parts: bytes) -> str:
    """SHA-256 of the parts one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def balanced(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` indices `(count,)` into `labels (N,)`, as many of each class as can be, in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    seen: dict[int, int] = {}
    turn = torch.empty(len(order), dtype=torch.long)
    for k, label in enumerate(labels[order].tolist()):
        turn[k] = seen[label] = seen.get(label, -1) + 1
    chosen = order[torch.argsort(turn, stable=True)[:count]]
    return chosen[torch.randperm(count, generator=generator)]
