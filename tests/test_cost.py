"""Parameters, FLOPs, saved bytes and interleaved timing, each against a count made by hand."""

import time

import pytest
import timm
import torch
from torch import nn

from leanvit import cost


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10)


def test_parameters_count_shared_tensors_once_and_know_what_is_frozen():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    assert cost.parameters(model) == {"trainable": 16 + 8, "total": 16 + 8 + 2, "bytes": 4 * 26}


def test_training_flops_of_a_linear_layer():
    layer = nn.Linear(5, 7)
    x = torch.randn(3, 5)
    assert cost.training_flops(layer, x) == {"forward": 2 * 3 * 5 * 7, "backward": 2 * 3 * 5 * 7}  # no g_x: x is data
    assert cost.training_flops(layer, x.requires_grad_())["backward"] == 2 * 2 * 3 * 5 * 7
    assert layer.weight.grad is None
    assert cost.training_flops(layer.requires_grad_(False), x.detach())["backward"] == 0


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    layer = nn.Linear(16, 16)
    x = torch.randn(8, 16, requires_grad=True)
    with cost.saved(layer) as measured:
        y = layer(x)
        z = layer(x)  # the same input again: one storage
    assert measured.bytes == 8 * 16 * 4 and y.shape == z.shape
    with cost.saved(layer) as measured:
        torch.relu(layer(x))
    assert measured.bytes == 2 * 8 * 16 * 4  # the input, and relu's output


def test_saved_bytes_of_a_model_grow_with_the_batch():
    model = vit()
    one, two = (cost.saved_bytes(model, torch.randn(b, 3, 64, 64)) for b in (1, 2))
    assert 1.9 < two / one < 2.1
    model.requires_grad_(False)
    assert cost.saved_bytes(model, torch.randn(1, 3, 64, 64)) == 0


def test_interleaved_sees_which_is_slower():
    calls = []

    def nap(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    result = cost.interleaved(
        {"fast": lambda: nap("fast", 0.001), "slow": lambda: nap("slow", 0.01)}, rounds=6, warmup=1
    )
    assert calls == ["fast", "slow"] * 7
    assert result["fast"]["ratio_to_first"] == 1.0 and result["slow"]["ratio_to_first"] < 0.6
    for row in result.values():
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and 1 <= row["samples"] <= 6


def test_peak_memory_is_at_least_what_was_touched():
    before = cost.peak_memory_bytes()
    block = torch.ones(40_000_000)
    assert cost.peak_memory_bytes() >= max(before, block.nbytes)
    assert before == pytest.approx(cost.peak_memory_bytes(), abs=2**31)


@pytest.mark.parametrize(("candidates", "how"), [({}, {}), ({"a": int}, {"rounds": 0}), ({"a": int}, {"warmup": -1})])
def test_interleaved_needs_something_to_time(candidates, how):
    with pytest.raises(ValueError, match="at least one candidate and one round"):
        cost.interleaved(candidates, **how)
