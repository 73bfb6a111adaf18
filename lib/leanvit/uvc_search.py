"""UVC's corrected solver: normalised variables, straight-through gates, a controlled z, an exact finish.

The problem is the paper's (arXiv 2203.08243), min L(W, g) subject to least-k sums of zero and R <= b; the solver is
that of the specification, 2.8, items (a) to (i). Steps and gains are given for a whole search and divided by its
length, so that a search of twice the steps takes the same path at half the pace.
"""

import bisect
import math
from dataclasses import asdict

import torch
from torch import Tensor, nn

from leanvit.train import mix_seed
from leanvit.uvc_budget import Counts, check_budget, floor, meet
from leanvit.uvc_cost import FlopsCost, LatencyCost, LatencyTable
from leanvit.uvc_importance import MEMORY, as_norms, squares, widths
from leanvit.uvc_math import (
    BudgetControl,
    Norms,
    dead_heads,
    hard_gate,
    likely_gate,
    logistic_noise,
    next_smallest,
    shrink_,
    smallest,
    unit_columns,
)
from leanvit.uvc_plan import Plan
from leanvit.uvc_settings import Settings
from leanvit.uvc_training import Loss, Trainer

GATE_LIMIT = 6.0  # of the logits: sigmoid has next to no slope beyond


class CorrectedSearch(Trainer):
    """One search, step by step: `step(images, labels)` until `done`, then `plan()`.

    Args:
        model: a timm vision transformer; its weights are trained in place.
        budget: part of the dense model's FLOPs, or of its milliseconds with `latency`.
        steps: of the whole search.
        loss: `loss(model, images, labels) -> scalar`; cross-entropy by default, see `distill.Distill`.

    Raises `ValueError`: a budget below the floor (named), a model that cannot be cut, settings that contradict.
    """

    mode = "corrected"

    def __init__(self, model: nn.Module, budget: float, steps: int, *, loss: Loss | None = None,
                 settings: Settings | None = None, latency: LatencyTable | None = None):  # fmt: skip
        self.settings = c = settings or Settings()
        self.budget, self.latency = budget, latency
        super().__init__(
            model, steps, loss, c.lr, c.weight_decay, c.clip_norm, max(1, round(c.lr_warmup * steps)), c.seed
        )
        try:
            self._begin(model)
        except Exception:
            self.close()
            raise

    def _begin(self, model: nn.Module) -> None:
        c, shapes = self.settings, self.shapes
        depth, most = len(shapes.blocks), max((b.heads for b in shapes.blocks), default=0)
        self.fixed = tuple(name for name in ("heads", "units") if not getattr(c, name))
        if c.dims and self.latency is not None:
            raise ValueError("search: a latency table knows no value dimensions; use dims=False")
        if c.dims and any(len(set(b.values)) > 1 for b in shapes.blocks):
            raise ValueError("search: heads of different widths cannot be cut evenly; use dims=False")
        if c.keep_patches is not None:
            self._check_patches(model)
        tokens = shapes.tokens if c.keep_patches is None else shapes.prefix + c.keep_patches
        self.final_cost = self._cost(tokens)
        check_budget(self.budget, self.final_cost, self._floor())
        self.cost = self._cost(shapes.tokens)
        self.fractions = torch.zeros(depth, 2)  # of heads and units to remove
        self.dim_fractions = torch.zeros(depth, most)
        self.y, self.p = torch.zeros(depth, 2), torch.zeros(depth, most)
        self.z, self.gate_momentum = torch.zeros(1), torch.zeros(depth)
        self.warmup_steps = round(c.warmup * self.steps)
        after = self.steps - self.warmup_steps
        if after < 1:
            raise ValueError(
                f"search: steps={self.steps} must be more than the warm-up takes ({self.warmup_steps}, "
                f"warmup={c.warmup}); use more steps or a shorter warm-up"
            )
        self.settle_step = self.warmup_steps + max(1, round(c.ramp * after))
        self.control = BudgetControl(self.budget, after, c.ramp, c.z_integral / self.steps, c.z_proportional, c.z_limit)
        self.whole = torch.tensor([[b.heads, b.hidden] for b in shapes.blocks], dtype=torch.float32)
        self.whole_dims = torch.ones(depth, most)
        for i, b in enumerate(shapes.blocks):
            self.whole_dims[i, : b.heads] = torch.tensor(b.values, dtype=torch.float32)
        self.found: Plan | None = None
        self.patches: tuple[int, ...] | None = None
        self.saliency = torch.zeros(shapes.patches)
        self.importance = torch.zeros(depth, sum(widths(shapes)))  # running mean, see uvc_importance
        self.seen = torch.zeros(depth)  # steps that are in it
        # which patches matter is measured in the first tenth, then they go; the plan must know which
        self.patch_steps = 0 if c.keep_patches is None else min(max(1, round(0.1 * self.steps)), self.settle_step)
        self.refresh()

    def _check_patches(self, model: nn.Module) -> None:
        keep = self.settings.keep_patches
        if not 1 <= keep <= self.shapes.patches:
            raise ValueError(f"search: keep_patches={keep} is outside 1..{self.shapes.patches}")
        if self.latency is not None:
            raise ValueError("search: a latency table is of all patches; use keep_patches=None with it")
        if not isinstance(getattr(model, "patch_drop", None), nn.Identity):
            raise ValueError(
                f"search: patches go where {type(model).__name__} would drop them at random (patch_drop), which must "
                "be there and off"
            )

    def _cost(self, tokens: int) -> FlopsCost | LatencyCost:
        return FlopsCost(self.shapes, tokens) if self.latency is None else LatencyCost(self.shapes, self.latency)

    def _floor(self) -> float:
        """The least ratio of these settings."""
        c = self.settings
        return floor(
            self.final_cost, round_units=c.round_units, round_dims=c.round_dims if c.dims else None, skip=c.blocks,
            fixed=self.fixed,
        )  # fmt: skip

    # --- the weights' part

    def learning_rate(self, step: int) -> float:
        """A line from 0, then constant while the structure moves, then a half cosine to 0 for what is left.

        The released schedule (specification, 2.3) falls from the start.
        """
        if step < self.lr_warmup:
            return self.lr * step / self.lr_warmup
        done = (step - self.settle_step) / max(1, self.steps - self.settle_step)
        return self.lr * (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2

    def first_logits(self) -> Tensor:
        """`(L,)`: `gate_start` of the settings."""
        return torch.full((len(self.shapes.blocks),), float(self.settings.gate_start), requires_grad=True)

    def draw_gates(self) -> Tensor | None:
        """Hard gates `(L,)` (2.8b), None where blocks may not go; those of the plan once it is found."""
        t = self.step_number + 1
        if self.patch_steps and self.patches is None:
            self.hooks.patch_gate = torch.ones(self.shapes.patches, device=self.device, requires_grad=True)
        if self.found is not None:
            return self.hooks.gates
        self.hooks.probes = {} if self.settings.importance == "loss" else None
        if not self.settings.blocks:
            return None
        noise = logistic_noise(len(self.logits), mix_seed(self.seed, "gates", t))
        return hard_gate(self.logits, noise).to(self.device)

    def before_update(self) -> None:
        """Read the gradients of the probes in front of groups and patches."""
        probes, self.hooks.probes = self.hooks.probes, None
        if probes is not None:
            self.squares = squares(self.shapes, probes)
            self.ran = (self.squares.sum(1, keepdim=True) > 0).float()
        gate = self.hooks.patch_gate
        if gate is not None and gate.grad is not None:
            self.patch_gradient = gate.grad.detach().cpu()

    def other_gradients(self) -> list[Tensor]:
        """Those of the gates `(L,)`, the groups' `(L, widths)` and `(L, 1)`, the patches' `(n,)`."""
        gradients = [] if self.logits.grad is None else [self.logits.grad]
        if self.found is None and self.settings.importance == "loss":
            gradients += [self.squares, self.ran]
        return gradients + ([self.patch_gradient] if self.hooks.patch_gate is not None else [])

    # --- the structure's part

    def decide(self) -> dict:
        """One step of z, widths, gates and duals, the plan when the ramp ends; the entry for the history (2.8)."""
        t = self.step_number
        if self.hooks.patch_gate is not None:
            self.saliency += self.patch_gradient.square()
            if t >= self.patch_steps:
                self._drop_patches()
        norms = self._scores() if self.found is None else []
        if self.found is None:
            self._shrink(norms)
            if t > self.warmup_steps:
                self._move(norms, t - self.warmup_steps)
        if self.found is None and t >= self.settle_step:
            self._settle(norms)
        ratio = self.ratio(norms) if self.found is None else self.found.origin["predicted_ratio"]
        counts = self.counts()
        return {
            "ratio": ratio,
            "target": self.control.target(max(0, t - self.warmup_steps)),
            "z": self.z.item(),
            "heads": counts[:, 0].tolist(),
            "units": counts[:, 1].tolist(),
            "dims": self.removed_dims().sum(1).tolist(),
            "logits": self.logits.tolist(),
            "settled": self.found is not None,
        }

    def _scores(self) -> list[Norms]:
        """By what groups are ranked: the running mean of their importance, or the paper's norms."""
        if self.settings.importance == "norms":
            return self.norms()
        self.seen += self.ran[:, 0]
        share = self.ran / self.seen.clamp(1, MEMORY)[:, None]
        self.importance += share * (self.squares - self.importance)
        return as_norms(self.shapes, self.importance)

    def counts(self) -> Tensor:
        """`(L, 2)` heads and hidden units to remove: real numbers, rounded up where they count."""
        return self.fractions * self.whole

    def removed_dims(self) -> Tensor:
        """`(L, most heads)` value dimensions to remove in each head, if it stays."""
        return self.dim_fractions * self.whole_dims

    def ratio(self, norms: list[Norms]) -> float:
        """R of the network that would be exported now."""
        with torch.no_grad():
            return float(self._ratio(self.counts(), self.removed_dims(), self.logits, norms))

    def _ratio(self, s: Tensor, r: Tensor, logits: Tensor, norms: list[Norms]) -> Tensor:
        run = likely_gate(logits) if self.settings.blocks else torch.ones(len(logits))
        return self.cost.ratio(s, r, dead_heads(norms, s[:, 0].detach()), run)

    def _shrink(self, norms: list[Norms]) -> None:
        """(d): the groups that are to go shrink, with a step size of their own."""
        strength = self.settings.shrink / self.steps
        s, r = self.counts(), self.removed_dims()
        for i, (block, norm) in enumerate(zip(self.model.blocks, norms, strict=True)):
            shape = self.shapes.blocks[i]
            starts = [sum(shape.values[:h]) for h in range(shape.heads)]
            projection = block.attn.proj.weight
            for h in range(shape.heads):
                columns = starts[h] + smallest(norm.dims[h], r[i, h])
                shrink_(projection, columns.to(self.device), strength * self.p[i, h].item())
            for h in smallest(norm.heads, s[i, 0]).tolist():
                columns = torch.arange(starts[h], starts[h] + shape.values[h], device=self.device)
                shrink_(projection, columns, strength * self.y[i, 0].item())
            units = smallest(norm.units, s[i, 1]).to(self.device)
            shrink_(unit_columns(block.mlp), units, strength * self.y[i, 1].item())

    def _move(self, norms: list[Norms], t: int) -> None:
        """(a) to (d): z, then widths and gates along their gradients, then the duals of the least-k sums."""
        self.z.fill_(self.control.update(self.ratio(norms), t))
        self.move_structure(norms)
        if self.settings.importance == "loss" and len(self.fixed) < 2:
            self._fill(norms, self.control.target(t))
        self._raise_duals(norms)

    def move_structure(self, norms: list[Norms]) -> None:
        """One step of widths and gates under the present duals (specification, 2.8a)."""
        c, z = self.settings, self.z.item()
        s, r = self.counts().requires_grad_(), self.removed_dims().requires_grad_()
        logits = self.logits.detach().clone().requires_grad_()
        pull = torch.autograd.grad(self._ratio(s, r, logits, norms), (s, r, logits), allow_unused=True)
        pull = [torch.zeros_like(v) if g is None else g for g, v in zip(pull, (s, r, logits), strict=True)]
        push_s, push_r = self._pushes(norms, s.detach(), r.detach())
        gradient = push_s + z * pull[0] * self.whole  # of the fractions
        gradient_r = push_r + z * pull[1] * self.whole_dims
        rate = c.width_rate / self.steps
        for kind, allowed in enumerate((c.heads, c.units)):
            if allowed:
                self.fractions[:, kind] -= rate * _bounded(gradient[:, kind])
        if c.dims:
            self.dim_fractions -= rate * _bounded(gradient_r)
        for fractions, whole in ((self.fractions, self.whole), (self.dim_fractions, self.whole_dims)):
            fractions.copy_(fractions.clamp(min=0).minimum(1 - 1 / whole))
        if c.blocks:
            task = torch.zeros_like(logits) if self.logits.grad is None else self.logits.grad
            self.gate_momentum.mul_(0.9).add_(_bounded(task + z * pull[2]), alpha=0.1)
            with torch.no_grad():
                self.logits -= c.gate_rate / self.steps * self.gate_momentum
                self.logits.clamp_(-GATE_LIMIT, GATE_LIMIT)

    def _fill(self, norms: list[Norms], target: float) -> None:
        """Heads and units that minimise the loss's estimated rise at R <= target: the cheapest rises per cost go."""
        prices, kinds = {}, [k for k, name in enumerate(("heads", "units")) if name not in self.fixed]
        for i, (n, b) in enumerate(zip(norms, self.shapes.blocks, strict=True)):
            costs = self.cost.attention(i, b.heads, max(b.values)) / b.heads, self.cost.mlp(i, b.hidden) / b.hidden
            for k in kinds:
                prices[i, k] = (n.heads, n.units)[k] / max(costs[k], 1e-30)
        levels = torch.cat(list(prices.values())).sort().values

        def ratio(level: int) -> float:
            for (i, k), price in prices.items():
                gone = min(int((price <= levels[level]).sum()), len(price) - 1)
                self.fractions[i, k] = max(0.0, gone - 0.5) / len(price)  # half a group less: counts are rounded up
            return self.ratio(norms)

        ratio(bisect.bisect_left(range(len(levels) - 1), -target, key=lambda level: -ratio(level)))

    def _pushes(self, norms: list[Norms], s: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the duals' least-k sums, as parts of the whole norm, in the fractions."""
        push_s, push_r = torch.zeros_like(s), torch.zeros_like(r)
        for i, n in enumerate(norms):
            for kind, a in enumerate((n.heads, n.units)):
                push_s[i, kind] = self.y[i, kind] * len(a) * next_smallest(a, s[i, kind]) / a.sum().clamp_min(1e-30)
            for h, a in enumerate(n.dims if self.settings.dims else ()):
                push_r[i, h] = self.p[i, h] * len(a) * next_smallest(a, r[i, h]) / a.sum().clamp_min(1e-30)
        return push_s, push_r

    def _raise_duals(self, norms: list[Norms]) -> None:
        rate, limit = self.settings.y_rate / self.steps, self.settings.y_limit
        s, r = self.counts(), self.removed_dims()
        for i, n in enumerate(norms):
            for kind, a in enumerate((n.heads, n.units)):
                self.y[i, kind] += rate * _least_part(a, s[i, kind])
            for h, a in enumerate(n.dims):
                self.p[i, h] += rate * _least_part(a, r[i, h])
        self.y.clamp_(0, limit)
        self.p.clamp_(0, limit)

    def _drop_patches(self) -> None:
        self.patches = tuple(sorted(self.saliency.argsort()[-self.settings.keep_patches :].tolist()))
        self.hooks.patch_gate, self.hooks.keep = None, torch.tensor(self.patches)
        self.cost = self.final_cost

    # --- the finish

    def _settle(self, norms: list[Norms]) -> None:
        """(f), (g), (i): gates fixed, counts repaired to the exact budget, masks in the forward from here on."""
        self.found = self._repaired(norms)
        self.hooks.set_masks(self.found, self.device)

    def _repaired(self, norms: list[Norms]) -> Plan:
        c = self.settings
        s, r = self.counts().ceil(), self.removed_dims().ceil()
        dead = dead_heads(norms, s[:, 0])
        start: list[Counts | None] = []
        for i, b in enumerate(self.shapes.blocks):
            here = ~dead[i, : b.heads]
            width = max(b.values) - round(float(r[i, : b.heads][here].mean()))
            runs = not c.blocks or self.logits[i].item() > 0
            start.append(Counts(b.heads - int(s[i, 0]), width, b.hidden - int(s[i, 1])) if runs else None)
        gates = self.logits.tolist() if c.blocks else None
        origin = {"mode": self.mode, "steps": self.steps, "settled_at": self.step_number, "settings": asdict(c)}
        return meet(
            self.cost, norms, self.budget, start=start, gates=gates, round_units=c.round_units,
            round_dims=c.round_dims if c.dims else None, patches=self.patches, origin=origin,
            fixed=self.fixed, absolute=c.importance == "loss",
        )  # fmt: skip

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step_number >= self.steps

    def plan(self) -> Plan:
        """What the search has decided; `apply` it to the trained model after `close()`.

        Raises `RuntimeError` before the ramp has ended: until then the budget is not met.
        """
        if self.found is None:
            raise RuntimeError(
                f"search: the plan is decided at step {self.settle_step} of {self.steps}; {self.step_number} are done"
            )
        return self.found

    # --- state

    def variables(self) -> dict[str, Tensor]:
        """Fractions `(L, 2)`, duals, logits `(L,)` and what else a step moves, by name."""
        return {
            "fractions": self.fractions,
            "dim_fractions": self.dim_fractions,
            "y": self.y,
            "p": self.p,
            "z": self.z,
            "logits": self.logits,
            "gate_momentum": self.gate_momentum,
            "importance": self.importance,
            "seen": self.seen,
            "saliency": self.saliency,
        }

    def identity(self) -> dict:
        """Budget, steps, settings, shapes and the table of ms."""
        return {
            "mode": self.mode,
            "budget": self.budget,
            "steps": self.steps,
            "settings": asdict(self.settings),
            "latency": None if self.latency is None else self.latency.to_json(),
            "shapes": self.shapes.to_dict(),
        }

    def extra_state(self) -> dict:
        """z's integral, the kept patches, the plan as JSON."""
        return {
            "integral": self.control.integral,
            "patches": self.patches,
            "plan": None if self.found is None else self.found.to_json(),
        }

    def load_extra_state(self, state: dict) -> None:
        """Take them back; masks and patches on the model follow."""
        self.control.integral = state["integral"]
        # this search may be further on than the state
        self.found, self.patches, self.cost = None, None, self._cost(self.shapes.tokens)
        self.hooks.patch_gate = self.hooks.keep = self.hooks.gates = None
        self.hooks.masks = {}
        if state["patches"] is not None:
            self.patches = tuple(state["patches"])
            self.hooks.keep, self.cost = torch.tensor(self.patches), self.final_cost
        if state["plan"] is not None:
            self.found = Plan.from_json(state["plan"])
            self.hooks.set_masks(self.found, self.device)


def _bounded(gradient: Tensor) -> Tensor:
    """Scaled so that no entry exceeds 1: one kind of group at a time, or a head's gradient would starve a unit's."""
    return gradient / max(1.0, gradient.abs().max().item())


def _least_part(a: Tensor, k: Tensor) -> float:
    """T_k as a part of the whole."""
    return float(a[smallest(a, k)].sum() / a.sum().clamp_min(1e-30))
