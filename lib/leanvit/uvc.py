"""UVC: heads, head dimensions, MLP units and whole blocks of a vision transformer, pruned under one budget.

Yu, Chen, Shen, Yuan, Tan, Yang, Liu, Wang: "Unified Visual Transformer Compression", ICLR 2022, arXiv 2203.08243.
Written from the problem as the paper states it and from what the released code does (the specification says which is
which); covers the constrained problem, the primal-dual search, the reading-off and real slicing.

    min L(W, g)   subject to   T_s(norms of heads, of units) = 0,   T_r(norms of head dims) = 0,   R(s, r, g) <= budget

T_k is the sum of the k smallest, R the part of the dense FLOPs (`uvc_plan.py`), g a run-or-skip gate a block.

    plan = uvc.search(model, batches, budget=0.5, steps=600, loss=Distill(teacher))   # trains the weights, decides
    uvc.apply(model, plan)                                                           # physically smaller, for good
    train.fit(model, ..., loss=Distill(teacher)); uvc.save(model, path)              # stage 2

Rooms: `uvc_plan` (shapes, counts, plan), `uvc_modules` and `uvc_slicing` (apply, mask, save, load), `uvc_math` (norms,
proximal step, gates, R), `uvc_cost` (FLOPs, latency), `uvc_budget` (exact finish, controls), `uvc_search`,
`uvc_settings` and `uvc_importance` (the corrected solver), `uvc_faithful` and `uvc_flags` (the authors'),
`uvc_training` (what both share).

Known divergences of the default from the authors' code: groups are ranked by what their removal costs the loss and
weighed against each other (`uvc_importance`; `Settings(importance="norms")` ranks by the paper's norms, where every
kind of group has a clip of its own: theirs starves MLP units); variables are fractions; R in the dual step is that of
the exported network; z is controlled on a ramp (theirs winds up); the plan meets the budget exactly, in sizes a machine
likes; what goes is sliced, not masked;
patches are gathered (theirs are multiplied by zero, which saves nothing), their number given and their places found by
the size of the loss's gradient. `mode="faithful"` is their solver.
"""

from collections.abc import Iterable, Sized

import torch
from torch import Tensor, nn

from leanvit import several
from leanvit.evaluate import modes_restored
from leanvit.uvc_budget import magnitude_plan, random_plan
from leanvit.uvc_cost import LatencyTable, measure_latency
from leanvit.uvc_faithful import FaithfulSearch
from leanvit.uvc_flags import README, Flags, from_flags
from leanvit.uvc_modules import KeepPatches, SlicedAttention
from leanvit.uvc_plan import BlockPlan, BlockShape, Plan, Shapes, dense_macs, head_macs, read_shapes
from leanvit.uvc_search import CorrectedSearch
from leanvit.uvc_settings import Settings
from leanvit.uvc_slicing import apply, kept_blocks, load, mask, save
from leanvit.uvc_training import Loss

__all__ = [
    "README", "BlockPlan", "BlockShape", "CorrectedSearch", "FaithfulSearch", "Flags", "KeepPatches", "LatencyTable",
    "Plan", "Settings", "Shapes", "SlicedAttention", "apply", "dense_macs", "from_flags", "head_macs", "kept_blocks",
    "load", "magnitude_plan", "mask", "measure_latency", "random_plan", "read_shapes", "save", "search",
]  # fmt: skip

Batches = Iterable[tuple[Tensor, Tensor]]


