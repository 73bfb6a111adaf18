"""What a model says about a data set: predictions, accuracy, mean per class, the confusion matrix."""

from collections.abc import Iterator, Sequence
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


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def predict(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 256,
    *,
    workers: int = 0,
    indices: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits `(N, classes)` and labels `(N,)` in the set's order, both on the CPU; the model's modes stay as they were.

    `indices` asks for a part of the set. The model runs in eval mode, without gradients, on the device where it is.
    Raises `ValueError` when there is nothing to predict.
    """
    indices = range(len(dataset)) if indices is None else indices
    if len(indices) == 0:
        raise ValueError(f"predict: {getattr(dataset, 'name', 'the data set')} has no image to predict")
    device = device_of(model)
    loader = DataLoader(
        _Fetched(dataset), batch_size=batch_size, sampler=indices, collate_fn=as_it_is, num_workers=workers
    )
    logits, labels = [], []
    with modes_restored(model), torch.no_grad():
        model.eval()
        for images, target in loader:
            if not images.is_floating_point():
                raise TypeError(f"predict: the images are {images.dtype}; floating-point ones are needed")
            logits.append(model(images.to(device)).float().cpu())
            labels.append(target)
    return torch.cat(logits), torch.cat(labels)


def accuracy(model: nn.Module, dataset: Dataset, batch_size: int = 256, *, workers: int = 0) -> float:
    """Part of the images whose largest logit is the label's, in [0, 1]."""
    logits, labels = predict(model, dataset, batch_size, workers=workers)
    return (logits.argmax(1) == labels).double().mean().item()


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts `(classes, classes)`: row = the true class, column = the predicted one. Source: `predict`'s pair."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"confusion: logits (N, classes) and labels (N,) belong together; got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    classes = logits.shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"confusion: labels lie in {int(labels.min())}..{int(labels.max())}, logits have {classes}")
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).reshape(classes, classes)


def mean_per_class(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the accuracy within a class, in [0, 1]; a class without an image is left out."""
    counts = confusion(logits, labels).double()
    images = counts.sum(1)
    present = images > 0
    return (counts.diagonal()[present] / images[present]).mean().item()
