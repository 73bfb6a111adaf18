import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from leanvit.evaluate import accuracy, confusion, fetch, mean_per_class, predict

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
