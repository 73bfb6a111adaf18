"""What the removal of a group costs: the expected rise of the loss, from gradients of ones put before the projections.

A mask m = 1 stands before `attn.proj` and `mlp.fc2`, one a group and image. For a loss L_b of image b the second-order
term of setting m to 0 is about (dL_b/dm)^2 / 2 (Fisher's form of the Hessian: Theis, Korshunova, Tejani, Huszar,
"Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787). Unlike norms of weights these have
one unit, so that heads and hidden units of all blocks can be weighed against each other.
"""

import torch
from torch import Tensor

from leanvit.uvc_math import Norms
from leanvit.uvc_plan import Shapes

MEMORY = 30  # steps: the running mean forgets what the weights were before


def squares(shapes: Shapes, probes: dict[tuple[int, str], Tensor]) -> Tensor:
    """`(L, most heads + most values + most units)`: each group's mean over images of squared gradients, zero-padded.

    `probes`, `(B, 1, columns)` each, have the gradients of a mean over the batch; blocks that did not run have none.
    """
    heads, values, units = widths(shapes)
    found = torch.zeros(len(shapes.blocks), heads + values + units)
    for i, shape in enumerate(shapes.blocks):
        for name, first in (("attn.proj", heads), ("mlp.fc2", heads + values)):
            probe = probes.get((i, name))
            if probe is None or probe.grad is None:
                continue
            gradient = probe.grad[:, 0].float() * len(probe)
            found[i, first : first + gradient.shape[1]] = gradient.square().mean(0).cpu()
            if name == "attn.proj":
                parts = torch.stack([g.sum(1) for g in gradient.split(shape.values, dim=1)], 1)
                found[i, : shape.heads] = parts.square().mean(0).cpu()
    return found


def widths(shapes: Shapes) -> tuple[int, int, int]:
    """Most heads, value dimensions and hidden units of a block."""
    blocks = shapes.blocks
    return (
        max((b.heads for b in blocks), default=0),
        max((sum(b.values) for b in blocks), default=0),
        max((b.hidden for b in blocks), default=0),
    )


def as_norms(shapes: Shapes, importance: Tensor) -> list[Norms]:
    """The table of `squares`, `(L, most heads + most values + most units)`, by block."""
    heads, values, _ = widths(shapes)
    found = []
    for row, shape in zip(importance, shapes.blocks, strict=True):
        dims = row[heads : heads + sum(shape.values)].split(shape.values)
        found.append(Norms(dims, row[: shape.heads], row[heads + values : heads + values + shape.hidden]))
    return found
