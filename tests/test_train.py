import copy
import os
import random
import signal
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import VisionTransformer
from torch import nn
from torch.utils.data import Dataset

from leanvit import checkpoint, evaluate, surgery
from leanvit.images import ImageSet
from leanvit.train import CheckpointError, Recipe, TrainingDiverged, _Order, _Stream, fit, learning_rate

HERE = Path(__file__).parent


class Images(Dataset):
    """Small images with a rule to learn; `augment` draws from all three generators that transforms use."""

    name, classes, sha256 = "rule", ["dark", "bright", "mixed"], "0" * 64

    def __init__(self, size: int = 48, augment: bool = False):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(size) % 3
        self.images = torch.randn(size, 3, 8, 8, generator=generator) + self.labels[:, None, None, None] - 1
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = self.images[i]
        if self.augment:
            image = image * (0.9 + 0.2 * random.random()) + np.random.normal(0, 0.1) + 0.1 * torch.randn(image.shape)
        return image.float(), int(self.labels[i])


class Batched(Images):
    def __getitems__(self, indices):
        return self.images[indices], self.labels[indices]


def tiny(dropout: float = 0.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3, drop_rate=dropout,
        proj_drop_rate=dropout, drop_path_rate=dropout,
    )  # fmt: skip


def equal(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(t, theirs[n]) for n, t in a.state_dict().items())


LONG = Recipe(batch_size=20, lr=1e-3, steps=12, mixup=0.3, cutmix=0.5, weight_decay=0.01, clip_norm=1.0, warmup_steps=3)
SHARED = Recipe(batch_size=12, lr=1e-3, steps=6, label_smoothing=0.1)


def killed_child(folder: str) -> None:
    """Train, and die without a word in the middle of step 8."""
    calls = []

    def loss(model, images, labels):
        calls.append(1)
        value = F.cross_entropy(model(images), labels)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    fit(tiny(0.2), Images(augment=True), LONG, checkpoint_dir=folder, checkpoint_every_s=0, loss=loss, progress=False)


