"""Distillation from an uncompressed model, as a loss for `train.fit` and for searches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Distill:
    """`(1 - alpha) CE(student, labels) + alpha KD`, called as `loss(model, images, labels)`.

    KD is `tau^2 KL(softmax(teacher / tau) || softmax(student / tau))`, summed over classes and divided by the batch;
    with `per_class` also by the number of classes, as DeiT's released loss and UVC's do, which makes it C times weaker.
    `hard`: cross-entropy with the teacher's choice. A model that answers (logits, distillation logits) is taught by the
    second. The teacher sees the same images in eval mode and gets no gradient.

    Raises `ValueError` for alpha outside [0, 1], tau <= 0, or a teacher of another number of classes than the student.
    """

    def __init__(self, teacher: nn.Module, alpha: float = 0.5, tau: float = 2.0, *, hard: bool = False,
                 per_class: bool = False):  # fmt: skip
        if not 0 <= alpha <= 1:
            raise ValueError(f"Distill: alpha={alpha} must be in [0, 1]")
        if not tau > 0:
            raise ValueError(f"Distill: tau={tau} must be > 0")
        self.teacher, self.alpha, self.tau, self.hard, self.per_class = teacher, alpha, tau, hard, per_class

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        output = model(images)
        logits, taught = output if isinstance(output, tuple) else (output, output)
        value = F.cross_entropy(logits.float(), labels)
        if self.alpha == 0:
            return value
        training = self.teacher.training
        self.teacher.eval()
        try:
            with torch.no_grad():
                told = self.teacher(images)
        finally:
            self.teacher.train(training)
        if told.shape != taught.shape:
            raise ValueError(
                f"Distill: the teacher has {told.shape[-1]} classes, the model {taught.shape[-1]}; give a teacher of "
                "the same classes"
            )
        return (1 - self.alpha) * value + self.alpha * self.distance(taught.float(), told.float())

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KD of logits `(B, classes)`."""
        if self.hard:
            return F.cross_entropy(student, teacher.argmax(1))
        log_student, log_teacher = (F.log_softmax(t / self.tau, 1) for t in (student, teacher))
        total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * self.tau**2
        return total / (student.numel() if self.per_class else len(student))
