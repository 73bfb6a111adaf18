"""What a model says about a data set: predictions, and the metrics of ELEVATER (arXiv 2204.08790).

Metrics by name are in `METRICS`, each `f(logits (N, classes), labels) -> float` in [0, 1]; labels are whole numbers
`(N,)`, for map11 zeros and ones `(N, classes)`. A NaN among the scores is an error, never a number.
"""

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Give every module its own train or eval mode back at the end."""
    before = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def fetch(dataset: Dataset, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images `(B, ...)` and labels `(B,)` of `indices`, in one call where the set offers `__getitems__`."""
    if not hasattr(dataset, "__getitems__"):
        return tuple(default_collate([dataset[i] for i in indices]))
    samples = dataset.__getitems__(list(indices))
    # a list of (image, label) pairs is what torch's own sets return; ours returns the pair of batches
    return tuple(samples) if isinstance(samples[0], Tensor) else tuple(default_collate(samples))


class _Fetched(Dataset):
    """A set whose batches are made by `fetch`, inside the loader's worker."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return fetch(self.dataset, indices)


def as_it_is(batch: Any) -> Any:
    """A collate function for batches that are already made."""
    return batch


def loader(
    dataset: Dataset,
    batch_size: int,
    *,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches (images `(B, ...)`, labels `(B,)`) of the set, or of its `indices`, in that order.

    Nothing is read before it is iterated, which may be done again and again: the `workers`, processes that prepare two
    batches each in advance, stay until the loader is forgotten. `pin_memory` for a model on a CUDA device.
    """
    return DataLoader(
        _Fetched(dataset), batch_size, sampler=range(len(dataset)) if indices is None else indices,
        collate_fn=as_it_is, num_workers=workers, persistent_workers=workers > 0, pin_memory=pin_memory,
        worker_init_fn=worker_setup,
    )  # fmt: skip


def worker_setup(worker: int) -> None:
    """In a process that loads images: Ctrl-C reaches the whole group, and the main process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def batch_for(device: torch.device) -> int:
    """Images of a batch without gradients: 256; 32 on a CPU, whose caches hold no more (256: up to twice the time)."""
    return 32 if device.type == "cpu" else 256


def predict(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int | None = None,
    *,
    workers: int = 0,
    indices: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits `(N, classes)` and labels `(N,)` in the set's order, both on the CPU; the model's modes stay as they were.

    `batch_size`: `batch_for` its device by default. `indices` asks for a part of the set. The model runs in eval mode,
    without gradients, on the device where it is.
    Raises `ValueError` when there is nothing to predict, `TypeError` for images that are no floats.

    >>> from leanvit import data, evaluate, models
    >>> model = models.create("embedded_vit", checkpoint="embedded")
    >>> clothes = data.load("fashion_mnist_10k", "test", transform=models.transforms(model, train=False), limit=20)
    >>> logits, labels = evaluate.predict(model, clothes)
    >>> logits.shape, labels.shape
    (torch.Size([20, 10]), torch.Size([20]))
    """
    indices = range(len(dataset)) if indices is None else indices
    if len(indices) == 0:
        raise ValueError(f"predict: {getattr(dataset, 'name', 'the data set')} has no image to predict")
    device = device_of(model)
    how = {"workers": workers, "indices": indices, "pin_memory": device.type == "cuda"}
    return predict_batches(model, loader(dataset, batch_for(device) if batch_size is None else batch_size, **how))


