"""Images a second of loader, model and both: the measure knows which side was made slow."""

import copy
import random
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from leanvit import data, models, throughput
from leanvit.train import Recipe


class Slow(Dataset):
    """Images that take their time; a sleep does not depend on how busy the machine is."""

    def __init__(self, seconds: float, size: int = 64):
        self.seconds, self.size = seconds, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        time.sleep(self.seconds)
        return torch.full((3, 4, 4), i / self.size), i % 3


class Model(torch.nn.Module):
    num_classes = 3

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds, self.head = seconds, torch.nn.Linear(48, 3)

    def forward(self, x):
        time.sleep(self.seconds)
        return self.head(x.flatten(1))


RECIPE = Recipe(8, 1e-3, epochs=1)


def test_a_slow_loader_is_what_the_model_waits_for():
    rows = throughput.measure(Model(0.01), Slow(0.01), RECIPE, workers=(0, 2), steps=6)
    alone, helped = rows
    assert [row.workers for row in rows] == [0, 2]
    assert alone.waits == "they take turns, the loader is slower"
    assert helped.waits == "the model waits for the loader"
    # no machine is faster than the pauses allow; a busy one is slower, so the lower bounds are wide
    assert 25 < alone.loader_images_per_s <= 100  # 8 images in 80 ms
    assert 50 < helped.loader_images_per_s < 230  # in 40 ms; workers deliver in pairs
    assert 100 < alone.model_images_per_s == helped.model_images_per_s <= 800  # in 10 ms
    assert 22 < alone.together_images_per_s < 89  # in 90 ms: they take turns
    assert 50 < helped.together_images_per_s < 230


def test_a_slow_model_is_what_the_loader_waits_for():
    (row,) = throughput.measure(Model(0.06), Slow(0.001), RECIPE, workers=[1], steps=6)
    assert row.waits == "the loader waits for the model"
    assert row.loader_images_per_s > 1.5 * row.model_images_per_s
    assert 30 < row.model_images_per_s < 134 and 30 < row.together_images_per_s < 134  # 8 images in 60 ms


def test_real_files_leave_model_and_generators_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for k in range(6):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (60, 50, 3), dtype=np.uint8)).save(tmp_path / name / f"{k}.jpg")
    model = models.create("embedded_vit", num_classes=2)
    before = copy.deepcopy(model.state_dict())
    train_set = data.load("imagefolder", "train", root=tmp_path, transform=models.transforms(model, True))
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    recipe = Recipe(4, 1e6, epochs=3, mixup=0.2, precision="bf16", channels_last=True)  # a rate that would diverge
    rows = throughput.measure(model, train_set, recipe, workers=(0,), steps=2)
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_pre_hooks and all(p.grad is None for p in model.parameters())
    table = pd.DataFrame(rows)
    assert list(table) == "workers loader_images_per_s model_images_per_s together_images_per_s waits".split()
    assert (table.iloc[0, 1:4] > 0).all()


def test_a_set_smaller_than_the_batch():
    (row,) = throughput.measure(Model(0.0), Slow(0.0, size=3), RECIPE, workers=(0,), steps=2)
    assert row.together_images_per_s > 0 and row.waits.startswith("they take turns, the ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"steps": 0}, "steps=0 must be at least 1"), ({"workers": ()}, "workers names no number"),
     ({"workers": (-1,)}, "workers=-1")],
)  # fmt: skip
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        throughput.measure(Model(0.0), Slow(0.0), RECIPE, **arguments)


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        throughput.measure(Model(0.0), Slow(0.0, size=0), RECIPE)
