"""ELEVATER's few-shot protocol (arXiv 2204.08790): sampling, the split for the sweep, the search, the final training.

    sample -> split 1 : 4 -> search learning rate x weight decay on the split -> train on all shots -> select an epoch

The test set is read in the final training alone. Known divergences from the released loops: every method is trained in
train mode throughout; a run of the search that diverges counts as failed instead of scoring 0, any other error ends the
search, and a search in which every run failed is an error instead of a weight decay of 1e6; the right candidate is
trained with its own weight decay; batches are all full, so none of size 1 is left to skip. They report the best epoch
*on the test set*; the default here is the last epoch (`RULES`).
"""

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from leanvit import train
from leanvit.evaluate import metric as metric_of
from leanvit.images import DataError, ImageSet, classes_of, subset
from leanvit.images import few_shot as sample
from leanvit.train import History, Recipe, TrainingDiverged

__all__ = ["RATES", "RULES", "Best", "Outcome", "SearchFailed", "adapt", "cheap_search", "recipe", "sample", "search",
           "select", "split", "weight_decay"]  # fmt: skip

RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RULES = {
    "last": "the last epoch",
    "val-best": "the best epoch on held-out training images",
    "test-best": "the best epoch on the test set: optimistic, since the test labels chose it",
}
Score = Callable[[float, float], float]


class SearchFailed(RuntimeError):
    """Every run of a search failed."""


@dataclass(frozen=True)
class Best:
    """What a search found, with the score on the held-out images and the number of runs that it looked at."""

    lr: float
    weight_decay: float
    score: float
    runs: int


@dataclass(frozen=True)
class Outcome:
    """`score` on the test set at the epoch that `rule` selects (its `entry` in `history`), and how it came about."""

    score: float
    rule: str
    entry: dict
    history: History
    best: Best
    model: nn.Module