def predict_batches(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`predict` over batches (images `(B, ...)`, labels `(B,)`), such as a `loader` that is used again and again.

    Raises `TypeError` for images that are no floats.
    """
    device = device_of(model)
    logits, labels = [], []
    with modes_restored(model), torch.no_grad():
        model.eval()
        for images, target in batches:
            if not images.is_floating_point():
                raise TypeError(f"predict: the images are {images.dtype}; floating-point ones are needed")
            logits.append(model(images.to(device, non_blocking=True)).float().cpu())
            labels.append(target)
    return torch.cat(logits), torch.cat(labels)


def accuracy(model: nn.Module, dataset: Dataset, batch_size: int | None = None, *, workers: int = 0) -> float:
    """Part of the images whose largest logit is the label's, in [0, 1]. Raises as `predict` and `top1`.

    >>> from leanvit import data, evaluate, models
    >>> model = models.create("embedded_vit", checkpoint="embedded")
    >>> clothes = data.load("fashion_mnist_10k", "test", transform=models.transforms(model, train=False), limit=50)
    >>> evaluate.accuracy(model, clothes) > 0.7
    True
    """
    return top1(*predict(model, dataset, batch_size, workers=workers))


def _no_nan(scores: Tensor, what: str) -> None:
    if (nan := int(scores.isnan().sum())) > 0:
        raise ValueError(f"{what}: {nan} of {scores.numel()} scores are NaN")


def top1(logits: Tensor, labels: Tensor) -> float:
    """Part of the rows of `logits (N, classes)` whose largest is the one of `labels (N,)`, in [0, 1].

    Raises `ValueError` for shapes that do not belong together, no row, or a NaN.

    >>> import torch
    >>> from leanvit import evaluate
    >>> evaluate.top1(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [5.0, 4.0]]), torch.tensor([0, 1, 1, 0]))
    0.75
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"accuracy: logits (N, classes) and labels (N,) belong together, N > 0; got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    _no_nan(logits, "accuracy")
    return (logits.argmax(1) == labels).double().mean().item()


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts `(classes, classes)`: row = the true class, column = the predicted one.

    `logits (N, classes)` and `labels (N,)` are `predict`'s. Raises `ValueError` for shapes that do not belong together,
    a label that is no class, or a NaN.

    >>> import torch
    >>> from leanvit import evaluate
    >>> evaluate.confusion(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1])).tolist()
    [[1, 0], [1, 1]]
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"confusion: logits (N, classes) and labels (N,) belong together; got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    classes = logits.shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"confusion: labels lie in {int(labels.min())}..{int(labels.max())}, logits have {classes}")
    _no_nan(logits, "confusion")
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).reshape(classes, classes)


