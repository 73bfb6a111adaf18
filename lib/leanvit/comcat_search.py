"""ComCAT's differentiable search for ranks (arXiv 2305.17235, Eq. 4 to 6), fixed or adaptive in time.

Each part has logits alpha over its candidate ranks and draws soft weights p of them, one Gumbel-softmax sample for a
batch. The authors run the mixture of all truncated dense products, `sum_a p_a W^(a)` (reference: `comcat_mixture`). The
candidates are nested, so that mixture is one factored pass with masked coordinates (`comcat_supernet`).

Only alpha learns: the loss is `CE (P / eps)^1.5` where the expected size P is above the budget eps. The choice is the
likeliest candidate of every part.

Corrected mode: sizes as realised and expected (no sampling noise), candidates that save nothing replaced by "dense",
network in eval mode, the choice projected exactly onto the budget in steps of one rank, and what a truncation drops is
kept aside, so that a rank can grow back. Faithful mode: nominal sizes of the sampled p, train mode, the authors'
candidates, one way only, each choice factored anew with all of Sigma on the right, no projection.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace as changed

import torch
from torch import Tensor, nn

from leanvit import several, surgery
from leanvit.comcat_calibrate import Statistics
from leanvit.comcat_factors import Spectrum
from leanvit.comcat_plan import Part, Plan
from leanvit.comcat_ranks import (
    between,
    candidates,
    check_budget,
    check_weights,
    curve,
    nominal_candidates,
    own_candidates,
    project,
    total_weights,
)
from leanvit.comcat_recut import Ranks, Recut, current_ranks, settled
from leanvit.comcat_schedule import Schedule, penalised, temperature
from leanvit.comcat_supernet import Supernet, coverage, swapped
from leanvit.distill import cross_entropy, need_classes
from leanvit.evaluate import device_of, modes_restored

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class RankSearch:
    """Logits, temperature, schedule and choice of a search, with what it needs to go on later.

    Args:
        model: the dense model (faithful mode factors it at once, at the largest candidates, without its biases), or
            one that such a search has cut already.
        budget: weights of all parts together, see `comcat_ranks.authors_budget`.
        epochs: how many the whole run has; the temperature falls from 5 to 0.1 over them.
        schedule: see `Schedule`; by default the adaptive one of the mode.
        ranks: candidates by part, in place of those of the mode. The projection keeps to the ranks from the smallest to
            the largest of them; with None (dense) beside others it may take every rank that pays.
        statistics: of `calibrate`, for data-aware directions (corrected mode).
        weights: of `sensitivity`: what lost energy matters, by part, when the choice is projected onto the budget;
            without them each part's energy counts in parts of its own total (corrected mode).
        lr: of alpha; by default the authors' 0.01 in faithful mode and 0.1 in corrected mode. They take hundreds of
            steps a pass; in some tens of steps 0.01 leaves alpha where it began, and the projection decides alone.

    Measured without training (embedded backbone, data-aware, 70 % removed, KL to the dense model on 1,024 held-out
    training images, one pass of 16 batches, 2 seeds): lr 0.01 .016 and .019, lr 0.1 .0053 and .0049, with `weights`
    .0032 and .0032. `comcat_ranks.greedy` with the same weights has .0034; at 50 % removed both give one plan, at 80 %
    the search has .026 to .029 (3 seeds) against .026. Without training, it adds little to the sensitivities.

    `search(epoch, batches)` is one pass over the search data, `commit()` cuts the model, `plan` says how it is cut.
    Raises `ValueError` for a budget below the smallest candidates, candidates that the parts do not have, weights or
    statistics of another model, an adapter, and what `parts` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int,
        *,
        mode: str = "corrected",
        epochs: int = 30,
        schedule: Schedule | None = None,
        ranks: Mapping[str, list[int | None]] | None = None,
        statistics: Statistics | None = None,
        weights: Mapping[str, float] | None = None,
        beta: float = 1.5,
        always: bool = False,
        lr: float | None = None,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ):
        self.model, self.budget, self.epochs, self.beta, self.always = model, budget, epochs, beta, always
        self.faithful = mode == "faithful"
        if self.faithful and not (statistics is None and weights is None):
            raise ValueError("RankSearch: the faithful mode uses plain singular values; leave statistics, weights out")
        check_budget(budget)
        if not 0 < beta < math.inf:
            raise ValueError(f"RankSearch: beta={beta} must be > 0 and finite")
        several.agree_on_weights_(model)
        lr = (0.01 if self.faithful else 0.1) if lr is None else lr
        self.recut = Recut(model, mode, statistics)
        self.parts = self.recut.parts
        if weights is not None:
            check_weights("RankSearch", self.parts, weights)
        self.weights = weights
        self.given = own_candidates(self.parts, ranks or {}, mode)
        self.candidates = {p.name: self.given.get(p.name) or candidates(p, mode) for p in self.parts}
        floor = {n: min(c, key=lambda r: (r is None, r)) for n, c in self.candidates.items()}
        if total_weights(self.parts, floor) > budget:
            least = total_weights(self.parts, floor)
            raise ValueError(
                f"RankSearch: a budget of {budget:,} weights cannot be met; the smallest candidates take {least:,}"
            )
        self.schedule = schedule or Schedule(faithful=self.faithful, first=int(self.faithful))
        self.alphas = [
            torch.full((len(self.candidates[p.name]),), 1 / len(self.candidates[p.name])) for p in self.parts
        ]
        for alpha in self.alphas:
            alpha.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.alphas, lr=lr, weight_decay=weight_decay)
        self.generator = torch.Generator().manual_seed(seed)
        self.searches, self.epoch, self.log, self.train_seconds = 0, 0, [], 0.0
        self._sizes = {p.name: torch.tensor(self._costs(p)) for p in self.parts}
        if self.faithful and self.recut.fresh:
            self.recut.cut({p.name: max(self.candidates[p.name]) for p in self.parts})

    def _costs(self, part: Part) -> list[float]:
        """Weights of the candidates: as realised, or as the authors count them (their nominal ranks)."""
        ranks = self.candidates[part.name]
        if self.faithful and part.kind != "fc":
            known = {n // part.heads: n for n in nominal_candidates(part.heads * part.full)}
            return [float((part.inputs + part.outputs) * known.get(r, r * part.heads)) for r in ranks]
        return [float(part.weights(r)) for r in ranks]

    @property
    def plan(self) -> Plan:
        """How the model is cut now."""
        return self.recut.plan

    @property
    def tau(self) -> float:
        """The temperature now."""
        return temperature(self.searches if self.faithful else self.epoch, self.epochs)

    def sample(self) -> list[Tensor]:
        """One Gumbel-softmax sample of the candidates' weights p, a tensor `(candidates,)` a part."""
        noise = [-torch.empty_like(a).exponential_(generator=self.generator).log() for a in self.alphas]
        return [((a + g) / self.tau).softmax(0) for a, g in zip(self.alphas, noise, strict=True)]

    def size(self, weights: list[Tensor]) -> Tensor:
        """The expected number of weights `()` for candidates' weights p `(candidates,)` a part, linear in each p."""
        pairs = zip(self.parts, weights, strict=True)
        return torch.stack([p @ self._sizes[part.name].to(p.dtype) for part, p in pairs]).sum()

    def expected(self) -> list[Tensor]:
        """The candidates' weights `(candidates,)` a part without noise."""
        return [(a / self.tau).softmax(0) for a in self.alphas]

    def due(self, epoch: int) -> bool:
        """Does this epoch begin with a search?"""
        return self.schedule.due(epoch)

    def search(self, epoch: int, batches: Iterable, loss: Loss = cross_entropy) -> dict:
        """One pass over `batches` of (images, labels) that moves alpha and nothing else, and the choice it leads to.

        Use held-out images of the training set, shuffled. Returns the entry of `log`: epoch, tau, seconds, steps, mean
        loss, expected size, ranks chosen. Raises `ValueError` for no batch, for a set of one class, in corrected mode
        for one sorted by class (as the authors' is), for a loss that is not finite, and for a model without classes;
        alpha is then as before.
        """
        if loss is cross_entropy:
            need_classes(self.model, "RankSearch")
        start, before = time.perf_counter(), self._learned()
        self.epoch = epoch
        spectra = self.recut.spectra()
        plan = changed(self.plan, ranks={n: self._directions(n, s) for n, s in spectra.items()})
        net = Supernet(self.model, self.parts, spectra, plan, self.recut.statistics)
        device, seen, losses = device_of(self.model), [], []
        cover = [coverage(self.candidates[p.name], plan.ranks[p.name]) for p in self.parts]
        devices = [device] if device.type == "cuda" else []
        with surgery.undisturbed(self.model), modes_restored(self.model), torch.random.fork_rng(devices=devices):
            # drop path, dropout, and a loader's shuffling, which must be alike on all processes
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.generator)))
            with swapped(self.model, net.modules):
                self.model.train(self.faithful)
                for images, labels in batches:
                    p = self.sample()
                    net.masks = {q.name: (c @ w).to(device) for q, c, w in zip(self.parts, cover, p, strict=True)}
                    seen += labels.tolist() if labels.dim() == 1 else []
                    images, labels = several.share(images, labels)
                    value = loss(self.model, images.to(device), labels.to(device))
                    size = self.size(p if self.faithful else self.expected())
                    self.optimizer.zero_grad()
                    penalised(value.cpu(), size, self.budget, self.beta, self.always).backward()
                    mean = value.detach().float().reshape(1)
                    several.average_([*(a.grad for a in self.alphas if a.grad is not None), mean], device)
                    if not torch.isfinite(mean):
                        self._put_learned(before)
                        told = f"the loss of step {len(losses)} of epoch {epoch} is {float(mean):g}"
                        raise ValueError(f"RankSearch: {told}")
                    self.optimizer.step()
                    losses.append(float(mean))
        try:
            _check_set(len(losses), seen, self.faithful)
        except ValueError:
            self._put_learned(before)
            raise
        chosen = self.choice(spectra)
        entry = {
            "epoch": epoch,
            "tau": self.tau,
            "steps": len(losses),
            "loss": sum(losses) / len(losses),
            "size": float(self.size(self.expected()).detach()),
            "weights": total_weights(self.parts, chosen),
            "seconds": time.perf_counter() - start,
            "ranks": chosen,
        }
        self.searches += 1
        self.log.append(entry)
        self.schedule.record(epoch, [chosen[p.name] or p.full for p in self.parts])
        return entry

    def _directions(self, name: str, spectrum: Spectrum) -> int:
        ranks = self.candidates[name]
        return spectrum.rank if None in ranks else min(max(ranks), spectrum.rank)

    def choice(self, spectra: Mapping[str, Spectrum]) -> Ranks:
        """The likeliest candidates; in corrected mode projected onto the budget, in steps of one rank."""
        likeliest = {}
        for part, alpha in zip(self.parts, self.alphas, strict=True):
            likeliest[part.name] = self.candidates[part.name][int(alpha.argmax())]
        if self.faithful:
            return likeliest
        curves = {}
        for part in self.parts:
            energy = spectra[part.name].energy
            relative = 1 / max(float(energy.sum()), 1e-300)
            ranks = between(part, self.given[part.name]) if part.name in self.given else None
            curves[part.name] = curve(part, energy, ranks, self.weights[part.name] if self.weights else relative)
        return project(curves, self.budget, likeliest)

    def commit(self) -> bool:
        """Cut the model to the ranks of the last search. True where modules were replaced: then make a new optimiser.

        Corrected: only what changes is replaced. Faithful: everything is factored anew, always.
        Raises `ValueError` when nothing was searched yet.
        """
        if not self.log:
            raise ValueError("RankSearch: nothing was searched yet")
        ranks = self.log[-1]["ranks"]
        if not self.faithful and settled(self.parts, ranks) == settled(self.parts, self.recut.ranks()):
            return False
        self.recut.cut(ranks)
        return True

    def result(self) -> Plan:
        """The plan of the last search, with what the searches took in `about`.

        Raises `ValueError` when nothing was searched and the model is above the budget (corrected mode).
        """
        ranks = settled(self.parts, self.log[-1]["ranks"]) if self.log else self.plan.ranks
        if not (self.log or self.faithful) and total_weights(self.parts, ranks) > self.budget:
            raise ValueError(
                f"RankSearch: nothing was searched, and the model has {total_weights(self.parts, ranks):,} weights, "
                f"more than budget={self.budget:,}; epochs={self.epochs} must be more than the schedule's "
                f"first={self.schedule.first}"
            )
        keys = ("epoch", "seconds", "size", "weights", "tau")
        about = {
            "ranks": "search",
            "budget": self.budget,
            "weights": total_weights(self.parts, ranks),
            "searches": [{k: entry[k] for k in keys} for entry in self.log],
            "search_seconds": sum(entry["seconds"] for entry in self.log),
            "train_seconds": self.train_seconds,
        }
        return changed(self.plan, ranks=ranks, about=about)

    # --- state

    def _learned(self) -> dict:
        return {
            "alphas": [a.detach().clone() for a in self.alphas],
            "optimizer": _copied(self.optimizer.state_dict()),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
        }

    def _put_learned(self, state: dict) -> None:
        with torch.no_grad():
            for alpha, value in zip(self.alphas, state["alphas"], strict=True):
                alpha.copy_(value)
        self.optimizer.load_state_dict(_copied(state["optimizer"]))
        self.generator.set_state(state["generator"])
        self.epoch = state["epoch"]

    def state_dict(self) -> dict:
        """Everything that a later `load_state_dict` needs, besides the model: a copy, fit for torch.save."""
        return self._learned() | {
            "schedule": self.schedule.state_dict(),
            "searches": self.searches,
            "train_seconds": self.train_seconds,
            "log": [dict(entry) for entry in self.log],
            "reserve": {n: (a.clone(), b.clone()) for n, (a, b) in self.recut.reserve.items()},
            "plan": self.plan.to_json(),
            "settings": self._settings(),
        }

    def _settings(self) -> dict:
        """What must be the same when a search goes on."""
        ranks = {name: list(ranks) for name, ranks in self.candidates.items()}
        return {"budget": float(self.budget), "epochs": self.epochs, "candidates": ranks}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`; the model must be cut as it was then (`comcat.load`), and budget, epochs and candidates
        be the same, or `ValueError`."""
        mine, theirs = self._settings(), state.get("settings", {})
        other = [name for name in theirs if theirs[name] != mine.get(name)]
        if other:
            old, new = theirs[other[0]], mine[other[0]]
            how = "" if other[0] == "candidates" else f"={new:,.12g} must be {old:,.12g},"
            raise ValueError(f"RankSearch: {other[0]}{how} as in the state; start anew for others")
        plan = Plan.from_json(state["plan"])
        now = current_ranks(self.model, self.parts)
        if plan.ranks != now or plan.shapes != self.plan.shapes or plan.mode != self.plan.mode:
            raise ValueError("RankSearch: the state belongs to a model cut otherwise; load that model first")
        self._put_learned(state)
        self.schedule.load_state_dict(state["schedule"])
        self.searches, self.train_seconds = state["searches"], state["train_seconds"]
        self.log = [dict(entry) for entry in state["log"]]
        self.recut.plan, self.recut.reserve = plan, dict(state["reserve"])


def _check_set(batches: int, labels: list[int], faithful: bool) -> None:
    problem = _problem(labels, batches > 1 and not faithful) if batches else "has no batches"
    if problem:
        raise ValueError(f"RankSearch: the search set {problem}; give shuffled held-out images of all classes")


def _problem(labels: list[int], ordered: bool) -> str | None:
    """What is wrong with the labels of a search set, in the order they came in; `ordered`: look at the order, too."""
    classes = set(labels)
    if len(classes) == 1:
        return f"has one class only ({labels[0]})"
    changes = sum(a != b for a, b in zip(labels, labels[1:], strict=False))
    if ordered and changes == len(classes) - 1 and len(labels) >= max(16, 4 * len(classes)):
        return "is sorted by class, so that the last classes would decide"
    return None


def _copied(state):
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {k: _copied(v) for k, v in state.items()}
    return [_copied(v) for v in state] if isinstance(state, list) else state


def search(
    model: nn.Module,
    batches: Iterable | Callable[[int], Iterable],
    budget: int,
    *,
    epochs: int,
    loss: Loss = cross_entropy,
    train: Callable[[nn.Module, int, bool], None] | None = None,
    resume: dict | None = None,
    save: Callable[[RankSearch, int], None] | None = None,
    **settings,
) -> Plan:
    """Search the ranks, and train between the searches where `train` is given; returns the plan.

    Args:
        batches: (images, labels) of the search set, gone through at every search; or `batches(epoch)` that gives them.
            Each of several processes takes its part of every batch (see `several`).
        train: `train(model, epoch, renewed)` trains the weights for one epoch; `renewed` says that modules were
            replaced, so that the optimiser must be new. The model is then cut in place as the search goes. Without
            it the model stays as it is, and `comcat.apply(model, plan)` cuts it.
        resume: a `RankSearch.state_dict()`; the model is loaded before.
        save: called with the search after every epoch.
        settings: of `RankSearch` (mode, schedule, statistics, seed, ...).

    `plan.about` holds the searches (epochs, seconds, sizes), so that the time saved by a schedule can be read off.

    Raises `ValueError` as `RankSearch` does, and where no epoch searches and the model is above the budget. A list of
    batches is looked at first; the model is then as it was.

    >>> import torch
    >>> from leanvit import comcat, models
    >>> model = models.create("embedded_vit", depth=1)
    >>> budget = comcat.authors_budget(model, 0.5)  # half of the weights of the layers
    >>> batches = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]
    >>> plan = comcat.search(model, batches, budget, epochs=1, schedule=comcat.Schedule(first=0))
    >>> 0.99 * budget < plan.about["weights"] <= budget
    True
    >>> report = comcat.apply(model, plan)
    """
    if loss is cross_entropy:
        need_classes(model, "search")
    faithful = settings.get("mode") == "faithful"
    if isinstance(batches, (list, tuple)):
        _check_set(len(batches), [c for _, y in batches if y.dim() == 1 for c in y.tolist()], faithful)
    if faithful and train is None:
        model = copy.deepcopy(model)  # this mode factors it at once
    state = RankSearch(model, budget, epochs=epochs, **settings)
    if resume is not None:
        state.load_state_dict(resume)
    for epoch in range(0 if resume is None else resume["epoch"] + 1, epochs):
        renewed = epoch == 0
        if state.due(epoch):
            state.search(epoch, batches(epoch) if callable(batches) else batches, loss)
            if train is not None:
                renewed = state.commit() or renewed
        if train is not None:
            start = time.perf_counter()
            train(model, epoch, renewed)
            state.train_seconds += time.perf_counter() - start
        state.epoch = epoch
        if save is not None:
            save(state, epoch)
    return state.result()
