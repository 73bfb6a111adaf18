"""UVC's solver as its authors released it, defects included where they change a result (UVC's specification, 2, 5.1).

What is kept: one clip and one rate for head and unit counts, so that units starve (P1); z by plain ascent, so that it
winds up (P3); no resource gradient where |R - b| exceeds `z_grad_clip` (P4; one at the bound, as in torch 1.7);
R and its gradients on random gate draws (P5); gate logits under AdamW and weight decay as well as their own SGD (P8);
the proximal step at AdamW's rate (P13); a z rate that stays at the schedule's first number (P2); one epoch more than
asked (P10). A plan is the argmax architecture of the moment, and meets no budget.

Known divergences: evaluation and the plan use argmax gates (theirs draw at random); masks are made anew for each plan
(P7); variables agree between processes (P15) and can be resumed (P18); `enable_warmup 0` turns the warm-up off (theirs
ignores it).
"""

import math
from dataclasses import asdict

import torch
from torch import Tensor, nn

from leanvit.surgery import check_whole
from leanvit.train import mix_seed
from leanvit.uvc_flags import Flags, zlr_schedule
from leanvit.uvc_math import (
    Norms,
    ascend,
    dead_heads,
    flops_ratio,
    logistic_noise,
    next_smallest,
    shrink_,
    smallest,
    soft_gate,
    soft_l0_gate,
    unit_columns,
)
from leanvit.uvc_plan import BlockPlan, Plan
from leanvit.uvc_training import Loss, Trainer

START = 1e-3  # of every dual variable