def distributed_child(folder: str) -> None:
    """One of two processes."""
    model = tiny()
    history = fit(model, Images(), SHARED, test_set=Images(30), checkpoint_dir=folder + "/steps", checkpoint_every_s=0)
    seen = []
    scored = {"test_set": Images(7), "metric": lambda logits, labels: seen.append((logits, labels)) or 0.5}
    fit(copy.deepcopy(model), Images(), Recipe(batch_size=12, lr=1e-9, steps=1), **scored)
    torch.save((model.state_dict(), history, seen), f"{folder}/rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """The processes that tests need, all started at once: importing torch takes seconds."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    started = {}

    def start(name, function, folder, **env):
        code = f"import torch; torch.set_num_threads(1); import test_train; test_train.{function}({str(folder)!r})"
        started[name] = (
            folder,
            subprocess.Popen([sys.executable, "-c", code], cwd=HERE, env=base | env, stderr=subprocess.PIPE, text=True),
        )

    start("killed", "killed_child", tmp_path_factory.mktemp("killed"))
    folder = tmp_path_factory.mktemp("distributed")
    for rank in "01":
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        start(rank, "distributed_child", folder, MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", **group)
    yield started
    for _, process in started.values():
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def one_thread(children):
    """Bit for bit on one CPU: the children and this process add up in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def soft_loss(model, images, labels):
    return F.cross_entropy(model(images), labels)


# ---- learning ------------------------------------------------------------------------------------------------------


def test_learns_and_reports():
    model = tiny()
    history = fit(model, Images(), Recipe(batch_size=12, lr=1e-2, epochs=5), test_set=Batched(30), progress=False)
    assert history.steps == 20 and [e["step"] for e in history.epochs] == [4, 8, 12, 16, 20]
    assert [e["epoch"] for e in history.epochs] == [1, 2, 3, 4, 5]
    assert history.epochs[-1]["loss"] < 0.5 * history.epochs[0]["loss"]
    assert history.epochs[-1]["accuracy"] > 0.9
    assert history.seconds > 0 and history.images_per_s > 0 and history.resumed_from is None


def test_equals_a_plain_loop():
    recipe = Recipe(batch_size=12, lr=1e-3, steps=5, weight_decay=0.1, label_smoothing=0.1)
    data, ours, plain = Images(), tiny(), tiny()
    fit(ours, data, recipe, progress=False)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=recipe.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    for keys in _Order(len(data), 12, 0, 5, recipe.seed):
        index = [i for _, i in keys]
        F.cross_entropy(plain(data.images[index]), data.labels[index], label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_schedule_equals_torch():
    recipe = Recipe(batch_size=1, lr=0.3, steps=50, warmup_steps=7, warmup_ratio=0.01)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=7),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50),
    ]
    for step in range(50):
        assert learning_rate(recipe, step, 50) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        for part in parts:
            part.step()
    floor = Recipe(batch_size=1, lr=0.3, steps=50, min_lr_ratio=0.1)
    assert learning_rate(floor, 50, 50) == pytest.approx(0.03)


def test_t14_warmup_cosine():
    recipe = Recipe(batch_size=1, lr=0.05, steps=10000, warmup_steps=500, schedule="warmup_cosine")
    for step, part in ((0, 0.0), (10, 0.02), (250, 0.5), (500, 1.0), (5250, 0.5), (10000, 0.0)):
        assert learning_rate(recipe, step, 10000) == pytest.approx(0.05 * part, abs=1e-12)
    floor = Recipe(batch_size=1, lr=0.05, steps=10, schedule="warmup_cosine", min_lr_ratio=0.2)
    assert learning_rate(floor, 0, 10) == 0.05 and learning_rate(floor, 10, 10) == pytest.approx(0.01)
    short = Recipe(batch_size=1, lr=0.05, steps=4, warmup_steps=8, schedule="warmup_cosine")
    assert [learning_rate(short, step, 4) for step in range(4)] == pytest.approx([0, 0.05 / 8, 0.1 / 8, 0.15 / 8])


def test_constant_schedule():
    recipe = Recipe(batch_size=1, lr=0.1, steps=9, schedule="constant")
    assert {learning_rate(recipe, step, 9) for step in range(10)} == {0.1}
    warmed = Recipe(batch_size=1, lr=0.1, steps=9, schedule="constant", warmup_steps=2, warmup_ratio=0.5)
    assert [learning_rate(warmed, step, 9) for step in range(4)] == pytest.approx([0.05, 0.075, 0.1, 0.1])


def test_sgd_equals_a_plain_loop():
    recipe = Recipe(
        batch_size=12, lr=0.05, steps=6, optimizer="sgd", momentum=0.8, weight_decay=0.01, schedule="warmup_cosine",
        warmup_steps=2,
    )  # fmt: skip
    data, ours, plain = Images(), tiny(), tiny()
    fit(ours, data, recipe, progress=False)
    momentum = [torch.zeros_like(p) for p in plain.parameters()]
    for step, keys in enumerate(_Order(len(data), 12, 0, 6, recipe.seed)):
        index = [i for _, i in keys]
        plain.zero_grad()
        F.cross_entropy(plain(data.images[index]), data.labels[index]).backward()
        with torch.no_grad():
            for p, v in zip(plain.parameters(), momentum, strict=True):
                v.mul_(0.8).add_(p.grad + 0.01 * p)
                p.sub_(learning_rate(recipe, step, 6) * v)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_parameters_never_reach_the_optimizer(monkeypatch):
    given = []
    for name in ("SGD", "AdamW"):
        make = getattr(torch.optim, name)
        monkeypatch.setattr(torch.optim, name, lambda p, make=make, **k: given.append(p) or make(p, **k))
    for kind in ("sgd", "adamw"):
        model = tiny()
        surgery.freeze(model, keep=lambda name: name.startswith("head."))
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        fit(model, Images(), Recipe(batch_size=12, lr=0.1, steps=2, optimizer=kind, weight_decay=0.5), progress=False)
        assert {id(p) for p in given.pop()} == {id(p) for p in model.head.parameters()}
        assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())


def test_t14_train_mode_at_every_step_also_after_an_evaluation():
    model, seen = tiny(0.1).eval(), []

    def loss(m, images, labels):
        seen.append(all(module.training for module in m.modules()))
        return soft_loss(m, images, labels)

    fit(model, Images(), Recipe(batch_size=24, lr=1e-3, epochs=3), test_set=Images(6), loss=loss, progress=False)
    assert seen == [True] * 6 and not model.training


def test_several_test_sets_and_a_metric():
    calls = []

    def metric(logits, labels):
        calls.append((tuple(logits.shape), labels.tolist()))
        return 0.25

    recipe, sets = Recipe(batch_size=12, lr=1e-2, epochs=2), {"val": Images(6), "test": Batched(9)}
    one, two = tiny(), tiny()
    single = fit(one, Images(), recipe, test_set=sets["test"], progress=False)
    several = fit(two, Images(), recipe, test_set=sets, progress=False)
    assert equal(one, two)
    assert [e["accuracies"]["test"] for e in several.epochs] == [e["accuracy"] for e in single.epochs]
    assert all(list(e["accuracies"]) == ["val", "test"] and "accuracy" not in e for e in several.epochs)
    history = fit(tiny(), Images(), recipe, test_set=Batched(9), metric=metric, eval_every=9, progress=False)
    assert calls == [((9, 3), [0, 1, 2] * 3)] and history.epochs[-1]["accuracy"] == 0.25


class Several(Images):
    """Each image has the class of the rule and, when bright, the last one too."""

    def __init__(self, size: int = 48):
        super().__init__(size)
        self.several = F.one_hot(self.labels, 3).float()
        self.several[:, 2] = (self.labels > 0).float()
        self.labels = self.several

    def __getitem__(self, i):
        return self.images[i], self.several[i]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_weight_that_is_a_slice_moves_as_a_copy_of_it_does(optimizer):
    """torch's fused optimisers walk through memory and would move the wrong numbers."""
    start, moved = torch.randn(10, 576, generator=torch.Generator().manual_seed(0)), []
    for copied in (False, True):
        wide = start.clone()
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        net[1].weight = nn.Parameter(wide[:3, :192].clone() if copied else wide[:3, :192])
        assert net[1].weight.is_contiguous() == copied
        nn.init.zeros_(net[1].bias)
        fit(net, Images(), Recipe(batch_size=16, lr=1e-2, steps=2, optimizer=optimizer), progress=False)
        moved.append(net[1].weight.detach().clone())
    torch.testing.assert_close(*moved)
    assert (moved[0] - start[:3, :192]).abs().amax(1).gt(1e-3).all()


def test_it_is_tested_in_batches_that_fit_the_device():
    model, seen = tiny(), []
    model.register_forward_hook(lambda m, inputs, y: None if m.training else seen.append(len(y)))
    fit(model, Images(16), Recipe(batch_size=8, lr=1e-3, steps=1), test_set=Images(48), progress=False)
    assert seen == [32, 16]


def test_labels_of_several_classes_are_trained_by_binary_cross_entropy():
    model, plain, data = tiny(), tiny(), Several()
    recipe = Recipe(batch_size=12, lr=1e-2, epochs=5, seed=1)
    fit(plain, data, recipe, loss=lambda m, x, y: F.binary_cross_entropy_with_logits(m(x), y), progress=False)
    map11 = evaluate.METRICS["map11"]
    history = fit(model, data, recipe, test_set=Several(30), metric=map11, progress=False)
    assert equal(model, plain) and history.epochs[-1]["accuracy"] > 0.9
    with pytest.raises(ValueError, match="accuracy is for one class an image; for several give metric="):
        fit(tiny(), data, recipe, test_set=data, progress=False)
    for change in ({"label_smoothing": 0.1}, {"mixup": 0.5}):
        with pytest.raises(ValueError, match="one class an image; these labels are floating-point"):
            fit(tiny(), data, Recipe(batch_size=12, lr=1e-2, epochs=1, **change), progress=False)
    data.several = torch.cat([data.several, data.several], dim=1)
    with pytest.raises(ValueError, match=r"labels are floating-point, \(12, 6\) in 0..1; several .* \(B, 3\) in 0..1"):
        fit(tiny(), data, recipe, progress=False)


def test_nan_logits_of_the_test_set_are_no_accuracy():
    class Broken(Images):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return image * (float("nan") if i == 4 else 1), label

    for metric in (None, evaluate.METRICS["mean_per_class"]):
        with pytest.raises(TrainingDiverged, match="after step 4 of 4: the logits of 1 of 6 test images are NaN"):
            recipe = Recipe(batch_size=12, lr=1e-3, epochs=1)
            fit(tiny(), Images(), recipe, test_set=Broken(6), metric=metric, progress=False)


def test_only_trainable_parameters_move_and_modes_return():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(256, 3))
    surgery.freeze(model, keep=lambda name: name.startswith("4."))
    model.train()
    model[3].eval()
    before, seen = {n: t.clone() for n, t in model.state_dict().items()}, []

    def loss(m, images, labels):
        seen.append((m[1].training, m[3].training))
        return F.cross_entropy(m(images), labels)

    fit(model, Images(), Recipe(batch_size=12, lr=1e-2, steps=2), loss=loss, norm_eval=True, progress=False)
    assert seen == [(False, True)] * 2
    assert model.training and model[1].training and not model[3].training
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"4.weight", "4.bias"}
    fit(model.eval(), Images(), Recipe(batch_size=12, lr=1e-2, steps=1), progress=False)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"]) and not model[1].training