def mean_per_class(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the accuracy within a class, in [0, 1]; a class without an image is left out.

    `logits (N, classes)`, `labels (N,)`. Raises `ValueError` as `confusion`, and for no image.

    >>> import torch
    >>> from leanvit import evaluate
    >>> evaluate.mean_per_class(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
    0.75
    """
    counts = confusion(logits, labels).double()
    images = counts.sum(1)
    present = images > 0
    if not present.any():
        raise ValueError("mean_per_class: there is no image")
    return (counts.diagonal()[present] / images[present]).mean().item()


def _zeros_and_ones(labels: Tensor, what: str) -> Tensor:
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"{what}: labels must be 0 or 1; they lie in {labels.min().item():g}..{labels.max().item():g}")
    return labels.bool()


def _average_precision_11(scores: Tensor, positive: Tensor) -> float:
    """11-point interpolated average precision of one class; rows of equal score enter together."""
    order = scores.argsort(descending=True)
    scores, positive = scores[order], positive[order]
    last = torch.ones(len(scores), dtype=torch.bool)  # of a run of equal scores
    last[:-1] = scores[1:] != scores[:-1]
    found, taken = positive.cumsum(0)[last], torch.arange(1, len(scores) + 1)[last]
    precision = found.double() / taken
    # recall >= r / 10 in whole numbers
    return sum(precision[10 * found >= r * found[-1]].max().item() for r in range(11)) / 11


def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """11-point interpolated mAP of `scores (N, C)` and `labels (N, C)` in {0, 1}: PASCAL VOC 2007's, in [0, 1].

    Average precision is the mean over recall 0, 0.1, ..., 1 of the best precision at that recall or above; the mean is
    over the classes that have a positive. Only the order of the rows within a class counts, so logits and their
    sigmoids give the same number; softmax does not (`METRICS["map11_softmax"]`, what ELEVATER's code does).
    Raises `ValueError` for other shapes, labels that are not 0 or 1, no positive at all, or a NaN.

    >>> import torch
    >>> from leanvit import evaluate
    >>> scores, labels = torch.tensor([[0.9], [0.8], [0.7]]), torch.tensor([[1], [0], [1]])
    >>> round(evaluate.mean_average_precision(scores, labels), 4)  # 6 of 11 points at 1, 5 at 2/3
    0.8485
    """
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(
            f"mean_average_precision: scores and labels are (N, C) both; got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}"
        )
    _no_nan(scores, "mean_average_precision")
    positive = _zeros_and_ones(labels, "mean_average_precision")
    present = [c for c in range(scores.shape[1]) if positive[:, c].any()]
    if not present:
        raise ValueError("mean_average_precision: no class has a positive image")
    return sum(_average_precision_11(scores[:, c], positive[:, c]) for c in present) / len(present)


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of `scores (N,)` for `labels (N,)` in {0, 1}: how often a positive outranks a negative.

    Ties count half (the rank sum of Mann and Whitney; the metric of ELEVATER's Hateful Memes). Raises `ValueError` for
    other shapes or a NaN, and where the labels hold one class only: the area is then not defined.

    >>> import torch
    >>> from leanvit import evaluate
    >>> evaluate.roc_auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
    0.75
    """
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"roc_auc: scores and labels are (N,) both; got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    _no_nan(scores, "roc_auc")
    positive = _zeros_and_ones(labels, "roc_auc")
    ones = int(positive.sum())
    zeros = len(positive) - ones
    if not ones or not zeros:
        raise ValueError(f"roc_auc: both classes are needed; got {ones} images of class 1 and {zeros} of class 0")
    _, group, size = scores.unique(return_inverse=True, return_counts=True)
    rank = (size.cumsum(0).double() - (size - 1) / 2)[group]  # from 1; the mean of a run of ties
    return (rank[positive].sum().item() - ones * (ones + 1) / 2) / (ones * zeros)


def _roc_auc_of_two(logits: Tensor, labels: Tensor) -> float:
    """ROC AUC of softmax's class 1; the difference of the logits has the same order and does not saturate."""
    if logits.ndim != 2 or logits.shape[1] != 2:
        raise ValueError(f"roc_auc: two classes are needed; the logits are {tuple(logits.shape)}")
    wide = logits.double()
    return roc_auc(wide[:, 1] - wide[:, 0], labels)


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": top1,
    "mean_per_class": mean_per_class,
    "map11": mean_average_precision,
    "map11_softmax": lambda logits, labels: mean_average_precision(logits.softmax(1), labels),
    "roc_auc": _roc_auc_of_two,
}


def metric(name: str) -> Callable[[Tensor, Tensor], float]:
    """`METRICS[name]`, a function of logits `(N, classes)` and labels; `ValueError` for another name lists the known.

    >>> from leanvit import evaluate
    >>> evaluate.metric("mean_per_class") is evaluate.mean_per_class
    True
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}: known are {', '.join(METRICS)}")
    return METRICS[name]


def pe(score: float, parameters: float, m0: float = 1e8) -> float:
    """ELEVATER's parameter efficiency: `score * exp(-log10(parameters / m0 + 1))`.

    `score` in [0, 1], `parameters` trained, the head included. Below a million parameters it is the score, nearly.
    Raises `ValueError` for a score outside of 0..1, fewer than 0 parameters, or an m0 that is not above 0.

    >>> from leanvit import evaluate
    >>> round(evaluate.pe(0.8, 1e5), 4), round(evaluate.pe(0.8, 86e6), 4)
    (0.7997, 0.611)
    """
    if not 0 <= score <= 1:
        raise ValueError(f"pe: score={score} must lie in 0..1")
    if not parameters >= 0 or not m0 > 0:
        raise ValueError(f"pe: parameters={parameters} must be >= 0 and m0={m0} > 0")
    return score * math.exp(-math.log10(parameters / m0 + 1))
