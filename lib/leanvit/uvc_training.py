"""What both solvers of UVC share: gates and masks on a model in training, the step of the weights, processes, state.

The order of a step is that of UVC's specification, 2.2; the recipe that of 2.3 and 2.4.
Gates and masks act through hooks: no module is swapped, the state dict stays the stock model's, and `close` leaves
nothing behind. In eval mode the gates are what would be exported (1 where the logit is positive), so evaluation draws
nothing. With several processes (torch.distributed) the gradients are averaged, and what is decided on rank 0 holds.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from leanvit import several, surgery
from leanvit.checkpoint import TrainingDiverged
from leanvit.distill import cross_entropy
from leanvit.evaluate import device_of
from leanvit.train import mix_seed
from leanvit.uvc_math import Norms, group_norms
from leanvit.uvc_modules import check_grid
from leanvit.uvc_plan import Plan, read_shapes
from leanvit.uvc_slicing import value_columns

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Hooks:
    """Gates around blocks, masks in front of the projections, and a hold on the patch tokens of one model."""

    def __init__(self, model: nn.Module, prefix: int, patches: int):
        self.gates: Tensor | None = None  # (L,) run weights in training mode
        self.exported: Tensor | None = None  # (L,) zeros and ones in eval mode
        self.masks: dict[tuple[int, str], Tensor] = {}
        self.probes: dict[tuple[int, str], Tensor] | None = None  # ones (B, 1, width), filled by a forward in training
        self.patch_gate: Tensor | None = None  # (n,) in training mode
        self.keep: Tensor | None = None  # kept patch positions, in both modes
        self.prefix, self.patches = prefix, patches
        self.handles = []
        for i, block in enumerate(model.blocks):
            self.handles.append(block.register_forward_hook(self._gate(i)))
            for name in ("attn.proj", "mlp.fc2"):
                self.handles.append(block.get_submodule(name).register_forward_pre_hook(self._mask(i, name)))
        if isinstance(getattr(model, "patch_drop", None), nn.Module):
            self.handles.append(model.patch_drop.register_forward_hook(self._patches()))

    def _gate(self, i: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            run = self.gates if module.training else self.exported
            if run is None or (run[i] == 1 and not run.requires_grad):
                return None
            return inputs[0] + run[i].to(output.dtype) * (output - inputs[0])

        return hook

    def _mask(self, i: int, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> tuple | None:
            mask = self.masks.get((i, name))
            if mask is None and self.probes is not None and module.training:
                x = inputs[0]
                mask = self.probes[i, name] = x.new_ones(len(x), 1, x.shape[-1], requires_grad=True)
            return None if mask is None else (inputs[0] * mask.to(inputs[0].dtype), *inputs[1:])

        return hook

    def _patches(self) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            if self.keep is not None:
                check_grid(output, self.prefix + self.patches)
                prefix = torch.arange(self.prefix, device=output.device)
                return output.index_select(1, torch.cat([prefix, self.prefix + self.keep.to(output.device)]))
            if self.patch_gate is None or not module.training:
                return None
            check_grid(output, self.prefix + self.patches)
            ones = self.patch_gate.new_ones(self.prefix)
            return output * torch.cat([ones, self.patch_gate])[None, :, None].to(output.dtype)

        return hook

    def set_masks(self, plan: Plan, device: torch.device) -> None:
        """Zero what `plan` removes; blocks it skips get a gate of 0."""
        self.masks = {}
        for i, (shape, block) in enumerate(zip(plan.shapes.blocks, plan.blocks, strict=True)):
            if block is None:
                continue
            columns, units = torch.zeros(sum(shape.values)), torch.zeros(shape.hidden)
            columns[value_columns(shape.values, block)] = 1
            units[list(block.units)] = 1
            self.masks |= {(i, "attn.proj"): columns.to(device), (i, "mlp.fc2"): units.to(device)}
        self.gates = torch.tensor([float(b is not None) for b in plan.blocks], device=device)
        self.exported = self.gates

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class Trainer:
    """One step of the weights under gates, and the state that a resumed search needs.

    A subclass says which gates a step draws (`draw_gates`), what happens to the structure after a step (`decide`),
    what its own state is (`variables`), and what the plan is.

    Raises `ValueError` for a model that cannot be cut, has nothing to train, weights that are not finite or no head for
    the default loss, and for steps that are no whole number of at least 1.
    """

    mode = ""

    def __init__(self, model: nn.Module, steps: int, loss: Loss | None, lr: float, weight_decay: float, clip: float,
                 lr_warmup: int, seed: int):  # fmt: skip
        surgery.check_whole("search", steps=steps)
        self.shapes = read_shapes(model)
        if loss is None and hasattr(model, "get_classifier"):
            surgery.need_head(model, "search")
        group_norms(model, self.shapes)  # refuses weights that are not finite
        self.model, self.steps, self.loss, self.seed = model, steps, loss or cross_entropy, seed
        self.lr, self.clip, self.lr_warmup = lr, clip, lr_warmup
        self.step_number, self.history = 0, []
        self.trained = [p for p in model.parameters() if p.requires_grad]
        if not self.trained:
            raise ValueError("search: no parameter of the model requires a gradient; UVC trains weights and structure")
        self.device = device_of(model)
        several.agree_on_weights_(model)
        self.logits = self.first_logits()
        moved = self.optimized()
        how = {"lr": lr, "weight_decay": weight_decay, "fused": surgery.without_gaps(moved)}
        self.optimizer = torch.optim.AdamW(moved, **how)
        self.hooks = Hooks(model, self.shapes.prefix, self.shapes.patches)

    # --- for subclasses

    def first_logits(self) -> Tensor:
        """The blocks' gate logits at the start, `(L,)` or `(L, 2)`."""
        raise NotImplementedError

    def optimized(self) -> list[Tensor]:
        """What the weights' optimiser moves: tensors of any shape."""
        return self.trained

    def draw_gates(self) -> Tensor | None:
        """Run weights `(L,)` of the next step, or None where all blocks run."""
        raise NotImplementedError

    def decide(self) -> dict:
        """Move the structure after a step of the weights; returns what goes into the history."""
        raise NotImplementedError

    def variables(self) -> dict[str, Tensor]:
        """The structure's own tensors, of any shape, by name: what all processes must agree on and a resume needs."""
        raise NotImplementedError

    def extra_state(self) -> dict:
        """What `state_dict` holds beside `variables`, as plain data."""
        return {}

    def load_extra_state(self, state: dict) -> None:
        """Take back what `extra_state` gave."""

    def identity(self) -> dict:
        """What a saved state must have been made with."""
        raise NotImplementedError

    # --- the step

    def learning_rate(self, step: int) -> float:
        """Of step `step` from 1: a line from 0, then a half cosine to 0 (specification, 2.3)."""
        if step < self.lr_warmup:
            return self.lr * step / self.lr_warmup
        done = (step - self.lr_warmup) / max(1, self.steps - self.lr_warmup)
        return self.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2

    def norms(self) -> list[Norms]:
        """`group_norms` of the model as it is now, on the CPU. Raises `ValueError` as they do."""
        return [
            Norms(tuple(d.cpu() for d in n.dims), n.heads.cpu(), n.units.cpu())
            for n in group_norms(self.model, self.shapes)
        ]

    def step(self, images: Tensor, labels: Tensor) -> dict:
        """One iteration on one batch of this process, images `(B, C, H, W)` and labels `(B,)` or `(B, classes)`.

        Returns the new entry of `history` (specification, 2.2).

        Raises `TrainingDiverged` where the loss is not finite, `RuntimeError` after the last step or `close`.
        """
        if self.step_number >= self.steps:
            raise RuntimeError(f"search: all {self.steps} steps are done; plan() has the result")
        if not self.hooks.handles:
            raise RuntimeError("search: this search is closed")
        t = self.step_number + 1
        self.rate = self.learning_rate(t)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.model.train()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            # dropout depends on the step alone, so that a resumed search repeats it
            torch.manual_seed(mix_seed(self.seed, "uvc", t, several.rank()))
            self.logits.grad = None
            for p in self.trained:
                p.grad = None
            self.hooks.gates = self.draw_gates()
            loss = self.loss(self.model, images.to(self.device), labels.to(self.device))
            loss.backward()
        if self.hooks.gates is not None:
            self.hooks.gates = self.hooks.gates.detach()  # a model with a graph in it cannot be copied
        value = loss.detach().float().reshape(1)
        self.before_update()
        gradients = [p.grad for p in self.optimized() if p.grad is not None]
        several.average_(gradients + self.other_gradients() + [value], self.device)
        if not math.isfinite(value.item()):
            raise TrainingDiverged(
                f"search: the loss is {value.item()} at step {t} of {self.steps}, lr={self.rate:.3g}"
            )
        torch.nn.utils.clip_grad_norm_(self.optimized(), self.clip)
        self.optimizer.step()
        self.step_number = t
        entry = {"step": t, "loss": value.item(), "lr": self.rate, **self.decide()}
        several.agree_(list(self.variables().values()), self.device)
        self.refresh()
        self.history.append(entry)
        return entry

    def before_update(self) -> None:
        """Called between backward and the averaging of gradients."""

    def other_gradients(self) -> list[Tensor]:
        """Further tensors of any shape to average over processes, in place."""
        return []

    def refresh(self) -> None:
        """Gates of evaluation follow the logits."""
        if self.hooks.masks:
            return
        self.hooks.exported = (self.logits.detach() > 0).float()

    def close(self) -> None:
        """Take gates, masks and gradients off the model; its weights stay as they are now."""
        self.hooks.remove()
        for p in self.trained:
            p.grad = None

    # --- state

    def state_dict(self) -> dict:
        """All that a continuation needs, weights and optimiser included: plain data and tensors."""
        variables = {n: v.detach().clone() for n, v in self.variables().items()}
        weights = {n: t.clone() for n, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        return {
            "identity": self.identity(),
            "step": self.step_number,
            "variables": variables,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),  # torch's are the moments themselves
            "model": weights,
            "history": list(self.history),
            **self.extra_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state` (of the same model shapes, budget, steps and settings) to bit-equal results on one CPU.

        Raises `ValueError` that names the first difference where the state is another search's.
        """
        theirs, ours = state["identity"], self.identity()
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"load_state_dict: {name} was {theirs.get(name)!r} in that search; here it is {value!r}"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # torch keeps the tensors it is given
        self.step_number, self.history = state["step"], list(state["history"])
        with torch.no_grad():
            for name, value in self.variables().items():
                value.copy_(state["variables"][name])
        self.load_extra_state(state)
        self.refresh()