def test_half_precision_leaves_no_trace():
    model, other = tiny(), tiny()
    types = []
    hook = model.blocks[0].mlp.fc1.register_forward_hook(lambda m, x, y: types.append(y.dtype))
    fit(model, Images(), Recipe(batch_size=12, lr=1e-3, steps=2, precision="bf16"), progress=False)
    hook.remove()
    assert types == [torch.bfloat16] * 2
    assert not {"forward", "_original_forward"} & model.__dict__.keys()
    fit(other, Images(), Recipe(batch_size=12, lr=1e-3, steps=2), progress=False)  # another precision, same process
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.head.weight, other.head.weight, rtol=0.1, atol=2e-3)


# ---- randomness ----------------------------------------------------------------------------------------------------


def test_order_is_a_stream_of_epochs():
    whole = list(_Order(10, 4, 0, 5, seed=3))
    assert [len(keys) for keys in whole] == [4] * 5
    flat = [key for keys in whole for key in keys]
    assert sorted(i for e, i in flat if e == 0) == sorted(i for e, i in flat if e == 1) == list(range(10))
    assert [i for e, i in flat if e == 0] != [i for e, i in flat if e == 1]
    assert list(_Order(10, 4, 3, 5, seed=3)) == whole[3:]
    halves = [list(_Order(10, 4, 0, 5, seed=3, rank=r, world=2)) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(keys) for keys in whole]


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    stream = _Stream(Images(augment=True), seed=5)
    together, _ = stream.__getitems__([(0, 1), (2, 7), (0, 9)])
    torch.rand(3)
    alone, _ = stream.__getitems__([(2, 7)])
    assert torch.equal(together[1], alone[0])
    for other in (_Stream(Images(augment=True), 6).__getitems__([(2, 7)]), stream.__getitems__([(3, 7)])):
        assert not torch.equal(other[0], alone)
    assert not _Stream(Images(), 0).draws and not _Stream(Batched(), 0).draws


