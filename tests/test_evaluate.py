import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from leanvit import evaluate
from leanvit.evaluate import (
    METRICS,
    accuracy,
    confusion,
    fetch,
    mean_average_precision,
    mean_per_class,
    pe,
    predict,
    roc_auc,
    top1,
)

LOGITS = torch.tensor([[2.0, 1, 0], [0, 3, 1], [1, 0, 0], [0, 1, 5], [9, 0, 0]])
LABELS = torch.tensor([0, 1, 1, 2, 1])  # predicted 0 1 0 2 0


class Known(nn.Module):
    """Gives out the logits that the image's first value names, and remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(LOGITS.clone())
        self.norm = nn.BatchNorm1d(3)
        self.calls = []

    def forward(self, x):
        self.calls.append((len(x), self.training, self.norm.training, torch.is_grad_enabled()))
        return self.table[x.long()].to(torch.bfloat16)


class Batched(TensorDataset):
    name = "batched"

    def __getitems__(self, indices):
        return self.tensors[0][indices], self.tensors[1][indices]


@pytest.mark.parametrize("kind", [TensorDataset, Batched])
def test_predict_keeps_order_modes_and_gradients_off(kind):
    model, data = Known(), kind(torch.arange(5.0), LABELS)
    model.train()
    model.norm.eval()
    logits, labels = predict(model, data, batch_size=2)
    assert torch.equal(logits, LOGITS) and torch.equal(labels, LABELS) and logits.dtype == torch.float32
    assert model.calls == [(2, False, False, False), (2, False, False, False), (1, False, False, False)]
    assert model.training and not model.norm.training and not logits.requires_grad
    part, labels = predict(model, data, indices=[3, 0])
    assert torch.equal(part, LOGITS[[3, 0]]) and labels.tolist() == [2, 0]


def test_batches_fit_the_device():
    """32 on a CPU, whose caches hold no more; what the caller asks for; the same logits for any."""
    model, x = nn.Flatten(), torch.rand(70, 1, 2, 2)
    seen = []
    model.register_forward_hook(lambda m, inputs, y: seen.append(len(y)))
    images = TensorDataset(x, torch.zeros(70, dtype=torch.long))
    for asked, expected in ((None, [32, 32, 6]), (50, [50, 20])):
        seen.clear()
        torch.testing.assert_close(evaluate.predict(model, images, asked)[0], x.flatten(1))
        assert seen == expected
    assert evaluate.batch_for(torch.device("cuda")) == 256


def test_modes_return_after_an_error():
    model = Known().train()
    with pytest.raises(IndexError):
        predict(model, TensorDataset(torch.tensor([7.0]), torch.tensor([0])))
    assert model.training and model.norm.training


def test_numbers_by_hand():
    assert accuracy(Known(), TensorDataset(torch.arange(5.0), LABELS), batch_size=3) == pytest.approx(3 / 5)
    assert confusion(LOGITS, LABELS).tolist() == [[1, 0, 0], [2, 1, 0], [0, 0, 1]]
    assert mean_per_class(LOGITS, LABELS) == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert mean_per_class(LOGITS[1:3], LABELS[1:3]) == pytest.approx(1 / 2)  # classes 0 and 2 have no image here


def test_fetch_takes_pairs_and_pairs_of_batches():
    for kind in (TensorDataset, Batched):
        images, labels = fetch(kind(torch.arange(5.0), LABELS), [4, 1])
        assert images.tolist() == [4, 1] and labels.tolist() == [1, 1]


def test_bad_input():
    with pytest.raises(ValueError, match="batched has no image"):
        predict(Known(), Batched(torch.empty(0), torch.empty(0, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"got \(5, 3\) and \(4,\)"):
        confusion(LOGITS, LABELS[:4])
    with pytest.raises(ValueError, match=r"labels lie in 1..4, logits have 3"):
        confusion(LOGITS, LABELS + torch.tensor([1, 0, 0, 2, 0]))


# ---- T22: the metrics of ELEVATER ----------------------------------------------------------------------------------


def test_t22_eleven_points_by_hand():
    def ap(scores, labels):
        return mean_average_precision(torch.tensor(scores)[:, None], torch.tensor(labels)[:, None])

    assert ap([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0]) == 1  # a perfect ranking
    # precision 1 up to recall 0.5 (six points), then 2 of 3 (five points)
    assert ap([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0]) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert ap([0.1, 0.2, 0.3, 0.4], [1, 0, 0, 0]) == pytest.approx(1 / 4)
    assert ap([0.5] * 4, [1, 0, 1, 0]) == pytest.approx(1 / 2)  # equal scores enter together, in any order
    # recall 3 / 10 reaches the point 0.3 exactly
    assert ap([float(-k) for k in range(13)], [1] * 3 + [0] * 3 + [1] * 7) == pytest.approx((4 + 7 * 10 / 13) / 11)


def test_t22_map_is_the_mean_over_the_classes_with_a_positive():
    scores = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 5.0], [1.0, 3.0, 1.0]])
    labels = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert mean_average_precision(scores, labels) == pytest.approx((1 + 1 / 3) / 2)
    assert METRICS["map11"](scores.sigmoid(), labels) == METRICS["map11"](scores, labels)
    # softmax compares the classes of an image, and so can change the order of the images
    scores = torch.tensor([[2.0, 5.0], [1.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert METRICS["map11"](scores, labels) == pytest.approx((1 + 1 / 2) / 2)
    assert METRICS["map11_softmax"](scores, labels) == pytest.approx(1 / 2)


def test_t22_roc_auc_counts_pairs():
    assert roc_auc(torch.full((6,), 0.3), torch.tensor([0, 1, 1, 0, 0, 1])) == 0.5
    assert roc_auc(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0, 0, 1, 1])) == 1
    assert roc_auc(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1, 1, 0, 0])) == 0
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (60,), generator=generator).float()
    labels = torch.randint(0, 2, (60,), generator=generator)
    pairs = (scores[labels == 1][:, None] - scores[labels == 0]).sign()
    assert roc_auc(scores, labels) == pytest.approx(((pairs + 1) / 2).mean().item())
    logits = torch.stack([torch.zeros(60), scores], dim=1)
    assert METRICS["roc_auc"](logits, labels) == roc_auc(scores, labels)
    sure = torch.tensor([[0.0, 200.0], [0.0, 300.0]])  # softmax is 1 for both
    assert METRICS["roc_auc"](sure, torch.tensor([0, 1])) == 1


def test_t22_balanced_accuracy_and_names():
    logits, labels = torch.eye(3)[[0, 0, 1, 1, 1, 2]], torch.tensor([0, 0, 0, 1, 2, 2])
    assert evaluate.metric("mean_per_class")(logits, labels) == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert evaluate.metric("accuracy") is top1 and top1(logits, labels) == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match="unknown metric 'f1': known are accuracy, mean_per_class, map11"):
        evaluate.metric("f1")


# ---- T19 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "parameters", "expected"),
    [
        (0.6892, 79_699, 0.6890), (0.6632, 29_523, 0.6631), (0.6508, 1_237_587, 0.6473), (0.6279, 77_907, 0.6277),
        (0.6148, 176_979, 0.6143), (0.6549, 87_878_739, 0.4980),
    ],
)  # fmt: skip
def test_t19_pe_of_the_published_rows(score, parameters, expected):
    assert pe(score, parameters) == pytest.approx(expected, abs=1e-4)


def test_t19_pe_properties():
    assert pe(0.7, 0) == 0.7 and pe(0.7, 9e8) == pytest.approx(0.7 / math.e)
    values = [pe(0.7, parameters) for parameters in (0, 1, 10**4, 10**6, 10**8, 10**10)]
    assert values == sorted(values, reverse=True) and len(set(values)) == 6
    for wrong in ((70, 1), (float("nan"), 1), (0.5, -1), (0.5, 1, 0)):
        with pytest.raises(ValueError, match="pe: "):
            pe(*wrong)


@pytest.mark.parametrize("name", METRICS)
def test_bad_scores(name):
    several = name.startswith("map11")
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [1.0, 0.0]])
    labels = torch.tensor([[0, 1], [1, 0], [1, 1]]) if several else torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="scores are NaN"):
        METRICS[name](logits, labels)
    with pytest.raises(ValueError, match=r"\(3, 2\)|\(3,\)|are \(2,\)"):
        METRICS[name](logits.nan_to_num(), labels[:2])
    assert np.isfinite(METRICS[name](logits.nan_to_num(), labels))


def test_metrics_that_are_not_defined():
    with pytest.raises(ValueError, match="both classes are needed; got 3 images of class 1 and 0 of class 0"):
        METRICS["roc_auc"](torch.randn(3, 2), torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"two classes are needed; the logits are \(3, 4\)"):
        METRICS["roc_auc"](torch.randn(3, 4), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"labels must be 0 or 1; they lie in 0..2"):
        roc_auc(torch.randn(3), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="no class has a positive image"):
        mean_average_precision(torch.randn(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="N > 0"):
        top1(torch.empty(0, 2), torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match="mean_per_class: there is no image"):
        mean_per_class(torch.empty(0, 2), torch.empty(0, dtype=torch.long))
