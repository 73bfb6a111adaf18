"""How much of the old task a model's features still know: weighted k-NN, feature drift, linear CKA.

The measure of block expansion's paper (arXiv 2404.17245) is DINO's weighted k-nearest-neighbour accuracy on the old
data set, before and after the adaptation. Its feature is the class token behind the final norm, for every method, and
never the output of the head. (The released script reads LoRA models at their task logits, because replacing the
`classifier` of a PEFT wrapper replaces nothing; `evaluate.predict` gives those logits to whoever wants to see that.)

Two readings belong side by side: the feature as adapted, which one network would serve to both tasks, and the feature
with the adapter switched off, where that is possible; it is then the old one exactly.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from leanvit.evaluate import predict
from leanvit.surgery import is_whole

NEIGHBOURS = (10, 20, 100, 200)


class _Features(nn.Module):
    """A timm model, or a PEFT wrapper around one, that stops in front of its head."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.timm = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not hasattr(self.timm, "forward_features") or not hasattr(self.timm, "forward_head"):
            raise TypeError(f"features: {type(self.timm).__name__} is no timm model (forward_features, forward_head)")

    def forward(self, images: Tensor) -> Tensor:
        out = self.timm.forward_head(self.timm.forward_features(images), pre_logits=True)
        if out.ndim != 2:
            raise ValueError(
                f"features: {type(self.timm).__name__} gives {tuple(out.shape)} in front of its head, not one vector "
                "an image; reset_classifier(num_classes, global_pool='token') makes it pool"
            )
        return out


def features(model: nn.Module, dataset: Dataset, batch_size: int | None = None, *, workers: int = 0) -> Tensor:
    """Features `(N, D)` in the set's order, float32 on the CPU: the class token behind the final norm.

    Models that pool otherwise (mean of the tokens, attention) give what they pool. The head plays no part, whatever
    method adapted the model. Train and eval modes stay as they were.

    Raises `ValueError` for an empty set, a model that does not pool, and features that are not finite.
    """
    return _read(model, dataset, batch_size, workers)[0]


def _read(model: nn.Module, dataset: Dataset, batch_size: int | None, workers: int = 0) -> tuple[Tensor, Tensor]:
    out, labels = predict(_Features(model), dataset, batch_size, workers=workers)
    _check_finite("features", out)
    return out, labels


def _check_finite(what: str, *batches: Tensor) -> None:
    for batch in batches:
        if not batch.is_floating_point() or batch.ndim != 2 or batch.shape[1] == 0:
            raise ValueError(
                f"{what}: features are (N, D) floating-point, D > 0; got {tuple(batch.shape)} {batch.dtype}"
            )
        # a sum is finite where all terms are (float64: it does not overflow), and needs no copy of the batch
        if not torch.isfinite(batch.sum(dtype=torch.float64)):
            bad = (~torch.isfinite(batch).all(1)).nonzero()[:, 0]
            if len(bad):
                raise ValueError(f"{what}: {len(bad)} of {len(batch)} features are not finite, first row {int(bad[0])}")


def _check_knn(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: Collection[int], temperature: float) -> None:
    _check_finite("knn", bank, queries)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"knn: bank features have {bank.shape[1]} dimensions, queries {queries.shape[1]}")
    if bank_labels.shape != bank.shape[:1] or bank_labels.is_floating_point():
        raise ValueError(
            f"knn: {len(bank)} bank features need as many integer labels; got {tuple(bank_labels.shape)} "
            f"{bank_labels.dtype}"
        )
    if len(bank_labels) and int(bank_labels.min()) < 0:
        raise ValueError(f"knn: label {int(bank_labels.min())} is negative")
    several = isinstance(k, Collection) and len(k) > 0
    if not several or not all(map(is_whole, k)):
        raise ValueError(
            f"knn: k={tuple(k) if isinstance(k, Collection) else k} must be whole numbers of at least 1, e.g. [10, 20]"
        )
    if not temperature > 0:
        raise ValueError(f"knn: temperature={temperature} must be above 0")