def test_same_seed_same_numbers_with_workers_and_generators_untouched():
    models = [tiny(0.2) for _ in range(3)]
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for model, seed, workers in zip(models, (0, 0, 1), (0, 2, 0), strict=True):
        recipe = Recipe(batch_size=12, lr=1e-3, steps=3, seed=seed, workers=workers)
        fit(model, Images(augment=True), recipe, progress=False)
    assert equal(models[0], models[1]) and not equal(models[0], models[2])
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())


# ---- loading -------------------------------------------------------------------------------------------------------


class Folder(ImageSet):
    """Files on the disk; each fetch notes in a file which process made it."""

    def __init__(self, folder: Path, log: Path, size: int = 12, **how):
        for k in range(size):
            values = np.random.default_rng(k).integers(0, 255, (10, 8, 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / f"{k}.{'png' if k % 2 else 'jpg'}")
        files = [folder / f"{k}.{'png' if k % 2 else 'jpg'}" for k in range(size)]
        super().__init__("folder", Images.classes, torch.arange(size) % 3, files, "0" * 64, **how)
        self.log = log

    def __getitem__(self, i):
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return super().__getitem__(i)

    def processes(self) -> set[int]:
        return {int(line) for line in self.log.read_text().split()}


def shaken(picture: Image.Image) -> torch.Tensor:
    """A transform with the three generators that transforms use."""
    image = torch.from_numpy(np.asarray(picture.crop((0, 1, 8, 9)), np.float32)).permute(2, 0, 1) / 255
    return image * random.random() + float(np.random.normal(0, 0.1)) + 0.1 * torch.randn(image.shape)


def test_workers_load_files_to_the_same_history_and_evaluation_keeps_its_own(tmp_path):
    histories, models = [], []
    for workers in (0, 2):
        test_sets = {}
        for name in ("train", "one", "other"):
            (tmp_path / f"{name}{workers}").mkdir()
            test_sets[name] = Folder(tmp_path / f"{name}{workers}", tmp_path / f"{name}{workers}.log", transform=shaken)
        train_set = test_sets.pop("train")
        for held in test_sets.values():
            held.transform = still
        model = tiny()
        recipe = Recipe(batch_size=4, lr=1e-3, epochs=3, workers=workers)
        histories.append(fit(model, train_set, recipe, test_set=test_sets, progress=False).epochs)
        models.append(model)
        for held in test_sets.values():  # three evaluations by one process that is gone now
            found = held.processes()
            assert found == {os.getpid()} if workers == 0 else len(found) == 1 and os.getpid() not in found
            assert workers == 0 or not any(psutil.pid_exists(pid) for pid in found)
    assert histories[0] == histories[1] and len(histories[0]) == 3 and equal(*models)


def still(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture.crop((0, 1, 8, 9)), np.float32)).permute(2, 0, 1) / 255


