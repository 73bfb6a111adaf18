"""The one training loop: AdamW or SGD, mixed precision, several processes, resume (Hugging Face accelerate).

What makes a resumed run end in the same numbers, bit for bit on one CPU: the order of the samples depends on
(seed, epoch), the augmentation of a sample on (seed, epoch, index), and everything random within a step (dropout,
drop path, mixup) on (seed, step, process). Nothing hangs on a generator that runs through the whole training.

The samples are one stream, epoch after epoch, cut into batches of equal size: every batch is full, every sample is
seen once an epoch, and a batch may straddle two epochs.
"""

import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from leanvit import checkpoint, evaluate, several, surgery
from leanvit.checkpoint import CheckpointError, TrainingDiverged
from leanvit.evaluate import as_it_is, fetch, modes_restored

PRECISIONS = ("no", "bf16", "fp16")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "warmup_cosine", "constant")
Metric = Callable[[Tensor, Tensor], float]

__all__ = ["CheckpointError", "History", "Recipe", "TrainingDiverged", "fit", "learning_rate", "mix_seed"]


@dataclass(frozen=True)
class Recipe:
    """How to train. Exactly one of `epochs` and `steps`; `batch_size` is the images of one step, over all processes.

    >>> from leanvit import train
    >>> recipe = train.Recipe(batch_size=64, lr=1e-3, epochs=10, schedule="warmup_cosine", warmup_steps=50)

    `schedule`, by step: "cosine" from `lr` to `min_lr_ratio * lr` over the whole training, or "constant", both
    multiplied during the first `warmup_steps` by a line from `warmup_ratio` to 1; "warmup_cosine" is a line from 0 to
    `lr` over `warmup_steps` and the cosine over what is left. `optimizer` is "adamw" or "sgd" (with `momentum`, no
    Nesterov). Weight decay acts on everything that is trained. `mixup` and `cutmix` are timm's alphas (one draw a
    batch; 0 = off), `clip_norm` a bound of the global gradient norm, `precision` one of no, bf16, fp16, and `workers`
    the processes that load images, two batches in advance each. `channels_last` lays images and convolutions out pixel
    by pixel while training, the layout that cuDNN's kernels for half precision take: for models of many convolutions on
    a GPU. It is off because a ViT has one, the patches; results are equal up to rounding.

    Raises `ValueError` for a value that is out of range or contradicts another.
    """

    batch_size: int
    lr: float
    epochs: float | None = None
    steps: int | None = None
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 1e-3
    min_lr_ratio: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    precision: str = "no"
    seed: int = 0
    workers: int = 0
    channels_last: bool = False

    def __post_init__(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"Recipe: exactly one of epochs and steps; got epochs={self.epochs}, steps={self.steps}")
        words = {"precision": PRECISIONS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Recipe: {name}={getattr(self, name)!r} is none of {', '.join(known)}")
        if not isinstance(self.channels_last, bool):
            raise ValueError(f"Recipe: channels_last={self.channels_last!r} must be True or False")
        positive = {"batch_size", "lr", "epochs", "steps", "clip_norm"}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None or f.name in words or f.name == "channels_last":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"Recipe: {f.name}={value!r} is not a finite number")
            if value < 0 or (value == 0 and f.name in positive):
                raise ValueError(f"Recipe: {f.name}={value} must be {'> 0' if f.name in positive else '>= 0'}")
        for name in ("batch_size", "steps", "warmup_steps", "seed", "workers"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), int):
                raise ValueError(f"Recipe: {name}={getattr(self, name)} is not a whole number")
        if self.label_smoothing >= 1:
            raise ValueError(f"Recipe: label_smoothing={self.label_smoothing} must be below 1")
        if self.momentum >= 1:
            raise ValueError(f"Recipe: momentum={self.momentum} must be below 1")
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError(f"Recipe: a constant schedule has no min_lr_ratio; got {self.min_lr_ratio}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"Recipe: mixup and cutmix mix pairs; batch_size={self.batch_size} must be even")


@dataclass
class History:
    """What happened: one entry an epoch (epoch, step, loss, lr; with a test set also accuracy, with several of them
    accuracies, by name), and the totals.

    `epoch` is the part of the data seen so far (2.0 = twice), `loss` the mean over the steps since the entry before,
    `seconds` the wall-clock time over all resumed parts, `images_per_s` of the training alone (no evaluation, no
    checkpoint), `resumed_from` the step of the checkpoint that this call began with.
    """

    epochs: list[dict] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    images_per_s: float = 0.0
    resumed_from: int | None = None


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`; see `Recipe` for the three schedules.

    >>> from leanvit import train
    >>> recipe = train.Recipe(batch_size=8, lr=1.0, steps=4)
    >>> [round(train.learning_rate(recipe, step, 4), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    warmup = recipe.warmup_steps
    if recipe.schedule == "warmup_cosine":
        if step < warmup:
            return recipe.lr * step / warmup
        return _half_cosine(recipe, step - warmup, max(1, steps - warmup))
    lr = recipe.lr if recipe.schedule == "constant" else _half_cosine(recipe, step, steps)
    if step < warmup:
        lr *= recipe.warmup_ratio + (1 - recipe.warmup_ratio) * step / warmup
    return lr


def _half_cosine(recipe: Recipe, step: int, steps: int) -> float:
    low = recipe.min_lr_ratio * recipe.lr
    return low + (recipe.lr - low) * (1 + math.cos(math.pi * step / steps)) / 2


# ---- randomness ----------------------------------------------------------------------------------------------------


def mix_seed(*parts: int | str) -> int:
    """A 32-bit seed from numbers and words: the same on every machine, different for every tuple.

    >>> from leanvit import train
    >>> train.mix_seed(0, "step", 1)
    39535587
    """
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def _seed(seed: int, device: torch.device | None = None) -> None:
    """Seed random, numpy and torch on the CPU (what image transforms draw from), and on `device`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # a hundred times faster than torch.manual_seed, which visits all devices
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device is not None and device.type != "cpu":
        torch.manual_seed(seed)


@contextmanager
def randomness_restored(device: torch.device) -> Iterator[None]:
    """Training seeds the global generators; afterwards they are as the caller left them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _draws(dataset: Dataset) -> bool:
    """Does fetching a sample draw random numbers? (A set that does not can be fetched batch by batch.)"""
    _seed(0)
    before = random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()
    fetch(dataset, [0])
    after = random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()
    same_numpy = before[1][1] == after[1][1] and np.array_equal(before[1][0], after[1][0])
    return not (before[0] == after[0] and same_numpy and torch.equal(before[2], after[2]))


class _Stream(Dataset):
    """The set, asked by (epoch, index) pairs, each sample under a seed of its own."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed, self.draws = dataset, seed, _draws(dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        if not self.draws:
            return fetch(self.dataset, [index for _, index in keys])
        samples = []
        for epoch, index in keys:
            _seed(mix_seed(self.seed, epoch, index))
            samples.append(fetch(self.dataset, [index]))
        images, labels = zip(*samples, strict=True)
        return torch.cat(images), torch.cat(labels)


class _Order(Sampler):
    """For each step from `start` on, the (epoch, index) pairs of this process."""

    def __init__(self, size: int, batch: int, start: int, steps: int, seed: int, rank: int = 0, world: int = 1):
        self.size, self.batch, self.start, self.steps, self.seed = size, batch, start, steps, seed
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, np.ndarray] = {}
        for step in range(self.start, self.steps):
            keys = []
            for position in range(step * self.batch + self.rank, (step + 1) * self.batch, self.world):
                epoch, k = divmod(position, self.size)
                if epoch not in orders:
                    generator = torch.Generator().manual_seed(mix_seed(self.seed, "order", epoch))
                    orders = {e: o for e, o in orders.items() if e == epoch - 1}  # a batch touches two at most
                    orders[epoch] = torch.randperm(self.size, generator=generator).numpy()  # no object for each image
                keys.append((epoch, int(orders[epoch][k])))
            yield keys


def loader(
    train_set: Dataset, recipe: Recipe, batch: int, steps: int, device: torch.device, *, start=0, rank=0, world=1
) -> DataLoader:
    """The batches of the steps from `start` on: this process's part of `batch` images, each under a seed of its own."""
    return DataLoader(
        _Stream(train_set, recipe.seed), collate_fn=as_it_is, num_workers=recipe.workers,
        batch_sampler=_Order(len(train_set), batch, start, steps, recipe.seed, rank, world),
        worker_init_fn=evaluate.worker_setup, pin_memory=device.type == "cuda",
    )  # fmt: skip


# ---- the loop ------------------------------------------------------------------------------------------------------


@contextmanager
def _interrupt_noted() -> Iterator[list[bool]]:
    """A list that is no longer empty after Ctrl-C, so that a step is always finished; the second one acts at once."""
    noted: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(signum, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _forget_workers(loaders: Iterable[DataLoader]) -> None:
    """End the processes that load images, also where the frames of an error still refer to the loader."""
    for batches in loaders:
        batches._iterator = None


@contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
    """Convolutions pixel by pixel; afterwards channel by channel, as files and our kernels want them."""
    model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.to(memory_format=torch.contiguous_format)


@contextmanager
def _accelerated(recipe: Recipe, model: nn.Module) -> Iterator[Accelerator]:
    """An Accelerator, and no trace of it in the model or in the process afterwards."""
    ours = not AcceleratorState._shared_state  # else the caller's own Accelerator lives on
    forward = model.__dict__.get("forward")
    try:
        # without cpu=True, accelerate would let each process of a machine without GPUs train for itself
        cpu = several.world() > 1 and not several.on_gpus()
        # a parameter may have no part in the loss (the released KAdaptation has such): one process leaves it alone, too
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        yield Accelerator(mixed_precision=recipe.precision, cpu=cpu, kwargs_handlers=[unused])
    finally:
        # accelerate wraps forward for mixed precision; left in place it would break copies of the model
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        if forward is not None:
            model.__dict__["forward"] = forward
        if ours:
            AcceleratorState._reset_state()


def _check_labels(model: nn.Module, labels: Sequence[int] | Tensor, whose: str) -> None:
    labels = torch.as_tensor(labels)
    classes, low, high = getattr(model, "num_classes", None), int(labels.min()), int(labels.max())
    if classes and not 0 <= low <= high < classes:
        raise ValueError(
            f"fit: {whose} lie in {low}..{high}; the model's head has {classes} classes (0..{classes - 1})"
        )


def _check_several(model: nn.Module, labels: Tensor, recipe: Recipe) -> None:
    """Labels of several classes an image, as binary cross-entropy takes them."""
    classes = getattr(model, "num_classes", None)
    if labels.ndim != 2 or (classes and labels.shape[1] != classes) or not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError(
            f"fit: labels are floating-point, {tuple(labels.shape)} in {labels.min():g}..{labels.max():g}; several "
            f"classes an image are (B, {classes or 'classes'}) in 0..1, one class is a whole number (B,)"
        )
    if recipe.label_smoothing:
        raise ValueError("fit: label_smoothing is for one class an image; these labels are floating-point, of several")


def _check(model: nn.Module, dataset: Dataset, world: int, recipe: Recipe) -> tuple[int, int]:
    """Refuse what cannot be trained, and return (images a step, steps)."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("fit: no parameter of the model requires a gradient, there is nothing to train")
    if len(dataset) == 0:
        raise ValueError(f"fit: {getattr(dataset, 'name', 'the training set')} is empty")
    part = world * (2 if recipe.mixup or recipe.cutmix else 1)  # equal parts, and pairs where images are mixed
    if recipe.batch_size % part:
        raise ValueError(f"fit: batch_size={recipe.batch_size} must be a multiple of {part} ({world} processes)")
    batch = min(recipe.batch_size, len(dataset)) // part * part
    if batch == 0:
        raise ValueError(f"fit: {len(dataset)} images are fewer than the {part} of the smallest step")
    labels = getattr(dataset, "labels", None)
    if labels is not None and len(labels) and not torch.as_tensor(labels).is_floating_point():
        _check_labels(model, labels, f"the labels of {getattr(dataset, 'name', 'the training set')}")
    steps = recipe.steps if recipe.steps is not None else max(1, round(recipe.epochs * len(dataset) / batch))
    return batch, steps


def _check_batch(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
    """Say in words what the first product, or the loss, would say in torch's."""
    if not images.is_floating_point():
        raise TypeError(f"fit: the images are {images.dtype}; floating-point ones are needed, see models.transforms")
    if recipe.channels_last and images.ndim != 4:
        raise ValueError(f"fit: channels_last is for images (B, C, H, W); these are {tuple(images.shape)}")
    if not labels.is_floating_point():
        _check_labels(model, labels, "labels")
    elif recipe.mixup or recipe.cutmix:
        raise ValueError("fit: mixup and cutmix are for one class an image; these labels are floating-point")


def _test_sets(test_set: Dataset | Mapping[str, Dataset] | None, metric: Metric | None) -> dict[str, Dataset]:
    """The test sets by name, a single one under ""; refused before the training where they cannot be evaluated."""
    sets = dict(test_set) if isinstance(test_set, Mapping) else {} if test_set is None else {"": test_set}
    for name, dataset in sets.items():
        if len(dataset) == 0:
            raise ValueError(f"fit: the test set {name or getattr(dataset, 'name', '')} is empty")
        if metric is None and getattr(dataset, "labels", None) is not None:
            _one_class(dataset.labels)
    return sets


def _one_class(labels: Sequence[int] | Tensor) -> None:
    if torch.as_tensor(labels).ndim != 1:
        raise ValueError("fit: accuracy is for one class an image; for several give metric=, see evaluate.METRICS")


def _mixer(model: nn.Module, dataset: Dataset, recipe: Recipe) -> Mixup | None:
    if not (recipe.mixup or recipe.cutmix):
        return None
    classes = getattr(model, "num_classes", None) or len(getattr(dataset, "classes", ()))
    if not classes:
        raise ValueError("fit: mixup and cutmix need the number of classes, from model.num_classes or dataset.classes")
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)


def _train_mode(model: nn.Module, norm_eval: bool) -> None:
    model.train()
    if norm_eval:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _settle(accelerator: Accelerator, pending: list[Tensor], save: bool, stop: bool) -> tuple[list[float], bool, bool]:
    """Empty `pending` into numbers, and let all processes agree: the first one says when to save, any one may stop."""
    flags = [save and accelerator.is_main_process, stop]
    values = torch.stack([*pending, *torch.tensor(flags, dtype=torch.float32, device=accelerator.device)])
    *losses, save, stop = accelerator.reduce(values, "mean").tolist()
    pending.clear()
    return losses, save > 0, stop > 0


def _score(
    accelerator: Accelerator, model: nn.Module, batches: DataLoader, metric: Metric | None, told: str
) -> float:
    """Each process predicts its part. Accuracy adds the counts up; a metric is given all logits, in the set's order.

    Raises `TrainingDiverged` beginning with `told` when a logit is NaN.
    """
    mine = batches.sampler
    logits, labels = evaluate.predict_batches(model, batches) if len(mine) else (None, None)
    counts = torch.zeros(3, device=accelerator.device)
    if len(mine):
        if metric is None:
            _one_class(labels)
        right = (logits.argmax(1) == labels).sum() if metric is None else 0
        counts += torch.tensor([right, len(mine), logits.isnan().any(1).sum()], device=counts.device)
    right, total, nan = accelerator.reduce(counts, "sum").tolist()
    if nan:
        raise checkpoint.diverged(f"{told}: the logits of {nan:.0f} of {total:.0f} test images are NaN", None)
    if metric is None:
        return right / total
    parts = [part for part in gather_object([(mine, logits, labels)]) if len(part[0])]
    order = torch.tensor([i for indices, _, _ in parts for i in indices]).argsort()
    return float(metric(*(torch.cat([part[k] for part in parts])[order] for k in (1, 2))))


def fit(
    model: nn.Module,
    train_set: Dataset,
    recipe: Recipe,
    *,
    test_set: Dataset | Mapping[str, Dataset] | None = None,
    metric: Metric | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every_s: float = 30.0,
    eval_every: int = 1,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    norm_eval: bool = False,
    progress: bool = True,
    keep: bool = False,
    processes: int = 1,
) -> History:
    """Train the parameters of `model` that require a gradient, in place, and return the `History`.

    >>> import timm, torch
    >>> from leanvit import train
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
    ...                           num_heads=2, num_classes=4)
    >>> images = [(torch.randn(3, 32, 32), i % 4) for i in range(8)]
    >>> history = train.fit(model, images, train.Recipe(batch_size=4, lr=1e-3, epochs=1), progress=False)
    >>> history.steps, [entry["epoch"] for entry in history.epochs]
    (2, [1.0])

    `train_set[i]` is (image `(C, H, W)`, label); a set with `__getitems__` is fetched by the batch.
    `loss(model, images, labels)` replaces cross-entropy (with mixup the labels are probabilities `(B, classes)`); it
    calls the model it is given. Where the set's labels are floating-point `(B, classes)` in 0..1 (several classes an
    image), the loss is binary cross-entropy with logits, meant over images and classes, and mixup and label smoothing
    are refused.
    The model moves to accelerate's device and stays there; its train and eval modes are restored. `norm_eval` keeps
    BatchNorm in eval mode. `test_set`, one set or several by name, is evaluated every `eval_every` epochs and at the
    end; `metric(logits (N, classes), labels) -> float` takes accuracy's place (under the same key of the history).

    With `checkpoint_dir` the state is saved every `checkpoint_every_s` seconds and at Ctrl-C, and a call with the same
    model, data and recipe goes on from it, to the same final numbers. At success the checkpoints are removed; with
    `keep` the last one stays, and the same call then returns at once with the trained weights.

    `processes` above 1 divide each batch, and every test set, between them (see `several`); the weights come back into
    `model`, the numbers are those of one process up to rounding. Data, model, `loss` and `metric` must be picklable;
    what `loss` changes besides stays in the processes, and where it calls the model with gradients more than once, each
    call must use the same parameters. Inside a group of torchrun it takes part, with 1, too.

    Raises `TrainingDiverged` (loss or weights not finite; names the step, the last good checkpoint stays),
    `CheckpointError` (cannot be written, or is another training's), `ValueError` (nothing to train, labels that the
    head does not have), `TypeError` (images that are not floating-point), `KeyboardInterrupt` after the checkpoint of a
    Ctrl-C.
    """
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    if eval_every < 1:
        raise ValueError(f"fit: eval_every={eval_every} must be at least 1 epoch")
    test_sets = _test_sets(test_set, metric)
    several.check(processes)
    if processes > 1:
        _check(model, train_set, processes, recipe)  # before anything is started
        return several.run(
            fit, model, train_set, recipe, processes=processes, test_set=test_set, metric=metric,
            checkpoint_dir=checkpoint_dir, checkpoint_every_s=checkpoint_every_s, eval_every=eval_every, loss=loss,
            norm_eval=norm_eval, progress=progress, keep=keep,
        )  # fmt: skip
    with ExitStack() as stack:
        accelerator = stack.enter_context(_accelerated(recipe, model))
        world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
        if recipe.precision != "no" and not accelerator.native_amp:  # accelerate falls back without a word
            raise ValueError(f"fit: precision {recipe.precision!r} is not to be had on {device}; use 'no' or 'bf16'")
        batch, steps = _check(model, train_set, world, recipe)
        if folder is not None:
            checkpoint.check_room(folder, model)
        stack.enter_context(randomness_restored(device))
        stack.enter_context(modes_restored(model))
        interrupted = stack.enter_context(_interrupt_noted())

        fingerprint = checkpoint.fingerprint(model, train_set, norm_eval=norm_eval, processes=world, **asdict(recipe))
        mixer = _mixer(model, train_set, recipe)
        model.to(device)
        if recipe.channels_last:
            stack.enter_context(_channels_last(model))
        trained = [p for p in model.parameters() if p.requires_grad]
        settings = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        settings["fused"] = surgery.without_gaps(trained)
        if recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(trained, momentum=recipe.momentum, **settings)
        else:
            optimizer = torch.optim.AdamW(trained, **settings)
        stack.enter_context(several.batch_norms_of_all(model))
        prepared, optimizer = accelerator.prepare(model, optimizer)

        history, sums, before = History(), [0.0, 0], 0.0  # sums: of the losses since the last entry, and their number
        resumed = checkpoint.resume(accelerator, folder, fingerprint) if folder is not None else None
        if resumed is not None:
            history.epochs, sums, before = resumed["epochs"], resumed["sums"], resumed["seconds"]
            history.resumed_from = resumed["step"]
        start = history.resumed_from or 0

        def save(step: int) -> None:
            seconds = before + time.perf_counter() - began
            told = {"step": step, "seconds": seconds, "sums": sums, "epochs": history.epochs}
            checkpoint.save(accelerator, folder, told | {"fingerprint": fingerprint}, model)

        how = {"batch_size": evaluate.batch_for(device), "workers": recipe.workers, "pin_memory": device.type == "cuda"}
        tests = {k: evaluate.loader(v, indices=range(rank, len(v), world), **how) for k, v in test_sets.items()}
        stack.callback(_forget_workers, tests.values())
        layout = torch.channels_last if recipe.channels_last else torch.preserve_format
        check_every = 1 if device.type == "cpu" else 10  # reading the loss stops an accelerator's queue
        pending: list[Tensor] = []
        smoothing = 0.0 if mixer is not None else recipe.label_smoothing  # timm's mixed targets hold it already
        _train_mode(prepared, norm_eval)
        began = saved = time.perf_counter()
        aside = 0.0  # seconds of evaluation and checkpoints
        shown = {} if progress and accelerator.is_main_process else {"disable": True}
        with tqdm(total=steps, initial=start, unit="step", mininterval=0.5, leave=False, **shown) as bar:
            batches = loader(train_set, recipe, batch, steps, device, start=start, rank=rank, world=world)
            for step, (images, labels) in enumerate(batches, start + 1):  # steps count from 1
                if step == start + 1:
                    _check_batch(model, images, labels, recipe)
                    many = loss is None and labels.is_floating_point()
                    if many:
                        _check_several(model, labels, recipe)
                images = images.to(device, non_blocking=True, memory_format=layout)
                labels = labels.to(device, non_blocking=True)
                _seed(mix_seed(recipe.seed, "step", step, rank), device)
                if mixer is not None:
                    images, labels = mixer(images.clone(), labels)
                lr = learning_rate(recipe, step - 1, steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with accelerator.autocast():
                    if loss is not None:
                        value = loss(prepared, images, labels)
                    elif many:
                        value = F.binary_cross_entropy_with_logits(prepared(images).float(), labels.float())
                    else:
                        value = F.cross_entropy(prepared(images).float(), labels, label_smoothing=smoothing)
                pending.append(value.detach().float())

                epoch_ends = step * batch // len(train_set) > (step - 1) * batch // len(train_set) or step == steps
                save_now = stop_now = False
                if len(pending) >= check_every or epoch_ends:
                    due = folder is not None and time.perf_counter() - saved >= checkpoint_every_s
                    losses, save_now, stop_now = _settle(accelerator, pending, due, bool(interrupted))
                    for k, number in enumerate(losses, step + 1 - len(losses)):
                        if not math.isfinite(number):
                            raise checkpoint.diverged(f"step {k} of {steps}: the loss is {number}, lr={lr:.3g}", folder)
                        sums = [sums[0] + number, sums[1] + 1]
                    bar.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{lr:.1e}", refresh=False)

                accelerator.backward(value)
                if recipe.clip_norm is not None:
                    accelerator.clip_grad_norm_(trained, recipe.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                bar.update()

                pause = time.perf_counter()
                if epoch_ends:
                    epoch = step * batch / len(train_set)
                    entry = {"epoch": epoch, "step": step, "loss": sums[0] / sums[1], "lr": lr}
                    sums = [0.0, 0]
                    if test_sets and (int(epoch) % eval_every == 0 or step == steps):
                        ask = (metric, f"after step {step} of {steps}")
                        scores = {k: _score(accelerator, model, v, *ask) for k, v in tests.items()}
                        entry |= {"accuracy": scores[""]} if "" in scores else {"accuracies": scores}
                    history.epochs.append(entry)
                if folder is not None and (save_now or stop_now or (keep and step == steps)):
                    save(step)
                    saved = time.perf_counter()
                if stop_now:
                    raise KeyboardInterrupt(f"stopped after step {step} of {steps}")
                aside += time.perf_counter() - pause

        history.steps, elapsed = steps, time.perf_counter() - began
        history.seconds = before + elapsed
        history.images_per_s = (steps - start) * batch / max(elapsed - aside, 1e-9)
        if folder is not None and not keep:
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                checkpoint.clear(folder)
        return history
