"""Distillation from an uncompressed model, of its classes and of its blocks, as a loss for `train.fit` and searches."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit import surgery
from leanvit.evaluate import modes_restored


class Distill:
    """`loss(model, images, labels)`, by default of the classes alone:

        (1 - alpha) CE(student, labels) + alpha KD + alignment * sum over blocks of MSE(student's block, teacher's)

    KD is `tau^2 KL(softmax(teacher / tau) || softmax(student / tau))`, summed over classes and divided by the batch;
    with `per_class` also by the number of classes, as DeiT's released loss and UVC's do, which makes it C times weaker.
    `hard`: cross-entropy with the teacher's choice. Images are `(B, 3, H, W)`, labels `(B,)`. A model that answers
    (logits, distillation logits) is taught by the second. `blocks`: those whose outputs are aligned, see
    `aligned_blocks`; `alignment` may be set anew for each epoch, see `alignment_weights`. The teacher sees the same
    images in eval mode, gets no gradient and keeps its modes. `remember`: for so many images its outputs are kept and
    used when the same pixels come again, which saves its forward pass where a set is small and not augmented (on the
    CPU, in full precision: a GPU is quicker than this is); the teacher must not change meanwhile.

    Raises `ValueError` for alpha outside [0, 1], tau <= 0, blocks that the teacher does not have, `remember` below 0 or
    together with blocks, and, when called, for a teacher of other classes, blocks or widths than the student, or a
    model without a classifier.

    >>> import torch
    >>> from leanvit import distill, models
    >>> teacher, student = models.create("embedded_vit", checkpoint="embedded"), models.create("embedded_vit", depth=2)
    >>> loss = distill.Distill(teacher, alpha=0.5, tau=2.0)  # for train.fit(..., loss=loss)
    >>> loss(student, torch.rand(2, 3, 32, 32), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    def __init__(
        self,
        teacher: nn.Module,
        alpha: float = 0.5,
        tau: float = 2.0,
        *,
        hard: bool = False,
        per_class: bool = False,
        blocks: Sequence[int] = (),
        alignment: float = 0.0,
        remember: int = 0,
    ):
        if isinstance(alpha, str) or not 0 <= alpha <= 1:
            raise ValueError(f"Distill: alpha={alpha!r} must be in [0, 1]")
        if isinstance(tau, str) or not 0 < tau < math.inf:
            raise ValueError(f"Distill: tau={tau!r} must be > 0 and finite")
        self.teacher, self.alpha, self.tau, self.hard, self.per_class = teacher, alpha, tau, hard, per_class
        if remember < 0 or (remember and blocks):
            raise ValueError(f"Distill: remember={remember!r} must be >= 0, and 0 with blocks: only logits are kept")
        self.blocks, self.alignment, self.remember = list(blocks), alignment, remember
        self._told: dict[bytes, Tensor] = {}
        depth = len(getattr(teacher, "blocks", []))
        if any(not 0 <= b < depth for b in self.blocks):
            raise ValueError(f"Distill: blocks {self.blocks} of a teacher with {depth} blocks; name 0..{depth - 1}")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        student = getattr(model, "module", model)  # of several processes
        if self.blocks and len(getattr(student, "blocks", [])) != len(self.teacher.blocks):
            raise ValueError("Distill: student and teacher differ in their blocks; use blocks=[]")
        need_classes(student, "Distill")
        if self.alpha:
            need_classes(self.teacher, "Distill")
        with self._outputs(student) as ours:
            output = model(images)
        logits, taught = output if isinstance(output, tuple) else (output, output)
        value = F.cross_entropy(logits.float(), labels)
        if self.alpha == 0 and not self.blocks:
            return value
        with modes_restored(self.teacher), self._outputs(self.teacher) as theirs, torch.no_grad():
            told = self._told_of(images) if self._remembers(images) else self.teacher.eval()(images)
        if self.alpha:
            if told.shape != taught.shape:
                raise ValueError(
                    f"Distill: the teacher has {told.shape[-1]} classes, the model {taught.shape[-1]}; give a teacher "
                    "of the same classes"
                )
            value = (1 - self.alpha) * value + self.alpha * self.distance(taught.float(), told.float())
        return value + self.alignment * self._apart(ours, theirs) if self.blocks else value

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KD of the logits `(B, classes)` of student and teacher, a scalar."""
        if self.hard:
            return F.cross_entropy(student, teacher.argmax(1))
        log_student, log_teacher = (F.log_softmax(t / self.tau, 1) for t in (student, teacher))
        total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * self.tau**2
        return total / (student.numel() if self.per_class else len(student))

    def _remembers(self, images: Tensor) -> bool:
        """Not under autocast, whose precision is that of the moment."""
        return self.remember > 0 and images.device.type == "cpu" and not torch.is_autocast_enabled("cpu")

    def _told_of(self, images: Tensor) -> Tensor:
        """The teacher's logits; it computes the batch where one of its images is not remembered: parts of a batch may
        differ from it in the last bit, and a resumed run has forgotten all.
        """
        pixels = images.detach().contiguous()
        keys = [hashlib.blake2b(image.view(torch.uint8).numpy()).digest() for image in pixels]
        if all(key in self._told for key in keys):
            return torch.stack([self._told[key] for key in keys])
        told = self.teacher.eval()(images)
        new = {key: row for key, row in zip(keys, told, strict=True) if key not in self._told}
        self._told |= dict(itertools.islice(new.items(), self.remember - len(self._told)))
        return told

    def _apart(self, ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> Tensor:
        """The sum of the blocks' mean squared differences."""
        for i in self.blocks:
            if ours[i].shape != theirs[i].shape:
                shapes = f"{tuple(ours[i].shape)} and {tuple(theirs[i].shape)}"
                raise ValueError(f"Distill: blocks give {shapes}; align models of one width and token number")
        return sum(F.mse_loss(ours[i].float(), theirs[i].float()) for i in self.blocks)

    @contextmanager
    def _outputs(self, model: nn.Module) -> Iterator[dict[int, Tensor]]:
        """What the aligned blocks give, filled by the forward pass inside."""
        seen: dict[int, Tensor] = {}
        hooks = [
            model.blocks[i].register_forward_hook(lambda m, inputs, y, i=i: seen.__setitem__(i, y)) for i in self.blocks
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of a search where the caller gives none: images `(B, C, H, W)`; labels are whole numbers `(B,)` or
    probabilities `(B, classes)`.

    Raises `ValueError` for a model that has several outputs in training.
    """
    output = model(images)
    if isinstance(output, (tuple, list)):
        raise ValueError(
            f"search: {type(model).__name__} gives {len(output)} outputs in training, and cross-entropy takes one; "
            "give loss=distill.Distill(teacher), or call model.set_distilled_training(False)"
        )
    return F.cross_entropy(output.float(), labels)


def need_classes(model: nn.Module, method: str) -> None:
    """Raise `ValueError` for a model made with num_classes=0, whose features would be taken for logits."""
    if getattr(model, "num_classes", None) == 0:
        surgery.need_head(model, method)


def alignment_weights(epochs: int, start: float = 0.5, floor: float = 0.01) -> list[float]:
    """ComCAT's lambda_t, t = 0 .. epochs - 1: `max(lambda_{t-1} cos(pi t / (2 E)), floor)` (its specification, 2.3).

    0.5, .4993, .4966, .4905, .4797, .4634 ... for 30 epochs. The running product is the released code's.
    """
    weights = [start]
    for t in range(1, epochs):
        weights.append(max(weights[-1] * math.cos(math.pi * t / (2 * epochs)), floor))
    return weights[:epochs]


def aligned_blocks(depth: int) -> list[int]:
    """The first two and the last two blocks, which ComCAT aligns."""
    return sorted({0, 1, depth - 2, depth - 1} & set(range(depth)))