class FaithfulSearch(Trainer):
    """The authors' stage 1, step by step: `step(images, labels)` until `done`; `plan()` at any time.

    Args:
        model: a timm vision transformer; its weights are trained in place.
        flags: as the README's; `uvc_flags.from_flags` reads a command line.
        steps_per_epoch: warm-up, z's schedule and eps go by epochs, counted from 1.
        loss: `loss(model, images, labels)`; theirs is `distill.Distill(teacher, 0.1, 1.0, per_class=True)`.
        follow_zlr_schedule: let `zlr_schedule_list` act as it was meant to; theirs stays at its first number.

    Raises `ValueError` for steps that are no whole number of at least 1 and for a model that cannot be cut.
    """

    mode = "faithful"

    def __init__(self, model: nn.Module, flags: Flags | None = None, *, steps_per_epoch: int, loss: Loss | None = None,
                 follow_zlr_schedule: bool = False):  # fmt: skip
        check_whole("search", steps_per_epoch=steps_per_epoch)
        self.flags = f = flags or Flags()
        self.steps_per_epoch, self.follow = steps_per_epoch, follow_zlr_schedule
        steps = (f.num_epochs + 1) * steps_per_epoch
        self.cosine_steps = f.num_epochs * steps_per_epoch
        super().__init__(model, steps, loss, f.learning_rate, f.weight_decay, f.max_grad_norm, f.warmup_steps, f.seed)
        depth, most = len(self.shapes.blocks), max((b.heads for b in self.shapes.blocks), default=0)
        self.s, self.r = torch.zeros(depth, 2), torch.zeros(depth, most)
        self.s_limit = torch.tensor([[b.heads - 1, b.hidden - 1] for b in self.shapes.blocks], dtype=torch.float32)
        self.r_limit = torch.zeros(depth, most)
        for i, b in enumerate(self.shapes.blocks):
            self.r_limit[i, : b.heads] = torch.tensor(b.values, dtype=torch.float32) - 1
        self.y, self.p = torch.full((depth, 2), START), torch.full((depth, most), START)
        self.z = torch.full((1,), START)
        self.collected, self.collected_count = torch.zeros(depth, 2), torch.zeros(1)
        self.gate_momentum = torch.zeros(depth, 2)
        self.refresh()

    def learning_rate(self, step: int) -> float:
        """AdamW's at step `step` from 1: a line from 0, then a half cosine to 0 one epoch before the end (2.3)."""
        lr, warm = self.flags.learning_rate, self.flags.warmup_steps
        if step < warm:
            return lr * step / warm
        done = (step - warm) / max(1, self.cosine_steps - warm)
        return lr * (1 + math.cos(math.pi * min(1.0, done))) / 2

    @property
    def epoch(self) -> int:
        """Of the last step, from 1."""
        return max(0, self.step_number - 1) // self.steps_per_epoch + 1

    def in_warmup(self, step: int) -> bool:
        """Whether the weights alone learn at step `step` from 1."""
        f = self.flags
        return bool(f.enable_warmup) and (step - 1) // self.steps_per_epoch + 1 <= f.warmup_epochs

    def z_rate(self) -> float:
        """The rate of z's ascent in this epoch; theirs is the schedule's first number (P2)."""
        schedule = zlr_schedule(self.flags.zlr_schedule_list, self.flags.num_epochs)
        if not self.follow:
            return schedule[0]
        return schedule[max(e for e in schedule if e <= self.epoch)]

    def eps(self) -> float:
        """Smoothing of the gates without Gumbel noise (specification, 2.3)."""
        warm = self.flags.warmup_epochs if self.flags.enable_warmup else 0
        return self.flags.eps * self.flags.eps_decay ** max(0, self.epoch - warm - 1)

    # --- the weights' part

    def first_logits(self) -> Tensor:
        """`(L, 2)`: -1 to skip, 1 to run (specification, 1.2)."""
        return torch.tensor([[-1.0, 1.0]]).repeat(len(self.shapes.blocks), 1).requires_grad_()

    def optimized(self) -> list[Tensor]:
        """The weights, of any shape, and the logits `(L, 2)`, which AdamW moves as well (P8)."""
        return [*self.trained, self.logits] if self.flags.enable_block_gating else self.trained

    def draw_gates(self) -> Tensor | None:
        """Run weights `(L,)`: a half in the warm-up, then a draw (specification, 2.3); ones without block gating."""
        if self.in_warmup(self.step_number + 1) and self.flags.enable_block_gating:
            return torch.full((len(self.shapes.blocks),), 0.5, device=self.device)
        return self.sample(self.logits, "forward", self.step_number + 1).to(self.device)

    def sample(self, logits: Tensor, purpose: str, step: int) -> Tensor:
        """Run weights `(L,)` of `logits (L, 2)`: a soft Gumbel sample of its own for each purpose and step."""
        if not self.flags.enable_block_gating:
            return torch.ones(len(logits))
        if not self.flags.use_gumbel:
            return soft_l0_gate(logits, self.eps())
        return soft_gate(logits[:, 1] - logits[:, 0], logistic_noise(len(logits), mix_seed(self.seed, purpose, step)))

    def refresh(self) -> None:
        """Gates of evaluation are the argmax."""
        g = self.logits.detach()
        self.hooks.exported = (g[:, 1] > g[:, 0]).float()

    # --- the structure's part

    def decide(self) -> dict:
        """The rest of the authors' iteration (specification, 2.2, steps 2 to 6); the entry for the history."""
        norms = self.norms()
        self._shrink(norms)
        ratio = None
        if not self.in_warmup(self.step_number):
            norms = self.norms()
            task = None if self.logits.grad is None else self.logits.grad.clone()  # clipped with the weights'
            self.move_counts(norms)
            self.move_gates(norms, task)
            ratio = self.move_duals(norms)
        with torch.no_grad():
            exported = float(self._ratio(self.s, self.r, self.hooks.exported, norms, paper=False))
        g = self.logits.detach()
        return {
            "ratio": ratio,  # of a random draw, what z sees
            "exported": exported,  # of the argmax architecture, what one would get
            "z": self.z.item(),
            "heads": self.s[:, 0].tolist(),
            "units": self.s[:, 1].tolist(),
            "dims": self.r.sum(1).tolist(),
            "logits": (g[:, 1] - g[:, 0]).tolist(),
            "warmup": ratio is None,
        }

    def _ratio(self, s: Tensor, r: Tensor, run: Tensor, norms: list[Norms], *, paper: bool = True) -> Tensor:
        dead = dead_heads(norms, s[:, 0].detach())
        return flops_ratio(self.shapes, s, r, dead, run, paper=paper, tokens=self.shapes.tokens)

    def _shrink(self, norms: list[Norms]) -> None:
        for i, (block, norm) in enumerate(zip(self.model.blocks, norms, strict=True)):
            values, projection = self.shapes.blocks[i].values, block.attn.proj.weight
            starts = [sum(values[:h]) for h in range(len(values))]
            for h in range(len(values)):
                columns = (starts[h] + smallest(norm.dims[h], self.r[i, h])).to(self.device)
                shrink_(projection, columns, self.rate * self.p[i, h].item())
            for h in smallest(norm.heads, self.s[i, 0]).tolist():
                columns = torch.arange(starts[h], starts[h] + values[h], device=self.device)
                shrink_(projection, columns, self.rate * self.y[i, 0].item())
            columns = smallest(norm.units, self.s[i, 1]).to(self.device)
            shrink_(unit_columns(block.mlp), columns, self.rate * self.y[i, 1].item())

    def _pull(self, ratio: Tensor) -> float:
        """Derivative of clamp(R - b, -c, c): 1, or 0 beyond c."""
        return float(abs(ratio.item() - self.flags.budget) <= self.flags.z_grad_clip)

    def move_counts(self, norms: list[Norms]) -> None:
        """One step of s and r by plain SGD; heads and units share one clip (specification, 2.2, step 4)."""
        s, r = self.s.clone().requires_grad_(), self.r.clone().requires_grad_()
        run = self.sample(self.logits.detach(), "counts", self.step_number)
        ratio = self._ratio(s, r, run, norms)
        pull = self._pull(ratio) * self.z.item()
        grad_s, grad_r = (pull * g for g in torch.autograd.grad(ratio, (s, r)))
        for i, n in enumerate(norms):
            for kind, a in enumerate((n.heads, n.units)):
                grad_s[i, kind] += self.y[i, kind] * next_smallest(a, self.s[i, kind])
            for h, a in enumerate(n.dims):
                grad_r[i, h] += self.p[i, h] * next_smallest(a, self.r[i, h])
        grad_s += self.flags.sl2wd * self.s / self.s_limit.clamp_min(1)
        for x, grad, limit, rate in (
            (self.s, grad_s, self.s_limit, self.flags.slr),
            (self.r, grad_r, self.r_limit, self.flags.rlr),
        ):
            grad[(x >= limit) & (grad < 0)] = 0
            grad[(x <= 0) & (grad > 0)] = 0
            x -= rate * grad / max(1.0, grad.abs().max().item())
            x.copy_(x.clamp(min=0).minimum(limit))

    def move_gates(self, norms: list[Norms], task: Tensor | None) -> None:
        """Collect the gates' gradient, of the task `(L, 2)`; every `gating_interval` steps take the ramp-weighted mean
        as one SGD step (specification, 2.2, step 5).
        """
        f, t = self.flags, self.step_number
        if not f.enable_block_gating:
            return
        g = self.logits.detach().clone().requires_grad_()
        ratio = self._ratio(self.s, self.r, self.sample(g, "gates", t), norms)
        resource = torch.autograd.grad(ratio, g)[0] * self._pull(ratio) * self.z.item() * f.gating_weight
        gradient = resource if task is None else task + resource
        self.collected += gradient * (t % f.gating_interval)
        self.collected_count += 1
        if t % f.gating_interval:
            return
        with torch.no_grad():
            mean = self.collected / self.collected_count + 1e-4 * self.logits
            self.gate_momentum.mul_(0.9).add_(mean)
            self.logits -= f.glr * self.gate_momentum
        self.collected.zero_()
        self.collected_count.zero_()

    def move_duals(self, norms: list[Norms]) -> float:
        """Ascent of y, p and z; returns the R that z saw, on gates of its own draw (specification, 2.2, step 6)."""
        for i, n in enumerate(norms):
            for kind, a in enumerate((n.heads, n.units)):
                self.y[i, kind] += self.flags.ylr * a[smallest(a, self.s[i, kind])].sum()
            for h, a in enumerate(n.dims):
                self.p[i, h] += self.flags.plr * a[smallest(a, self.r[i, h])].sum()
        with torch.no_grad():
            run = self.sample(self.logits.detach(), "duals", self.step_number)
            ratio = float(self._ratio(self.s, self.r, run, norms))
        self.z.fill_(ascend(self.z.item(), self.z_rate(), ratio, self.flags.budget))
        return ratio

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step_number >= self.steps

    def plan(self) -> Plan:
        """The argmax architecture of this moment: R is what it is, not the budget (specification, 2.5)."""
        norms, blocks = self.norms(), []
        for i, (shape, n) in enumerate(zip(self.shapes.blocks, norms, strict=True)):
            if not self.hooks.exported[i] and self.flags.enable_block_gating:
                blocks.append(None)
                continue
            dead = set(smallest(n.heads, self.s[i, 0]).tolist())
            heads = tuple(h for h in range(shape.heads) if h not in dead)
            values = []
            for h in heads:
                gone = set(smallest(n.dims[h], self.r[i, h]).tolist())
                values.append(tuple(j for j in range(shape.values[h]) if j not in gone))
            gone = set(smallest(n.units, self.s[i, 1]).tolist())
            blocks.append(BlockPlan(heads, tuple(values), tuple(k for k in range(shape.hidden) if k not in gone)))
        origin = {"mode": self.mode, "steps": self.step_number, "flags": asdict(self.flags)}
        return Plan(self.shapes, tuple(blocks), None, origin)

    # --- state

    def variables(self) -> dict[str, Tensor]:
        """s `(L, 2)`, r `(L, most heads)`, the logits `(L, 2)`, the duals and what else a step moves, by name."""
        return {
            "s": self.s,
            "r": self.r,
            "logits": self.logits,
            "y": self.y,
            "p": self.p,
            "z": self.z,
            "gate_momentum": self.gate_momentum,
            "collected": self.collected,
            "collected_count": self.collected_count,
        }

    def identity(self) -> dict:
        """Flags, steps an epoch and shapes."""
        return {
            "mode": self.mode,
            "flags": asdict(self.flags),
            "steps_per_epoch": self.steps_per_epoch,
            "follow_zlr_schedule": self.follow,
            "shapes": self.shapes.to_dict(),
        }
