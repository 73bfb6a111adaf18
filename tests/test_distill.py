"""Distillation as a loss: UVC's specification, T18."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from test_uvc import images, vit

from leanvit.distill import Distill


def reference(student, teacher, tau):
    """tau^2 KL(teacher || student) / B, in numpy."""
    s, t = log_softmax(student / tau, axis=1), log_softmax(teacher / tau, axis=1)
    return tau**2 * (np.exp(t) * (t - s)).sum() / len(student)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_against_numpy(tau):  # T18
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = reference(student.numpy(), teacher.numpy(), tau)
    assert Distill(None, 0.5, tau).distance(student, teacher).item() == pytest.approx(expected)
    weak = Distill(None, 0.5, tau, per_class=True).distance(student, teacher).item()
    assert weak == pytest.approx(expected / 9)
    assert Distill(None, 0.5, tau).distance(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    hard = Distill(None, 0.5, tau, hard=True).distance(student, teacher)
    torch.testing.assert_close(hard, torch.nn.functional.cross_entropy(student, teacher.argmax(1)))


def test_the_whole_loss():  # T18
    model, teacher = vit().train(), vit(seed=1, proj_drop_rate=0.5).train()
    x, labels = images(model, 4), torch.tensor([0, 1, 2, 3])
    loss = Distill(teacher, 0.3, 2.0)(model, x, labels)
    loss.backward()
    logits, told = model(x).detach().float(), teacher.eval()(x).detach().float()
    ce = torch.nn.functional.cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(0.7 * ce.item() + 0.3 * reference(logits.numpy(), told.numpy(), 2.0), rel=1e-5)
    assert all(p.grad is None for p in teacher.parameters()) and all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(Distill(teacher, 0.0)(model, x, labels), ce)
    soft = torch.nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(Distill(teacher, 0.3, 2.0)(model, x, soft), loss)
    teacher.train()
    Distill(teacher, 0.3)(model, x, labels)
    assert teacher.training


def test_a_distillation_token_is_taught():
    class Two(torch.nn.Module):
        def forward(self, x):
            return x, -x

    x, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    taught = Distill(torch.nn.Identity(), 1.0, 1.0)
    assert taught(Two(), x, labels).item() == pytest.approx(reference(-x.numpy(), x.numpy(), 1.0), rel=1e-4)


def test_a_remembered_teacher_is_asked_once_an_image():
    """The same loss and gradients; the teacher computes batches with what it has not seen, or what did not fit."""
    model, teacher = vit(), vit(seed=1)
    x, labels = images(model, 6), torch.tensor([0, 1, 2, 3, 4, 0])
    asked = []
    teacher.register_forward_hook(lambda m, inputs, y: asked.append(len(y)))

    def grads(loss, rows):
        model.zero_grad()
        value = loss(model, x[rows], labels[rows])
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in model.parameters())]

    plain, keeps = Distill(teacher, 0.5, 2.0), Distill(teacher, 0.5, 2.0, remember=4)
    for rows, computed in (([0, 1, 2], [3]), ([2, 0], []), ([1, 2, 3], [3]), ([4, 5], [2]), ([5, 0], [2])):
        expected = grads(plain, rows)
        asked.clear()
        torch.testing.assert_close(grads(keeps, rows), expected, rtol=1e-10, atol=1e-12)
        assert asked == computed, rows
    x[0, 0, 0, 0] += 1e-9  # other pixels are another image
    asked.clear()
    keeps(model, x[[0, 1]], labels[[0, 1]])
    assert asked == [2]
    teacher.float()
    with torch.autocast("cpu", torch.bfloat16):  # of another precision: neither kept nor used
        for _ in range(2):
            asked.clear()
            keeps(model.float(), x[[1, 2]].float(), labels[[1, 2]])
            assert asked == [2]


def test_bad_input():
    teacher = vit(num_classes=7)
    with pytest.raises(ValueError, match="the teacher has 7 classes, the model 5"):
        Distill(teacher, 0.5)(vit(), images(teacher), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="alpha=1.5 must be in"):
        Distill(teacher, 1.5)
    with pytest.raises(ValueError, match="tau=0 must be > 0"):
        Distill(teacher, 0.5, 0)
    with pytest.raises(ValueError, match="tau=inf must be > 0 and finite"):
        Distill(teacher, 0.5, math.inf)
    with pytest.raises(ValueError, match="alpha='half' must be in"):
        Distill(teacher, "half")
    with pytest.raises(ValueError, match="remember=-1 must be >= 0"):
        Distill(teacher, remember=-1)
    with pytest.raises(ValueError, match="remember=8 must be >= 0, and 0 with blocks"):
        Distill(teacher, blocks=[0], remember=8)


def test_models_without_classes_are_refused():
    model, teacher, labels = vit(num_classes=0), vit(seed=1, num_classes=0), torch.tensor([0, 1])
    for alpha in (0.0, 0.5):
        with pytest.raises(ValueError, match="Distill: VisionTransformer has no classifier head"):
            Distill(teacher, alpha)(model, images(model, 2), labels)
    with pytest.raises(ValueError, match="Distill: VisionTransformer has no classifier head"):
        Distill(teacher, 0.5)(vit(), images(model, 2), labels)
    loss = Distill(teacher, 0.0, blocks=[0], alignment=0.1)  # of the blocks alone
    assert loss(vit(), images(model, 2), labels).isfinite()