def _unit(features: Tensor) -> Tensor:
    """Rows of norm 1 (or 0), float32; the norm in float64, as squares of 1e20 or 1e-23 leave float32."""
    rows = features.float()
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    return rows / norm.clamp_min(torch.finfo(torch.float32).tiny).float()


def neighbours(
    bank: Tensor, queries: Tensor, k: int, *, query_chunk: int = 256, bank_chunk: int = 65536
) -> tuple[Tensor, Tensor]:
    """The `k` most similar of `bank (M, D)` for each of `queries (N, D)`: cosines `(N, k)`, descending, and indices.

    Works by tiles of `query_chunk` x `bank_chunk` similarities: beside inputs and results it never holds more than
    such a tile and normalised copies of one chunk of each. Raises `ValueError` for k above the bank's size.
    """
    if k > len(bank):
        raise ValueError(f"knn: k={k} neighbours are more than the {len(bank)} features of the bank")
    for name, chunk in {"query_chunk": query_chunk, "bank_chunk": bank_chunk}.items():
        if chunk < 1:
            raise ValueError(f"knn: {name}={chunk} must be at least 1")
    cosines = torch.full((len(queries), k), -torch.inf, dtype=torch.float32, device=queries.device)
    indices = torch.zeros((len(queries), k), dtype=torch.long, device=queries.device)
    for first in range(0, len(bank), bank_chunk):
        keys = _unit(bank[first : first + bank_chunk].to(queries.device)).T
        for start in range(0, len(queries), query_chunk):
            rows = slice(start, start + query_chunk)
            similarity = _unit(queries[rows]) @ keys
            best, where = similarity.topk(min(k, similarity.shape[1]), dim=1, sorted=False)
            best, where = torch.cat([cosines[rows], best], 1), torch.cat([indices[rows], where + first], 1)
            cosines[rows], order = best.topk(k, dim=1)
            indices[rows] = where.gather(1, order)
    return cosines, indices


def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: Collection[int] = NEIGHBOURS,
    temperature: float = 0.07,
    *,
    query_chunk: int = 256,
    bank_chunk: int = 65536,
) -> dict[int, Tensor]:
    """Class of each query by weighted vote of its k nearest bank features: `{k: (N,) labels}`.

    With cosine similarity, class c of query u scores the sum of exp(cos(u, z_i) / T) over the k nearest z_i of label c
    (DINO; specification 3.1). Runs on the queries' device; a bank of 1.28 million features may stay on the CPU.

    Args:
        bank: `(M, D)`; bank_labels: `(M,)` integers; queries: `(N, D)`. Any scale, any floating dtype.
        query_chunk, bank_chunk: sides of the tile of similarities held at once; the result does not depend on them.

    Raises `ValueError` for k above the bank's size, features that are not finite, shapes that do not fit.
    """
    _check_knn(bank, bank_labels, queries, k, temperature)
    cosines, indices = neighbours(bank, queries, max(k), query_chunk=query_chunk, bank_chunk=bank_chunk)
    classes, labels = bank_labels.to(queries.device).long().unique(return_inverse=True)  # numbers may have gaps
    predictions: dict[int, list[Tensor]] = {int(n): [] for n in k}
    for rows in zip(cosines.split(query_chunk), indices.split(query_chunk), strict=True):
        # relative to the nearest one, which changes no argmax and cannot overflow at small T
        weights, votes = ((rows[0] - rows[0][:, :1]).double() / temperature).exp(), labels[rows[1]]
        for n in predictions:
            scores = torch.zeros(len(votes), len(classes), dtype=torch.float64, device=queries.device)
            predictions[n].append(classes[scores.scatter_add_(1, votes[:, :n], weights[:, :n]).argmax(1)])
    return {n: torch.cat(parts) for n, parts in predictions.items()}


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: Collection[int] = NEIGHBOURS, **settings
) -> dict[int, float]:
    """`{k: part of the queries whose weighted vote is their label}`, in [0, 1]; `settings` as in `knn`.

    `bank (M, D)`, `bank_labels (M,)`, `queries (N, D)`, `labels (N,)`. Raises `ValueError` as `knn`, for no query, and
    for another number of labels.

    >>> import torch
    >>> from leanvit import forgetting
    >>> bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 1, 1])
    >>> forgetting.knn_accuracy(bank, labels, torch.tensor([[0.9, 0.1], [0.9, 0.2]]), torch.tensor([0, 1]), k=[1])
    {1: 0.5}
    """
    if labels.shape != queries.shape[:1]:
        raise ValueError(
            f"knn_accuracy: {len(queries)} queries need as many labels, one class each; got {tuple(labels.shape)}"
        )
    if not len(labels):
        raise ValueError("knn_accuracy: there is no query")
    predicted = knn(bank, bank_labels, queries, k, **settings)
    return {n: (p.cpu() == labels.cpu()).double().mean().item() for n, p in predicted.items()}


