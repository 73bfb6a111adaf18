"""Which side of a training waits: images a second of the loader, of the model, and of both together.

All three are measured by what `train.fit` uses: its loader (decoding, transforms, workers, pinned memory), and its
steps (forward, loss, backward, optimiser, precision), once on a batch that is there already and once on what the
loader brings.
"""

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from leanvit import evaluate, train

WARM_STEPS = 2  # not measured: memory is asked for, kernels are chosen


@dataclass(frozen=True)
class Row:
    """One number of workers; rates in images a second of wall clock. `pandas.DataFrame(rows)` is the table."""

    workers: int
    loader_images_per_s: float
    model_images_per_s: float
    together_images_per_s: float
    waits: str


class _Ready(Dataset):
    """One batch, again and again, without any work."""

    def __init__(self, batch: tuple[Tensor, Tensor], steps: int, classes: Sequence[str]):
        self.batch, self.steps, self.classes = batch, steps, classes

    def __len__(self) -> int:
        return self.steps * len(self.batch[1])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.batch


def measure(
    model: nn.Module, train_set: Dataset, recipe: train.Recipe, *, workers: Sequence[int] = (0, 2), steps: int = 20
) -> list[Row]:
    """A `Row` for each number of workers, over `steps` steps of `recipe.batch_size` images (3, H, W) after a warm-up.

    >>> from leanvit import data, models, throughput, train
    >>> model = models.create("embedded_vit")
    >>> images = data.load("digits", "train", transform=models.transforms(model, True))
    >>> rows = throughput.measure(model, images, train.Recipe(8, 1e-3, epochs=1), workers=[0], steps=2)
    >>> rows[0].loader_images_per_s > 0
    True

    The side that is slower alone is the one that the other waits for. With workers the pace of both together is close
    to that of the slower one, less what they take from each other where processors are few; without workers the two
    take turns. While the queue of the loader (two batches a worker) empties, a slow loader looks faster: the more
    steps, the truer. A copy of the model is trained, with a learning rate next to zero; the model itself and the
    generators of random numbers stay as they are. One process, on accelerate's device.

    Raises `ValueError` for less than one step or no number of workers, and what `train.fit` raises.
    """
    if steps < 1:
        raise ValueError(f"measure: steps={steps} must be at least 1")
    if not workers:
        raise ValueError("measure: workers names no number of processes, e.g. (0, 2)")
    recipes = [replace(recipe, epochs=None, steps=steps, lr=1e-12, workers=n) for n in workers]
    if len(train_set) == 0:
        raise ValueError(f"measure: {getattr(train_set, 'name', 'the training set')} is empty")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with train.randomness_restored(device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than processors: it is measured
        batch = _first_batch(train_set, recipe)
        classes = getattr(train_set, "classes", ())
        alone = _training(model, _Ready(batch, 2 * (steps + 10), classes), replace(recipes[0], workers=0), steps)
        rows = []
        for asked in recipes:
            loading = _loading(train_set, asked, len(batch[1]), steps, device)
            rows.append(_row(asked.workers, len(batch[1]), loading, alone, _training(model, train_set, asked, steps)))
    return rows


def _row(workers: int, batch: int, loader_s: float, model_s: float, together_s: float) -> Row:
    slow, quick = ("loader", "model") if loader_s > model_s else ("model", "loader")
    waits = f"the {quick} waits for the {slow}" if workers else f"they take turns, the {slow} is slower"
    return Row(workers, *(round(batch / seconds, 1) for seconds in (loader_s, model_s, together_s)), waits)


def _first_batch(train_set: Dataset, recipe: train.Recipe) -> tuple[Tensor, Tensor]:
    """A whole step's batch, as `train.fit` cuts it; in pinned memory where there is a CUDA device."""
    size = min(recipe.batch_size, len(train_set))
    if recipe.mixup or recipe.cutmix:
        size -= size % 2
    batch = evaluate.fetch(train_set, range(size))
    return tuple(part.pin_memory() for part in batch) if torch.cuda.is_available() else batch


def _warm(recipe: train.Recipe) -> int:
    return WARM_STEPS + 2 * recipe.workers  # the batches in advance


def _loading(train_set: Dataset, recipe: train.Recipe, batch: int, steps: int, device: torch.device) -> float:
    """Seconds a batch of the loader alone."""
    warm = _warm(recipe)
    ahead = 2 * recipe.workers  # so that no worker runs out of work while the clock runs
    for k, _ in enumerate(train.loader(train_set, recipe, batch, warm + steps + ahead, device), 1):
        if k == warm:
            began = time.perf_counter()
        if k == warm + steps:
            return (time.perf_counter() - began) / steps


def _training(model: nn.Module, train_set: Dataset, recipe: train.Recipe, steps: int) -> float:
    """Seconds a step of `train.fit` on a copy of the model: from one forward pass to the next."""
    model, warm, ticks = copy.deepcopy(model), _warm(recipe), []

    def tick(module: nn.Module, inputs: tuple) -> None:
        if len(ticks) in (warm, warm + steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        ticks.append(time.perf_counter())

    model.register_forward_pre_hook(tick)
    train.fit(model, train_set, replace(recipe, steps=warm + steps + 1), progress=False)
    return (ticks[warm + steps] - ticks[warm]) / steps