def test_processes_that_load_are_gone_after_an_error_too(tmp_path):
    (tmp_path / "held").mkdir()
    held = Folder(tmp_path / "held", tmp_path / "log", transform=still)
    with pytest.raises(ValueError, match="stop here") as error:
        fit(tiny(), Images(), Recipe(16, 1e-3, epochs=2, workers=1), test_set=held, metric=refuse, progress=False)
    assert error.tb is not None and len(held.processes()) == 1  # the frames are still referred to
    assert not any(psutil.pid_exists(pid) for pid in held.processes())


def refuse(logits, labels):
    raise ValueError("stop here")


class Convolutional(nn.Module):
    """Two convolutions, the second by channel, a norm and a head: what channels last is for."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)  # before a norm, a bias has only rounding for a gradient
        self.norm = nn.BatchNorm2d(16)
        self.mix = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 3)
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return self.head(self.mix(self.norm(self.stem(x)).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("make", [Convolutional, lambda: tiny()])
def test_channels_last_gives_equal_results_and_the_weights_lie_as_before(make, tmp_path):
    plain, last = make(), make()
    how = {"batch_size": 16, "lr": 1e-3, "epochs": 2, "clip_norm": 1.0}
    histories = [
        fit(model, Images(), Recipe(channels_last=flag, **how), test_set=Images(24), progress=False).epochs
        for model, flag in ((plain, False), (last, True))
    ]
    for a, b in zip(*histories, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["accuracy"] == pytest.approx(b["accuracy"])
    for (name, a), b in zip(plain.state_dict().items(), last.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5) and b.stride() == a.stride(), name
    if hasattr(last, "seen"):
        assert all(last.seen) and not any(plain.seen)


def test_channels_last_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    whole, parts = Convolutional(), Convolutional()
    recipe = Recipe(16, 1e-3, steps=6, channels_last=True)
    fit(whole, Images(), recipe, progress=False)
    count = iter(range(100))

    def loss(model, images, labels):
        if next(count) == 4:
            raise RuntimeError("power cut")
        return F.cross_entropy(model(images), labels)

    with pytest.raises(RuntimeError, match="power cut"):
        fit(parts, Images(), recipe, loss=loss, checkpoint_dir=tmp_path, checkpoint_every_s=0, progress=False)
    assert all(p.is_contiguous() for p in parts.parameters())
    history = fit(parts, Images(), recipe, checkpoint_dir=tmp_path, progress=False)
    assert history.resumed_from == 4 and equal(whole, parts)


def test_every_batch_of_a_large_set_is_drawn_without_a_list_of_all():
    order = _Order(2_000_000, 8, 0, 2, seed=0)
    drawn = iter(order)
    first = next(drawn)
    assert all(type(part) is int for key in first for part in key)
    tracemalloc.start()
    next(iter(order))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # numbers as objects would take tens of MB


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_kill_9_then_resume_bit_for_bit(children):
    folder, process = children["killed"]
    _, errors = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL, errors
    assert checkpoint.newest(folder).name == "step_00000007"
    (folder / ".writing_00000008").mkdir()  # as when killed in the middle of writing
    whole, resumed = tiny(0.2), tiny(0.2, seed=9)
    arguments = {"loss": soft_loss, "progress": False, "test_set": Images(30)}
    expected = fit(whole, Images(augment=True), LONG, **arguments)
    history = fit(resumed, Images(augment=True), LONG, checkpoint_dir=folder, **arguments)
    assert history.resumed_from == 7 and equal(whole, resumed)
    assert [e["loss"] for e in history.epochs] == [e["loss"] for e in expected.epochs]
    assert history.epochs[-1] == expected.epochs[-1]
    assert not folder.exists()


def test_completed_run_is_kept_only_on_request(tmp_path):
    first, second = tiny(), tiny(seed=1)
    recipe = Recipe(batch_size=12, lr=1e-3, steps=3)
    kept = fit(first, Images(), recipe, checkpoint_dir=tmp_path / "a", keep=True, progress=False)
    again = fit(second, Images(), recipe, checkpoint_dir=tmp_path / "a", keep=True, progress=False)
    assert equal(first, second) and again.resumed_from == 3 and again.epochs == kept.epochs
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("not ours")
    for name in "bc":
        fit(tiny(), Images(), recipe, checkpoint_dir=tmp_path / name, checkpoint_every_s=0, progress=False)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["mine.txt"] and not (tmp_path / "c").exists()


def test_another_training_is_refused(tmp_path):
    recipe = Recipe(batch_size=12, lr=1e-3, steps=2)
    fit(tiny(), Images(), recipe, checkpoint_dir=tmp_path, keep=True, progress=False)
    with pytest.raises(CheckpointError, match="lr is 0.001 there and 0.01 here"):
        fit(tiny(), Images(), Recipe(batch_size=12, lr=1e-2, steps=2), checkpoint_dir=tmp_path, progress=False)
    wider = VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    with pytest.raises(CheckpointError, match=r"parameter cls_token is \[1, 1, 16\] trained there and \[1, 1, 24\]"):
        fit(wider, Images(), recipe, checkpoint_dir=tmp_path, progress=False)
    deeper = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=3)
    with pytest.raises(CheckpointError, match=r"parameter blocks.2.norm1.weight is absent there"):
        fit(deeper, Images(), recipe, checkpoint_dir=tmp_path, progress=False)
    other = Recipe(batch_size=12, lr=1e-3, steps=2, optimizer="sgd", schedule="constant")
    with pytest.raises(CheckpointError, match="optimizer is adamw there and sgd here; schedule is cosine there"):
        fit(tiny(), Images(), other, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="images is 48 there and 24 here"):
        fit(tiny(), Images(24), recipe, checkpoint_dir=tmp_path, progress=False)
    (checkpoint.newest(tmp_path) / "optimizer.bin").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="damaged"):
        fit(tiny(), Images(), recipe, checkpoint_dir=tmp_path, progress=False)


def test_nan_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    model, calls, recipe = tiny(), [], Recipe(batch_size=12, lr=1e-3, steps=6)

    def loss(m, images, labels):
        calls.append(1)
        return soft_loss(m, images, labels) * (float("nan") if len(calls) == 4 else 1.0)

    with pytest.raises(TrainingDiverged, match=r"step 4 of 6: the loss is nan.*step_00000003"):
        fit(model, Images(), recipe, loss=loss, checkpoint_dir=tmp_path, checkpoint_every_s=0, progress=False)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    history = fit(tiny(), Images(), recipe, checkpoint_dir=tmp_path, progress=False)
    assert history.resumed_from == 3


def test_poisoned_weights_are_never_saved(tmp_path):
    calls = []

    def loss(m, images, labels):  # a finite loss with a gradient that is not: sqrt at 0
        calls.append(1)
        value = soft_loss(m, images, labels)
        return value + ((m.head.weight * 0).sum().sqrt() if len(calls) == 3 else 0)

    with pytest.raises(TrainingDiverged, match=r"step 3: parameter head.weight.*step_00000002"):
        recipe = Recipe(batch_size=12, lr=1e-3, steps=6)
        fit(tiny(), Images(), recipe, loss=loss, checkpoint_dir=tmp_path, checkpoint_every_s=0, progress=False)
    assert checkpoint.newest(tmp_path).name == "step_00000002"


@pytest.mark.parametrize("change", [{}, {"optimizer": "sgd", "lr": 0.1, "schedule": "constant"}])
def test_ctrl_c_saves_then_raises(change, tmp_path):
    whole, model, calls = tiny(0.2), tiny(0.2), []
    recipe = Recipe(**{"batch_size": 12, "lr": 1e-3, "steps": 6} | change)

    def loss(m, images, labels):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return soft_loss(m, images, labels)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="step 4 of 6"):
        fit(model, Images(), recipe, loss=loss, checkpoint_dir=tmp_path, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.newest(tmp_path).name == "step_00000004"
    fit(whole, Images(), recipe, progress=False)
    assert fit(model, Images(), recipe, checkpoint_dir=tmp_path, progress=False).resumed_from == 4
    assert equal(whole, model)


def test_unwritable_folder_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    model, recipe = tiny(), Recipe(batch_size=12, lr=1e-3, steps=2)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file.deeper cannot be written"):
        fit(model, Images(), recipe, checkpoint_dir=tmp_path / "file" / "deeper", progress=False)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="0 MiB free"):
        fit(model, Images(), recipe, checkpoint_dir=tmp_path / "full", progress=False)
    assert equal(model, tiny())


def test_disk_full_in_the_middle_keeps_the_weights_and_the_last_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    model, calls, recipe = tiny(), [], Recipe(batch_size=12, lr=1e-3, steps=6)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def loss(m, images, labels):
        calls.append(1)
        if len(calls) == 4:  # no file may grow past this from here on, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        return soft_loss(m, images, labels)

    try:
        with pytest.raises(CheckpointError, match=r"step 4: the checkpoint in .* cannot be written.*step_00000003"):
            fit(model, Images(), recipe, loss=loss, checkpoint_dir=tmp_path, checkpoint_every_s=0, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]
    trained = sum(not torch.equal(p, q) for p, q in zip(model.parameters(), tiny().parameters(), strict=True))
    assert trained > 20  # the weights of step 4 are still in the model
    whole = tiny()
    fit(model, Images(), recipe, checkpoint_dir=tmp_path, progress=False)
    fit(whole, Images(), recipe, progress=False)
    assert equal(model, whole)


# ---- several processes, speed, bad input ---------------------------------------------------------------------------


def test_two_processes_average_their_gradients(children):
    folder, _ = children["0"]
    for rank in "01":
        _, errors = children[rank][1].communicate(timeout=100)
        assert children[rank][1].returncode == 0, errors
    (first, history, seen), (second, other, seen2) = (
        torch.load(folder / f"rank{r}.pt", weights_only=False) for r in "01"
    )
    alone = tiny()
    expected = fit(alone, Images(), SHARED, test_set=Images(30), progress=False)
    assert first.keys() == second.keys() == alone.state_dict().keys()
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for ours, theirs in zip(history.epochs, expected.epochs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert history.epochs == other.epochs and not (folder / "steps").exists()
    logits, labels = evaluate.predict(alone, Images(7))  # a metric is given all of them, in the set's order
    assert torch.equal(seen[0][0], seen2[0][0]) and torch.equal(seen[0][1], labels)
    torch.testing.assert_close(seen[0][0], logits, rtol=1e-3, atol=1e-4)


def test_batches_are_fetched_in_one_call():
    data, calls = Batched(), []
    data.__class__ = type("Counted", (Batched,), {"__getitem__": lambda s, i: calls.append(i)})
    fit(tiny(), data, Recipe(batch_size=12, lr=1e-3, steps=3), progress=False)
    assert calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 1}, "exactly one of epochs and steps"),
        ({"steps": None}, "exactly one of epochs and steps"),
        ({"lr": 0}, "lr=0 must be > 0"),
        ({"lr": float("nan")}, "lr=nan is not a finite number"),
        ({"lr": "1e-3"}, "lr='1e-3' is not a finite number"),
        ({"steps": 2.5}, "steps=2.5 is not a whole number"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be >= 0"),
        ({"precision": "fp8"}, "precision='fp8' is none of no, bf16, fp16"),
        ({"mixup": 0.5, "batch_size": 3}, "batch_size=3 must be even"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be below 1"),
        ({"optimizer": "lion"}, "optimizer='lion' is none of adamw, sgd"),
        ({"schedule": "step"}, "schedule='step' is none of cosine, warmup_cosine, constant"),
        ({"channels_last": 1}, "channels_last=1 must be True or False"),
        ({"momentum": 1.0}, "momentum=1.0 must be below 1"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "a constant schedule has no min_lr_ratio; got 0.1"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**({"batch_size": 4, "lr": 1e-3, "steps": 2} | change))


def test_bad_input():
    recipe = Recipe(batch_size=4, lr=1e-3, steps=2)
    frozen = tiny()
    surgery.freeze(frozen)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(frozen, Images(), recipe)
    with pytest.raises(ValueError, match="rule is empty"):
        fit(tiny(), Images(0), recipe)
    data = Images()
    data.labels = data.labels + 1
    with pytest.raises(ValueError, match=r"labels of rule lie in 1..3; the model's head has 3 classes"):
        fit(tiny(), data, recipe)
    with pytest.raises(ValueError, match="the test set val is empty"):
        fit(tiny(), Images(), recipe, test_set={"val": Images(0)})
    with pytest.raises(ValueError, match="eval_every=0"):
        fit(tiny(), Images(), recipe, eval_every=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="precision 'fp16' is not to be had on cpu"):
            fit(tiny(), Images(), Recipe(batch_size=4, lr=1e-3, steps=2, precision="fp16"))


def test_a_set_smaller_than_the_batch_is_one_batch():
    history = fit(tiny(), Images(6), Recipe(batch_size=64, lr=1e-3, epochs=2), progress=False)
    assert history.steps == 2 and [e["epoch"] for e in history.epochs] == [1, 2]


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_images_that_are_no_floats_are_refused_in_words(dtype):
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    dataset = torch.utils.data.TensorDataset(torch.ones(4, 3, 8, 8).to(dtype), torch.zeros(4, dtype=torch.long))
    with pytest.raises(TypeError, match=f"the images are {dtype}; floating-point ones are needed"):
        fit(model, dataset, Recipe(batch_size=2, lr=1e-3, steps=1), progress=False)


def test_labels_outside_the_head_are_refused_for_any_data_set():
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    dataset = torch.utils.data.TensorDataset(torch.ones(4, 3, 8, 8), torch.tensor([0, 1, 2, 7]))
    with pytest.raises(ValueError, match=r"labels lie in 0..7; the model's head has 3 classes \(0..2\)"):
        fit(model, dataset, Recipe(batch_size=4, lr=1e-3, steps=1), progress=False)
