"""200 times (some methods 40) attach, load, a step of training, save, detach: nothing grows, and the weights are those
of as many steps in one piece, bit for bit.
"""

import copy
import functools
import gc

import psutil
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import leanvit
from leanvit import adapters, baselines, block_expansion, comcat, kadaptation, lbp_wht, uvc
from leanvit.surgery import head_parameters

MANY = {"kadaptation", "block_expansion"}


def vit():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def batch(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(4, 3, 16, 16, generator=generator), torch.randint(3, (4,), generator=generator)


def step(model, i):
    trained = [p for p in model.parameters() if p.requires_grad]
    images, labels = batch(i)
    loss = F.cross_entropy(model.train()(images), labels)
    with torch.no_grad():
        for p, g in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            p -= 0.01 * g
    return loss.item()


@functools.cache
def cuts():
    """Plans of both cutting methods."""
    model = vit()
    return comcat.make_plan(model, {"qk": 4, "fc1": 8, "fc2": 8}), uvc.magnitude_plan(model, 0.6, round_units=8)


# how each begins and ends, how a file is read, and whether it leaves the stock weights alone
METHODS = {
    "lbp_wht": (lambda m: lbp_wht.attach(m, "LP_L1-2", order=4), lbp_wht.detach, leanvit.load),
    "kadaptation": (lambda m: kadaptation.attach(m, n=4, seed=1), kadaptation.detach, leanvit.load),
    "block_expansion": (lambda m: block_expansion.attach(m, p=1), block_expansion.detach, leanvit.load),
    "lora": (lambda m: baselines.lora_qv(m, rank=2), baselines.detach, leanvit.load),
    "adapter": (lambda m: adapters.adapter(m, width=4), baselines.detach, leanvit.load),
    "compacter": (lambda m: adapters.compacter(m), baselines.detach, leanvit.load),
    "vera": (lambda m: baselines.vera(m, rank=4), baselines.detach, leanvit.load),
    "bitfit": (baselines.bitfit, lambda m: None, leanvit.load),
    "comcat": (lambda m: comcat.apply(m, cuts()[0]), None, leanvit.load),
    "uvc": (lambda m: uvc.apply(m, cuts()[1]), None, leanvit.load),
}  # fmt: skip


def living() -> dict[str, int]:
    """Tensors and modules that are reachable, and open files."""
    gc.collect()
    kinds = [type(o) for o in gc.get_objects()]
    return {
        "tensors": sum(issubclass(k, torch.Tensor) for k in kinds),
        "modules": sum(issubclass(k, torch.nn.Module) for k in kinds),
        "files": psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0,
    }


def hooks(model) -> int:
    kept = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return sum(len(getattr(m, k)) for m in model.modules() for k in kept)


@pytest.mark.parametrize("name", METHODS)
def test_cycles(tmp_path, name):
    cycles = 200 if name in MANY else 40
    begin, end, load = METHODS[name]
    stock, path = vit(), tmp_path / "trained.safetensors"
    torch.manual_seed(1)  # of adapters that are drawn
    whole = copy.deepcopy(stock)
    begin(whole)
    losses = [step(whole, i) for i in range(cycles)]
    expected = {n: t.clone() for n, t in whole.state_dict().items()}

    torch.manual_seed(1)
    model = copy.deepcopy(stock)
    start, shape, attributes = {n: t.clone() for n, t in model.state_dict().items()}, hooks(model), set(vars(model))
    begin_memory = counts = None
    for i in range(cycles):
        model = copy.deepcopy(stock) if end is None else model
        begin(model)
        if i:
            load(model, path)
        assert step(model, i) == losses[i], f"cycle {i}"
        assert leanvit.save(model, path) == path
        if i == cycles - 1:
            last = {n: t.clone() for n, t in model.state_dict().items()}
        if end is not None:
            end(model)
        if i == cycles // 4:
            counts, begin_memory = living(), psutil.Process().memory_info().rss
    assert last.keys() == expected.keys() and all(torch.equal(last[n], t) for n, t in expected.items())

    grown = psutil.Process().memory_info().rss - begin_memory
    assert grown < 16 * 2**20, f"{grown / 2**20:.1f} MiB more after {cycles} cycles"
    del last  # it is not there at the first count
    assert living() == counts and [p.name for p in tmp_path.iterdir()] == [path.name]
    if end is None:
        return
    assert hooks(model) == shape and set(vars(model)) == attributes
    head, after = head_parameters(model), model.state_dict()
    assert after.keys() == start.keys()
    untouched = [n for n in start if n not in head and name not in ("lbp_wht", "bitfit")]
    assert all(torch.equal(after[n], start[n]) for n in untouched)
    assert name in ("lbp_wht", "bitfit") or len(untouched) > 20