def _check_pair(what: str, before: Tensor, after: Tensor) -> None:
    _check_finite(what, before, after)
    if len(before) != len(after) or not len(before):
        raise ValueError(
            f"{what}: {len(before)} features before and {len(after)} after; they must be of the same images"
        )


def drift(before: Tensor, after: Tensor) -> float:
    """1 - mean cosine of the features `(N, D)` of the same images before and after: 0 = unchanged, at most 2.

    Raises `ValueError` for features of different shapes, or that are not finite.
    """
    _check_pair("drift", before, after)
    if before.shape != after.shape:
        raise ValueError(f"drift: {before.shape[1]} dimensions before and {after.shape[1]} after; cka compares those")
    if torch.equal(before, after):
        return 0.0  # exactly, not up to rounding
    return 1 - F.cosine_similarity(before.double(), after.double(), dim=1).mean().item()


def cka(before: Tensor, after: Tensor) -> float:
    """Linear centred kernel alignment of features `before (N, D)`, `after (N, D')` of the same images: 1 = same up to
    rotation and scale, 0 = unrelated (Kornblith et al., arXiv 1905.00414, eq. 5).

    Raises `ValueError` where one side is the same for all images.
    """
    _check_pair("cka", before, after)
    if any((f == f[:1]).all() for f in (before, after)):
        raise ValueError("cka: the features of all images are the same on one side; there is nothing to align")
    x, y = (f.double() - f.double().mean(0) for f in (before, after))
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def measure(
    model: nn.Module,
    bank: Dataset,
    queries: Dataset,
    *,
    before: Tensor | None = None,
    off: Callable[[nn.Module], AbstractContextManager] | None = None,
    k: Collection[int] = NEIGHBOURS,
    batch_size: int | None = None,
    **settings,
) -> dict[str, dict]:
    """Both readings of the old task: `{"adapted": …, "off": …}`, each with `knn` {k: accuracy}, `drift` and `cka`.

    Args:
        bank, queries: labelled images of the old task.
        before: features `(N, D)` of `queries` by the model before its adaptation; without it no drift and no CKA.
        off: a context manager that switches the adapter off, e.g. `block_expansion.bypass`; without it no "off".
        settings: of `knn`.

    >>> from leanvit import block_expansion, data, forgetting, models
    >>> model = models.create("embedded_vit", depth=1)
    >>> report = block_expansion.attach(model, p=1)
    >>> looks = models.transforms(model, train=False)
    >>> bank, queries = (data.load("fashion_mnist_10k", s, transform=looks, limit=20) for s in ("train", "test"))
    >>> before = forgetting.features(model, queries)
    >>> found = forgetting.measure(model, bank, queries, before=before, off=block_expansion.bypass, k=[5])
    >>> found["adapted"]["drift"], found["off"] == found["adapted"]  # nothing was trained yet
    (0.0, True)
    """

    def read() -> dict:
        known, (asked, labels) = _read(model, bank, batch_size), _read(model, queries, batch_size)
        moved = {} if before is None else {"drift": drift(before, asked), "cka": cka(before, asked)}
        return {"knn": knn_accuracy(*known, asked, labels, k, **settings), **moved}

    readings = {"adapted": read()}
    if off is not None:
        with off(model):
            readings["off"] = read()
    return readings