def split(dataset: ImageSet) -> tuple[ImageSet, ImageSet]:
    """(train, held out): of each class with n images the first ceil(n / 5), in the set's order, are held out.

    Several classes an image: an image is held out while one of its classes still lacks held-out images. Raises
    `DataError` for a class with one image, which would have none to train on.

    >>> from leanvit import data, few_shot
    >>> train, held_out = few_shot.split(data.load("digits", "train", limit=50))
    >>> len(train), len(held_out)
    (40, 10)
    """
    owned = classes_of(dataset)
    counts = [0] * len(dataset.classes)
    for labels in owned:
        for c in labels:
            counts[c] += 1
    single = [name for name, n in zip(dataset.classes, counts, strict=True) if n == 1]
    if single:
        raise DataError(f"split of {dataset.name}: {single[0]} has only one image; at least two are needed")
    wanted = [-(-n // 5) for n in counts]
    kept, held = [], []
    for i, labels in enumerate(owned):
        if any(wanted[c] > 0 for c in labels):
            held.append(i)
            for c in labels:
                wanted[c] -= 1
        else:
            kept.append(i)
    return subset(dataset, kept), subset(dataset, held)


# ---- the search ----------------------------------------------------------------------------------------------------


def weight_decay(k: int) -> float:
    """Candidate `k` of 0..96: 10^(-6 + k / 8), from 1e-6 over 1 (k = 48) to 1e6."""
    return 10 ** (k / 8 - 6)


class _Runs:
    """The score of a run, asked for once; -inf for one that diverged."""

    def __init__(self, score: Score, cache: MutableMapping | None, on_run: Callable[[MutableMapping], None] | None):
        self.score, self.cache, self.on_run = score, {} if cache is None else cache, on_run
        self.asked: set[str] = set()

    def __call__(self, lr: float, decay: float) -> float:
        key = f"lr={lr:.6g} weight_decay={decay:.6g}"
        self.asked.add(key)
        if key not in self.cache:
            try:
                value = float(self.score(lr, decay))
            except TrainingDiverged:
                value = math.nan
            self.cache[key] = value if math.isfinite(value) else None  # None: failed, and JSON knows it
            if self.on_run is not None:
                self.on_run(self.cache)
        value = self.cache[key]
        if value is None:
            return -math.inf
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"search: the cache holds {value!r} for {key}; a score is a finite number, and None a run that failed: "
                "remove the entry"
            )
        return value

    def best(self, candidates: list[tuple[float, float]]) -> Best:
        """The best of the candidates (lr, weight decay), the earlier one of equals."""
        if not candidates:
            raise ValueError("search: there is no learning rate or no weight decay to try")
        lr, decay = max(candidates, key=lambda c: self(*c))
        if self(lr, decay) == -math.inf:
            raise SearchFailed(f"search: all {len(self.asked)} runs failed (diverged, or scored NaN)")
        return Best(lr, decay, self(lr, decay), len(self.asked))


def search(
    score: Score,
    rates: tuple[float, ...] = RATES,
    *,
    cache: MutableMapping | None = None,
    on_run: Callable[[MutableMapping], None] | None = None,
) -> Best:
    """ELEVATER's search: for each learning rate at most 15 runs, coarse to fine over `weight_decay(0..96)`.

    `score(lr, weight_decay)` trains and returns the score on the held-out images. Coarse: k = 0, 16, ..., 96. Then for
    each span of 8, 4, 2, 1 both neighbours of the peak at that distance (not beyond the ends); the peak moves to a
    better one. Equals keep the earlier candidate. A run that raises `TrainingDiverged`, or scores NaN, has failed.

    `cache` (a dict of scores, that JSON can store; for this data set, seed and method alone) is filled run by run and
    read before one: a search that was interrupted goes on with it. `on_run(cache)` is called after each new run, to
    store it. Raises `SearchFailed` when every run failed, `ValueError` where there is none, or the cache holds
    something else than scores.

    >>> import math
    >>> from leanvit import few_shot
    >>> def score(lr, weight_decay):  # in place of a training: best at 0.01 and 1e-3
    ...     return 1 - abs(math.log10(lr) + 2) - abs(math.log10(weight_decay) + 3)
    >>> few_shot.search(score)
    Best(lr=0.01, weight_decay=0.001, score=1.0, runs=90)
    """
    runs, peaks = _Runs(score, cache, on_run), []
    for lr in rates:

        def at(k: int, lr: float = lr) -> float:
            return runs(lr, weight_decay(k))

        peak = max(range(0, 97, 16), key=at)
        if at(peak) > -math.inf:
            for span in (8, 4, 2, 1):
                peak = max((peak, max(peak - span, 0), min(peak + span, 96)), key=at)
        peaks.append((lr, weight_decay(peak)))
    return runs.best(peaks)


def cheap_search(
    score: Score,
    rates: tuple[float, ...] = RATES,
    decays: tuple[float, ...] = (1e-4, 1e-6, 1e-2),
    *,
    cache: MutableMapping | None = None,
    on_run: Callable[[MutableMapping], None] | None = None,
) -> Best:
    """The default: every learning rate at the first weight decay, then the other decays at the best rate.

    8 runs in place of up to 90: a rate is judged at one decay alone. The rest is as in `search`.

    >>> import math
    >>> from leanvit import few_shot
    >>> few_shot.cheap_search(lambda lr, weight_decay: -abs(math.log10(lr) + 2) - weight_decay)
    Best(lr=0.01, weight_decay=1e-06, score=-1e-06, runs=8)
    """
    runs = _Runs(score, cache, on_run)
    first = runs.best([(lr, decay) for lr in rates for decay in decays[:1]])
    return runs.best([(first.lr, decay) for decay in decays])


# ---- the training --------------------------------------------------------------------------------------------------


def recipe(lr: float, weight_decay: float, epochs: float, **settings) -> Recipe:
    """ELEVATER's: SGD with momentum 0.9, constant learning rate, batches of 64, seed 0 whatever the subset's seed."""
    given = {"batch_size": 64, "optimizer": "sgd", "momentum": 0.9, "schedule": "constant", "seed": 0} | settings
    return Recipe(lr=lr, weight_decay=weight_decay, epochs=epochs, **given)


def select(history: History, rule: str = "last") -> dict:
    """The entry of `history` that `rule` (one of `RULES`) selects; of equals the earlier one.

    "val-best" needs a training with `test_set={"val": …, …}`, "test-best" one with `{"test": …, …}` or a single test
    set. Raises `ValueError` for another rule, or where nothing was evaluated.
    """
    if rule not in RULES:
        raise ValueError(f"select: unknown rule {rule!r}: known are {', '.join(RULES)}")
    entries = [e for e in history.epochs if "accuracy" in e or "accuracies" in e]
    if not entries:
        raise ValueError("select: no epoch was evaluated; train with a test_set")
    if rule == "last":
        return entries[-1]
    name = rule.removesuffix("-best")
    scores = [_test_score(e) if name == "test" else e.get("accuracies", {}).get(name) for e in entries]
    if None in scores:
        raise ValueError(f'select: rule {rule!r} needs the scores of a set named "{name}"; train with test_set={{…}}')
    return max(zip(scores, entries, strict=True), key=lambda pair: pair[0])[1]


def _test_score(entry: dict) -> float | None:
    return entry.get("accuracy", entry.get("accuracies", {}).get("test"))


def adapt(
    build: Callable[[], nn.Module],
    pool: ImageSet,
    test_set: ImageSet,
    *,
    shots: int = 5,
    seed: int = 0,
    find: Callable[..., Best] = cheap_search,
    metric: str = "accuracy",
    rule: str = "last",
    sweep_epochs: float = 10,
    epochs: float = 50,
    cache: MutableMapping | None = None,
    on_run: Callable[[MutableMapping], None] | None = None,
    eval_every: int | None = None,
    checkpoint_dir: str | Path | None = None,
    processes: int = 1,
    **settings,
) -> Outcome:
    """One cell of the table: sample `shots` of `pool` with `seed`, search, train, and score on `test_set`.

    `build()` makes the model with the method attached, the same one each time. `metric` is a name of
    `evaluate.METRICS`; `settings` go to `recipe`. A run of the search scores its best epoch on the held-out fifth. The
    final training is on all shots, under the rule "val-best" on those that are not held out. Only it reads `test_set`,
    every `eval_every` epochs (None: every epoch, for the rule "last" the last alone) and at the end. `processes` as in
    `train.fit`.
    Raises what `sample`, `split`, `find` and `train.fit` raise, and `ValueError` for an unknown rule or metric.
    """
    measure = metric_of(metric)
    if rule not in RULES:
        raise ValueError(f"adapt: unknown rule {rule!r}: known are {', '.join(RULES)}")
    chosen = sample(pool, shots, seed)
    kept, held = split(chosen)
    val, how = {"val": held}, {"metric": measure, "progress": False, "processes": processes}

    def score(lr: float, decay: float) -> float:
        sweep = recipe(lr, decay, sweep_epochs, **settings)
        history = train.fit(build(), kept, sweep, test_set=val, **how)
        return select(history, "val-best")["accuracies"]["val"]

    best = find(score, cache=cache, on_run=on_run)
    sets = {"test": test_set} | (val if rule == "val-best" else {})
    if eval_every is None:
        eval_every = max(1, math.ceil(epochs)) if rule == "last" else 1
    model, final = build(), recipe(best.lr, best.weight_decay, epochs, **settings)
    history = train.fit(
        model, kept if rule == "val-best" else chosen, final, test_set=sets, eval_every=eval_every,
        checkpoint_dir=checkpoint_dir, **how,
    )  # fmt: skip
    entry = select(history, rule)
    return Outcome(_test_score(entry), rule, entry, history, best, model)