def search(
    model: nn.Module,
    batches: Batches,
    budget: float | None = None,
    *,
    steps: int | None = None,
    mode: str = "corrected",
    loss: Loss | None = None,
    settings: Settings | Flags | None = None,
    latency: LatencyTable | None = None,
    state: dict | None = None,
    history: list | None = None,
) -> Plan:
    """Decide what goes; the weights of `model` are trained in place meanwhile, and nothing is cut yet.

    Its modules are in train or eval mode afterwards as they were before.

    >>> import timm, torch
    >>> from leanvit import uvc
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
    ...                           num_heads=2, num_classes=4)
    >>> batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    >>> plan = uvc.search(model, batches, budget=0.6, steps=4)
    >>> plan.ratio() <= 0.6
    True

    Args:
        batches: of (images `(B, C, H, W)`, labels `(B,)` or probabilities), gone through again and again: a list or a
            DataLoader, shuffled. The search opens no data set of its own. Each of several processes takes its part of
            every batch (see `several`).
        budget: part of the dense FLOPs, or of the dense milliseconds with `latency` (from `measure_latency`).
        steps: of the search, by default one pass ("corrected"). "faithful" runs `flags.num_epochs + 1` passes.
        loss: `loss(model, images, labels)`; by default cross-entropy, with `distill.Distill` a distillation.
        settings: `Settings` of the corrected solver, `Flags` of the faithful one.
        state: of `CorrectedSearch.state_dict()`; the search goes on from there.
        history: a list that gets one entry a step (loss, R, z, counts, gates).

    Raises:
        ValueError: a budget below the floor (named), a model that cannot be cut, one without a classifier where no
            loss is given, labels of one class only, settings of the other mode, a warm-up that takes all steps; the
            model is then unchanged. TypeError: batches that can be gone through only once.
    """
    if mode not in ("corrected", "faithful"):
        raise ValueError(f"search: mode={mode!r} must be corrected or faithful")
    _check_batches(batches)
    if mode == "faithful":
        solver = _faithful(model, batches, budget, steps, loss, settings, latency)
    else:
        if settings is not None and not isinstance(settings, Settings):
            raise ValueError(f"search: the corrected solver takes Settings, not {type(settings).__name__}")
        if budget is None:
            raise ValueError("search: budget= is missing, the part of the dense cost that may be left")
        steps = _length(batches) if steps is None else steps
        solver = CorrectedSearch(model, budget, steps, loss=loss, settings=settings, latency=latency)
    try:
        with modes_restored(model):
            if state is not None:
                solver.load_state_dict(state)
            skip = solver.step_number % _length(batches) if isinstance(batches, Sized) else 0
            while not solver.done:
                for k, (images, labels) in enumerate(batches):
                    if solver.done:
                        break
                    if k >= skip:
                        solver.step(*several.share(images, labels))
                skip = 0
            return solver.plan()
    finally:
        solver.close()
        if history is not None:
            history.extend(solver.history)


def _faithful(model, batches, budget, steps, loss, flags, latency) -> FaithfulSearch:
    if flags is not None and not isinstance(flags, Flags):
        raise ValueError(f"search: the faithful solver takes Flags, not {type(flags).__name__}")
    if latency is not None:
        raise ValueError("search: the faithful solver knows FLOPs only; use mode='corrected' with latency=")
    flags = flags or Flags(**({} if budget is None else {"budget": budget}))
    if budget is not None and budget != flags.budget:
        raise ValueError(f"search: budget={budget} contradicts the flag --budget {flags.budget}")
    if steps is not None:
        raise ValueError("search: the faithful solver goes by epochs; set num_epochs of its Flags, not steps=")
    return FaithfulSearch(model, flags, steps_per_epoch=_length(batches), loss=loss)


def _length(batches: Batches) -> int:
    if not isinstance(batches, Sized):
        raise TypeError("search: these batches have no length; give steps=")
    return len(batches)


def _check_batches(batches: Batches) -> None:
    """At least one batch, and labels of at least two classes in the first pass; probabilities count by the largest."""
    if iter(batches) is batches:
        raise TypeError("search: batches can be gone through only once; give a list or a DataLoader")
    first = None
    for _, labels in batches:
        if labels.is_floating_point():
            if labels.dim() != 2 or labels.shape[1] < 2 or ((labels.sum(1) - 1).abs() > 1e-2).any():
                return  # no probabilities: the caller's loss knows what they are
            labels = labels.argmax(1)
        first = labels.flatten()[0] if first is None else first
        if torch.any(labels != first):
            return
    if first is None:
        raise ValueError("search: there are no batches")
    raise ValueError(f"search: all labels are class {int(first)}; a search needs images of at least two classes")
