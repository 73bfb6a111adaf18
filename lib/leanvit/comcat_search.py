"""ComCAT's differentiable search for ranks, in spectral-mask form, fixed or adaptive in time.

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

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace as changed

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit import surgery
from leanvit.comcat import PLAN, Cutter, Part, Plan, make_plan, part_of
from leanvit.comcat_calibrate import Statistics
from leanvit.comcat_factors import Spectrum
from leanvit.comcat_modules import FactoredLinear, read_linear
from leanvit.comcat_ranks import candidates, curve, nominal_candidates, project, total_weights
from leanvit.comcat_schedule import Schedule, penalised, temperature
from leanvit.comcat_supernet import Supernet, coverage, current_ranks, product, swapped
from leanvit.evaluate import device_of, modes_restored

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Ranks = dict[str, int | None]


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of the search: plain cross-entropy."""
    return F.cross_entropy(model(images), labels)


def settled(found: list[Part], ranks: Ranks) -> dict[str, int]:
    """Ranks as a plan holds them: an attention with one factored part is factored as a whole."""
    touched = {p.module for p in found if ranks.get(p.name) is not None}
    full = {p.name: p.full for p in found if p.kind != "fc" and p.module in touched}
    return full | {n: r for n, r in ranks.items() if r is not None}


class RankSearch:
    """Logits, temperature, schedule and choice of a search, with what it needs to go on later.

    Args:
        model: the dense model (faithful mode factors it at once, at the largest candidates, without its biases), or
            one that such a search has cut already.
        budget: weights of all parts together, see `comcat_ranks.authors_budget`.
        epochs: how many the whole run has; the temperature falls from 5 to 0.1 over them.
        schedule: see `Schedule`; by default the adaptive one of the mode.
        ranks: candidates by part, in place of those of the mode.
        statistics: of `calibrate`, for data-aware directions (corrected mode).

    `search(epoch, batches)` is one pass over the search data, `commit()` cuts the model, `plan` says how it is cut.
    Raises `ValueError` for a budget below the smallest candidates, and what `parts` raises.
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
        beta: float = 1.5,
        always: bool = False,
        lr: float = 1e-2,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ):
        self.model, self.budget, self.epochs, self.beta, self.always = model, budget, epochs, beta, always
        self.faithful = mode == "faithful"
        if self.faithful and statistics is not None:
            raise ValueError("RankSearch: the faithful mode uses plain singular values; leave statistics out")
        self.statistics = statistics
        before = getattr(model, PLAN, None)
        if before is not None and before.mode != mode:
            raise ValueError(f"RankSearch: this model was cut in {before.mode} mode; go on with mode={before.mode!r}")
        self.plan = before or make_plan(model, {}, mode=mode)
        self.parts = [part_of(name, shape) for name, shape in self.plan.shapes.items()]
        self.candidates = {p.name: list((ranks or {}).get(p.name) or candidates(p, mode)) for p in self.parts}
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
        self.reserve: dict[str, tuple[Tensor, Tensor]] = {}
        self._sizes = {p.name: torch.tensor(self._costs(p)) for p in self.parts}
        if self.faithful and before is None:
            self._cut({p.name: max(self.candidates[p.name]) for p in self.parts})

    def _costs(self, part: Part) -> list[float]:
        """Weights of the candidates: as realised, or as the authors count them (their nominal ranks)."""
        ranks = self.candidates[part.name]
        if self.faithful and part.kind != "fc":
            known = {n // part.heads: n for n in nominal_candidates(part.heads * part.full)}
            return [float((part.inputs + part.outputs) * known.get(r, r * part.heads)) for r in ranks]
        return [float(part.weights(r)) for r in ranks]

    @property
    def tau(self) -> float:
        """The temperature now."""
        return temperature(self.searches if self.faithful else self.epoch, self.epochs)

    def sample(self) -> list[Tensor]:
        """One Gumbel-softmax sample of the candidates' weights, a tensor a part."""
        noise = [-torch.empty_like(a).exponential_(generator=self.generator).log() for a in self.alphas]
        return [((a + g) / self.tau).softmax(0) for a, g in zip(self.alphas, noise, strict=True)]

    def size(self, weights: list[Tensor]) -> Tensor:
        """The expected number of weights for candidates' weights p, linear in each p."""
        pairs = zip(self.parts, weights, strict=True)
        return torch.stack([p @ self._sizes[part.name].to(p.dtype) for part, p in pairs]).sum()

    def expected(self) -> list[Tensor]:
        """The candidates' weights without noise."""
        return [(a / self.tau).softmax(0) for a in self.alphas]

    def spectra(self) -> dict[str, Spectrum]:
        """The singular values and vectors of every part as it is now, with the directions kept aside."""
        result = {}
        for part in self.parts:
            a, b = product(self.model, part, self.plan.bias == "absorb")
            if part.name in self.reserve:
                more = self.reserve[part.name]
                a, b = torch.cat([a, more[0].to(a)], -1), torch.cat([b, more[1].to(b)], -2)
            weighting = (None, None) if self.statistics is None else self.statistics.weighting(part.name)
            result[part.name] = Spectrum(a, b, *weighting)
        return result

    def due(self, epoch: int) -> bool:
        """Does this epoch begin with a search?"""
        return self.schedule.due(epoch)

    def search(self, epoch: int, batches: Iterable, loss: Loss = cross_entropy) -> dict:
        """One pass over `batches` of (images, labels) that moves alpha and nothing else, and the choice it leads to.

        Use held-out images of the training set, shuffled. Returns the entry of `log`: epoch, tau, seconds, steps, mean
        loss, expected size, ranks chosen. Raises `ValueError` for no batch, for a set of one class, and for a loss
        that is not finite; alpha and the optimiser are then as before.
        """
        start, before = time.perf_counter(), self._learned()
        self.epoch = epoch
        spectra = self.spectra()
        plan = changed(self.plan, ranks={n: self._directions(n, s) for n, s in spectra.items()})
        net = Supernet(self.model, self.parts, spectra, plan, self.statistics)
        device, classes, losses = device_of(self.model), set(), []
        cover = [coverage(self.candidates[p.name], plan.ranks[p.name]) for p in self.parts]
        devices = [device] if device.type == "cuda" else []
        with surgery.undisturbed(self.model), modes_restored(self.model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.generator)))  # drop path, dropout
            with swapped(self.model, net.modules):
                self.model.train(self.faithful)
                for images, labels in batches:
                    p = self.sample()
                    net.masks = {q.name: (c @ w).to(device) for q, c, w in zip(self.parts, cover, p, strict=True)}
                    value = loss(self.model, images.to(device), labels.to(device))
                    size = self.size(p if self.faithful else self.expected())
                    if not torch.isfinite(value):
                        self._put_learned(before)
                        raise ValueError(f"RankSearch: the loss of step {len(losses)} of epoch {epoch} is {value:g}")
                    self.optimizer.zero_grad()
                    penalised(value.cpu(), size, self.budget, self.beta, self.always).backward()
                    self.optimizer.step()
                    losses.append(float(value.detach()))
                    classes |= set(labels.tolist()) if labels.dim() == 1 else {"several", "classes"}
        if len(classes) < 2:
            self._put_learned(before)
            what = "no batches" if not losses else f"one class only ({next(iter(classes))})"
            raise ValueError(f"RankSearch: the search set has {what}; give shuffled held-out images of all classes")
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
            curves[part.name] = curve(part, energy, weight=1 / max(float(energy.sum()), 1e-300))
        return project(curves, self.budget, likeliest)

    def commit(self) -> bool:
        """Cut the model to the ranks of the last search. True where modules were replaced: then make a new optimiser.

        Corrected: only what changes is replaced. Faithful: everything is factored anew, always.
        """
        if not self.log:
            raise ValueError("RankSearch: nothing was searched yet")
        ranks = self.log[-1]["ranks"]
        if not self.faithful and settled(self.parts, ranks) == settled(self.parts, self._now()):
            return False
        self._cut(ranks)
        return True

    def _now(self) -> Ranks:
        """The ranks as they are, None for dense parts and for parts of full rank of an attention."""
        ranks = current_ranks(self.model, self.parts)
        return {p.name: r if (r := ranks.get(p.name)) != p.full or p.kind == "fc" else None for p in self.parts}

    @torch.no_grad()
    def _cut(self, ranks: Ranks) -> None:
        spectra, reserve, now, new = self.spectra(), dict(self.reserve), self._now(), {}
        attention = {p.name: p.full for p in self.parts if p.kind != "fc"}
        plan = changed(self.plan, ranks=attention | {n: r for n, r in ranks.items() if r is not None})

        def cut(name: str, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
            left, right = spectra[name].factors(plan.ranks[name], not self.faithful)
            if self.faithful:
                return _padded(left, right, plan.ranks[name])
            reserve[name] = spectra[name].factors(None, first=plan.ranks[name])
            return left, right

        cutter = Cutter(plan, cut, None if self.statistics is None else self.statistics.shift)
        changing = {p.module for p in self.parts if self.faithful or ranks[p.name] != now[p.name]}
        for part in self.parts:
            if part.module not in changing or part.module in new:
                continue
            module = self.model.get_submodule(part.module)
            if part.kind == "fc" and ranks[part.name] is None:
                new[part.module] = self._dense(part, module, *spectra[part.name].factors())
                reserve.pop(part.name, None)
            else:
                new[part.module] = cutter.make(part, module)
        for name, module in new.items():
            surgery.replace(self.model, name, module)
        self.reserve = reserve
        self.plan = changed(self.plan, ranks=current_ranks(self.model, self.parts))
        setattr(self.model, PLAN, self.plan if self.plan.ranks else None)

    def _dense(self, part: Part, m: FactoredLinear, left: Tensor, right: Tensor) -> nn.Linear:
        """The plain linear layer of a factored one and what was kept aside of it."""
        a, b, bias = read_linear(m)
        if bias is not None and self.statistics is not None:
            bias = bias + self.statistics.shift(part.name, a, b, left, right)
        new = nn.Linear(m.in_features, m.out_features, bias is not None, device="meta", dtype=a.dtype)
        new = new.to_empty(device=a.device)
        new.weight.copy_((left @ right).T)
        if bias is not None:
            new.bias.copy_(bias)
        return new.requires_grad_(m.first.weight.requires_grad)

    def result(self) -> Plan:
        """The plan of the last search, with what the searches took in `about`."""
        ranks = settled(self.parts, self.log[-1]["ranks"]) if self.log else self.plan.ranks
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
            "reserve": {n: (a.clone(), b.clone()) for n, (a, b) in self.reserve.items()},
            "plan": self.plan.to_json(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`; the model must be cut as it was then (`comcat.load`), or `ValueError`."""
        plan = Plan.from_json(state["plan"])
        now = current_ranks(self.model, self.parts)
        if plan.ranks != now or plan.shapes != self.plan.shapes or plan.mode != self.plan.mode:
            raise ValueError("RankSearch: the state belongs to a model cut otherwise; load that model first")
        self._put_learned(state)
        self.schedule.load_state_dict(state["schedule"])
        self.searches, self.train_seconds, self.plan = state["searches"], state["train_seconds"], plan
        self.log = [dict(entry) for entry in state["log"]]
        self.reserve = dict(state["reserve"])


def _copied(state):
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {k: _copied(v) for k, v in state.items()}
    return [_copied(v) for v in state] if isinstance(state, list) else state


def _padded(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A product at a larger rank: more orthonormal columns on the left, zero rows on the right (specification 2.4)."""
    more = rank - left.shape[-1]
    if more <= 0:
        return left, right
    basis = torch.linalg.qr(left, mode="complete").Q[..., left.shape[-1] : rank]
    return torch.cat([left, basis], -1), F.pad(right, (0, 0, 0, more))


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
        train: `train(model, epoch, renewed)` trains the weights for one epoch; `renewed` says that modules were
            replaced, so that the optimiser must be new. The model is then cut in place as the search goes. Without
            it the model stays as it is, and `comcat.apply(model, plan)` cuts it.
        resume: a `RankSearch.state_dict()`; the model is loaded before.
        save: called with the search after every epoch.
        settings: of `RankSearch` (mode, schedule, statistics, seed, ...).

    `plan.about` holds the searches (epochs, seconds, sizes), so that the time saved by a schedule can be read off.
    """
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
