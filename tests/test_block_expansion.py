import copy
import json
import math

import numpy as np
import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn

import leanvit
from leanvit import baselines, block_expansion, cost, lbp_wht, surgery
from leanvit.block_expansion import attach, bypass, count_formula, detach, new_index, old_index

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 5}


def noisy(model: nn.Module, seed: int = 0) -> nn.Module:
    """Noise on every tensor, so that nothing is zero by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def vit(depth: int = 12, cls=VisionTransformer, **settings) -> nn.Module:
    torch.manual_seed(0)
    return noisy(cls(**{**TINY, "depth": depth, **settings}))


def images(n: int = 2, size: int = 16, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def snapshot(model: nn.Module) -> dict:
    return {n: t.clone() for n, t in model.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def trained(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, steps: int = 3, optimizer=None, x=None) -> None:
    """A few steps on the new blocks and the head."""
    x = images(4) if x is None else x
    y = torch.arange(len(x)) % model.num_classes
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = (optimizer or (lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9)))(parameters)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()


FAMILIES = {
    "vit": lambda: vit(6),
    "layer scale, registers": lambda: vit(6, init_values=1e-5, reg_tokens=4),
    "no class token": lambda: vit(6, class_token=False, global_pool="avg"),
    "clip": lambda: vit(6, pre_norm=True, norm_layer=nn.LayerNorm, act_layer="quick_gelu"),
    "res post": lambda: vit(6, block_fn=ResPostBlock),
    "parallel scaling": lambda: vit(6, block_fn=ParallelScalingBlock),
    "parallel things": lambda: vit(6, block_fn=ParallelThingsBlock),
    "beit": lambda: vit(6, Beit, init_values=0.1, use_rel_pos_bias=True, use_abs_pos_emb=False),
    "beit, shared bias": lambda: vit(6, Beit, use_shared_rel_pos_bias=True, global_pool="token"),
    "eva-02": lambda: vit(6, Eva, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, qkv_fused=False),
    "eva, post-norm": lambda: vit(6, Eva, use_post_norm=True),
    "dinov3": lambda: vit(
        6, Eva, use_rot_pos_emb=True, rope_type="dinov3", use_abs_pos_emb=False, num_reg_tokens=4, init_values=1e-5
    ),
    "mixed rope": lambda: vit(6, Eva, use_rot_pos_emb=True, rope_type="mixed", embed_dim=16, num_heads=2),
    "relpos": lambda: vit(6, VisionTransformerRelPos, rel_pos_type="mlp"),
    "relpos, res post": lambda: vit(6, VisionTransformerRelPos, block_fn=ResPostRelPosBlock),
    "deit3": lambda: noisy(timm.create_model("deit3_small_patch16_224", **{**TINY, "depth": 6})),
    "deit distilled": lambda: noisy(timm.create_model("deit_tiny_distilled_patch16_224", **{**TINY, "depth": 6})),
    "sam": lambda: noisy(
        timm.create_model("samvit_base_patch16", **{**TINY, "depth": 6, "window_size": 0, "global_attn_indexes": ()})
    ),
    "cait": lambda: noisy(timm.create_model("cait_xxs24_224", **{**TINY, "depth": 6})),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_output_and_comes_back(family):  # T1, T8
    old = FAMILIES[family]()
    for dropout in (m for m in old.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0  # RelPosMlp has some of its own; random numbers of the copies would shift those of the others
    model, state, x = copy.deepcopy(old), snapshot(old), images()
    attach(model, p=3)
    old.requires_grad_(False)  # torch takes another kernel for a linear layer without bias whose weight learns
    assert len(model.blocks) == 9 and type(model.blocks) is type(old.blocks)
    for training in (False, True):
        with torch.no_grad():  # and for a relative position bias that needs a gradient
            assert torch.equal(model.train(training)(x), old.train(training)(x))
    train(model, 2)
    assert not torch.equal(model.eval().forward_features(x), old.eval().forward_features(x))
    with torch.no_grad(), bypass(model):
        assert torch.equal(model(x), old(x)) and equal(model.state_dict(), state)
    detach(model)
    for name, parameter in old.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    assert torch.equal(model(x), old(x)) and equal(model.state_dict(), state)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identity_at_the_start(p, dtype):  # T1
    old = vit(drop_path_rate=0.0).to(dtype)
    model, x = attached(old, p=p), images(dtype=dtype)
    for training in (False, True):
        assert torch.equal(model.train(training)(x), old.train(training)(x))
    tokens = 3 * torch.randn(2, 5, 16).to(dtype)
    for i in model.block_expansion.added:
        assert torch.equal(model.blocks[i](tokens), tokens)


def attached(old: nn.Module, *args, **settings) -> nn.Module:
    model = copy.deepcopy(old)
    attach(model, *args, **settings)
    return model


def test_identity_of_the_blocks_under_dropout_and_drop_path():  # T1
    model = attached(vit(4, drop_path_rate=0.5, proj_drop_rate=0.3, attn_drop_rate=0.3), p=2).train()
    tokens = torch.randn(64, 5, 16)
    assert type(model.blocks[5].drop_path1).__name__ == "DropPath"
    assert not torch.equal(model.blocks[4](tokens), tokens)
    for i in (2, 5):
        assert torch.equal(model.blocks[i](tokens), tokens)


def test_identity_under_compile():  # T1
    old = vit(4).eval()
    model, x = attached(old, p=2), images()
    a, b = (torch.compile(m, backend="aot_eager", fullgraph=True)(x) for m in (old, model))
    assert (a - b).abs().max() <= 1e-6 * max(1, a.abs().max())


@pytest.mark.parametrize("forgotten", ["biases", "attn.proj", "mlp.fc2", "norms"])
def test_the_identity_check_sees_what_is_not_one(forgotten, monkeypatch):  # T2
    post = forgotten == "norms"
    model = vit(4, **({"block_fn": ResPostBlock} if post else {}))
    state, flags = snapshot(model), trained(model)
    real = block_expansion._identity_copy

    def wrong(block, reset):
        new = real(block, reset)
        for name in ("attn.proj", "mlp.fc2") if forgotten == "biases" or post else (forgotten,):
            kept, there = new.get_submodule(name), block.get_submodule(name)
            with torch.no_grad():
                kept.bias.copy_(there.bias)
                if forgotten in ("attn.proj", "mlp.fc2"):
                    kept.weight.copy_(there.weight)
                if post:  # zeros in the linear layers, but not in the norms behind them
                    kept.weight.zero_(), kept.bias.zero_()
                    new.norm1.load_state_dict(block.norm1.state_dict())
        return new

    monkeypatch.setattr(block_expansion, "_identity_copy", wrong)
    with pytest.raises(ValueError, match="would change the output of VisionTransformer"):
        attach(model, p=2)
    assert equal(model.state_dict(), state) and trained(model) == flags and not hasattr(model, "block_expansion")


def test_positions_and_index_maps():  # T3
    expected = {4: [4, 9, 14], 3: [3, 7, 11, 15], 6: [6, 13], 12: [12], 2: [2, 5, 8, 11, 14, 17], 1: [*range(1, 24, 2)]}
    for depth in (12, 24, 32, 40):
        old = vit(depth, embed_dim=4, num_heads=1)
        for s in (s for s in range(1, depth + 1) if depth % s == 0):
            p, model = depth // s, attached(old, p=depth // s)
            added = model.block_expansion.added
            assert list(added) == [(j + 1) * (s + 1) - 1 for j in range(p)] and len(model.blocks) == depth + p
            assert depth != 12 or list(added) == expected[s]
            assert [new_index(model, i) for i in range(depth)] == [i + i // s for i in range(depth)]
            assert [old_index(model, new_index(model, i)) for i in range(depth)] == list(range(depth))
            assert all(old_index(model, a) is None for a in added)
            assert {new_index(model, i) for i in range(depth)} | set(added) == set(range(depth + p))
            for j, a in enumerate(added):
                source = dict(old.blocks[s * (j + 1) - 1].named_parameters())
                for name, parameter in model.blocks[a].named_parameters():
                    zero = name.startswith(("attn.proj", "mlp.fc2"))
                    assert torch.equal(parameter, torch.zeros_like(parameter) if zero else source[name])
    model = attached(vit(12), positions=[10])  # what the released p = 1 configurations do
    assert model.block_expansion.added == (11,) and new_index(model, 11) == 12 and old_index(model, 11) is None
    for positions in ([10, 3], np.array([10, 3]), range(3, 11, 7)):
        assert attached(vit(12), positions=positions).block_expansion.sources == (3, 10)
    assert attached(vit(12), p=np.int64(2)).block_expansion.sources == (5, 11)
    with pytest.raises(ValueError, match=r"block 12 is outside 0\.\.11"):
        new_index(model, 12)
    with pytest.raises(ValueError, match=r"block 13 is outside 0\.\.12"):
        old_index(model, 13)


def test_no_aliasing():  # T4
    old = vit(6)
    model = attached(old, p=3)
    pointers = [p.data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    grown = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in old.parameters())
    assert grown == 3 * (12 * 16**2 + 13 * 16)


def test_published_counts():  # T5
    published = {1: 7_164_772, 2: 14_252_644, 3: 21_340_516, 4: 28_428_388}
    for p, expected in published.items():
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224.dino", num_classes=100)
        report = attach(model, p=p)
        assert report.trainable == expected == count_formula(768, p, 100)
        assert report.total == 85_875_556 + p * 7_087_872
    widths = {192: 444_864, 384: 1_774_464, 768: 7_087_872, 1024: 12_596_224, 1280: 19_677_440}
    assert {d: count_formula(d, 1, 0) for d in widths} == widths


def test_trained_set_and_report():  # T5
    model = vit(6)
    report = attach(model, p=2)
    prefixes = ("blocks.3.", "blocks.7.")
    assert trained(model) == {n for n, _ in model.named_parameters() if n.startswith((*prefixes, "head."))}
    assert report.matched == ["blocks.3", "blocks.7"] and report.trainable == count_formula(16, 2, 5)
    assert "blocks.7 is a copy of block 5" in str(report)
    assert "LayerScale" not in str(report)
    slow = VisionTransformer(**{**TINY, "depth": 4, "init_values": 1e-5})
    assert "LayerScale of 1e-05 slows the new blocks; reset_layer_scale=True" in str(attach(slow, p=1))


@pytest.mark.parametrize("family", ["vit", "res post", "parallel scaling", "beit"])
def test_gradients_of_the_first_steps(family):  # T6
    model = FAMILIES[family]()
    attach(model, p=2)
    x, y = images(4), torch.tensor([0, 1, 2, 3])
    F.cross_entropy(model(x), y).backward()
    writes = [w + "." for w in block_expansion._writers(model.blocks[3])]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif name.startswith("head.") or name.split(".", 2)[2].startswith(tuple(writes)):
            assert parameter.grad.abs().max() > 0, name
        else:
            assert torch.count_nonzero(parameter.grad) == 0, name
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("qkv.bias"):
            key = parameter.grad[16:32].abs().max()  # the softmax does not see the keys' bias
            assert key < 1e-6 * max(1.0, max(p.grad.abs().max() for p in model.parameters() if p.requires_grad))
            assert parameter.grad[:16].abs().max() > 0 and parameter.grad[32:].abs().max() > 0
        elif parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "optimizer",
    [lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9), lambda ps: torch.optim.AdamW(ps, 1e-2, weight_decay=0.1)],
)
def test_frozen_is_frozen(optimizer):  # T7
    model = vit(6)
    model(images()).sum().backward()  # gradients of a life before
    before, out = snapshot(model), model(images())
    attach(model, p=3)
    start = snapshot(model)
    train(model, 4, optimizer=lambda _: optimizer(list(model.parameters())))  # even when given everything
    after = model.state_dict()
    for i in range(6):
        for name in model.blocks[0].state_dict():
            assert torch.equal(after[f"blocks.{new_index(model, i)}.{name}"], before[f"blocks.{i}.{name}"])
    assert all(torch.equal(after[n], t) for n, t in before.items() if not n.startswith(("blocks.", "head.")))
    for a in model.block_expansion.added:
        changed = [n for n in after if n.startswith(f"blocks.{a}.") and not torch.equal(after[n], start[n])]
        assert len(changed) == 12
    assert not torch.equal(model(images()), out)


def test_bypass_and_detach_after_training():  # T8
    old, x = vit(6).eval(), images()
    model = attached(old, p=3)
    old.blocks[2].requires_grad_(False)
    model2 = attached(old, p=3)
    train(model)
    trained_out, trained_state = model.eval()(x), snapshot(model)
    for _ in range(2):
        with bypass(model) as same:
            assert same is model and equal(model.state_dict(), old.state_dict())
            assert torch.equal(model(x), old(x)) and len(model.feature_info) == 6
        assert torch.equal(model(x), trained_out) and equal(model.state_dict(), trained_state)
    with pytest.raises(RuntimeError, match="inside"), bypass(model):
        raise RuntimeError("inside")
    assert equal(model.state_dict(), trained_state)
    with bypass(model):
        model.train()
        for action in (attach, detach, lambda m: bypass(m).__enter__(), lambda m: block_expansion.save(m, "x")):
            with pytest.raises(ValueError, match="attached already|bypassed"):
                action(model)
    assert all(m.training for m in model.modules())
    detach(model2)
    assert trained(model2) == trained(old) and equal(model2.state_dict(), old.state_dict())
    assert model2.feature_info == old.feature_info and not hasattr(model2, "block_expansion")
    for action in (detach, lambda m: new_index(m, 0), lambda m: bypass(m).__enter__()):
        with pytest.raises(ValueError, match="not attached"):
            action(model2)


def test_bypass_brings_back_the_head_of_attach():  # T8
    old, x = vit(6).eval(), images()
    model = attached(old, p=2)
    model.reset_classifier(3)
    assert "head.weight" in trained(model)
    train(model, 2)
    with bypass(model):
        assert model.num_classes == 5 and torch.equal(model.eval()(x), old(x))
        assert "head.weight" not in trained(model)
    assert model.num_classes == 3 and model(x).shape == (2, 3)
    detach(model)
    assert model.num_classes == 5 and torch.equal(model.eval()(x), old(x)) and trained(model) == trained(old)


def test_a_copy_and_a_move_keep_the_way_back():  # T8
    old, x = vit(6).eval(), images(dtype=torch.float64)
    model = attached(old, p=2)
    train(model, 2)
    model = copy.deepcopy(model).double()
    with bypass(model):
        assert torch.equal(model.eval()(x), old.double()(x))


def test_a_copy_of_the_bypassed_model_is_a_plain_one():  # T8
    old, x = vit(6).eval(), images()
    model = attached(old, p=2)
    train(model, 2)
    with bypass(model):
        plain = copy.deepcopy(model)
    for action in (detach, lambda m: new_index(m, 0)):
        with pytest.raises(ValueError, match="not attached"):
            action(plain)
    assert block_expansion.base_hash(plain) == block_expansion.base_hash(old)
    assert torch.equal(plain.eval()(x), old(x))
    attach(plain, p=3)
    assert torch.equal(plain(x), old(x)) and len(plain.blocks) == 9 and len(model.blocks) == 8


def test_a_wrapper_is_not_taken_for_its_model():  # T8
    old, x = vit(4).eval(), images()
    model = attached(old, p=2)
    train(model, 2)
    compiled = torch.compile(model.eval(), backend="eager")
    out = compiled(x)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]))
    for wrapper in (compiled, wrapped):
        with pytest.raises(ValueError, match=f"not attached to this {type(wrapper).__name__}"), bypass(wrapper):
            pass
    with bypass(model):
        assert torch.equal(compiled(x), old(x))
    assert torch.equal(compiled(x), out) and not torch.equal(out, old(x))


def test_save_and_load(tmp_path):  # T9
    base, x = vit(6).eval(), images()
    model = attached(base, p=3)
    model.reset_classifier(7)
    train(model)
    path = block_expansion.save(model, tmp_path / "delta.safetensors")
    stored = 4 * count_formula(16, 3, 7)
    assert stored < path.stat().st_size < stored + 12_000  # and the header
    fresh = copy.deepcopy(base)
    header = block_expansion.load(fresh, path)
    assert header["positions"] == [1, 3, 5] and fresh.num_classes == 7
    assert torch.equal(fresh.eval()(x), model.eval()(x)) and trained(fresh) == trained(model)
    with bypass(fresh):
        assert torch.equal(fresh(x), base(x))
    again = attached(base, p=3)  # the same blocks, attached by hand
    block_expansion.load(again, path)
    assert torch.equal(again.eval()(x), model(x))
    mixed = FAMILIES["mixed rope"]()
    expanded = attached(mixed, p=2)
    block_expansion.load(mixed, block_expansion.save(expanded, tmp_path / "mixed.safetensors"))
    assert torch.equal(mixed.eval()(x), expanded.eval()(x))


def test_a_file_for_another_base_is_refused(tmp_path):  # T9
    base = vit(6)
    model = attached(base, p=3)
    path = block_expansion.save(model, tmp_path / "delta.safetensors")
    other = noisy(copy.deepcopy(base), 5)
    headed = copy.deepcopy(base)
    headed.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5))
    wrong = {
        "depth 6; this model's is 12": vit(12),
        "width 16; this model's is 32": vit(6, embed_dim=32),
        "other base weights": other,
        r"copies blocks \[1, 3, 5\]; this model has copies of \[2, 5\]": attached(base, p=2),
        "does not fit this model": headed,
        "no flat list of blocks": timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1)),
        "has LoRA already": _with_lora(copy.deepcopy(base)),
    }
    for message, model in wrong.items():
        state, flags, modules = snapshot(model), trained(model), list(model.modules())[-1]
        with pytest.raises(ValueError, match=message):
            block_expansion.load(model, path)
        assert equal(model.state_dict(), state) and trained(model) == flags and list(model.modules())[-1] is modules
    leanvit.save(base, path := tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no block expansion"):
        block_expansion.load(base, path)
    with pytest.raises(FileNotFoundError):
        block_expansion.load(base, tmp_path / "none")
    more = attached(base, p=2)
    more.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm.weight \(of 1\) is trained but"):
        block_expansion.save(more, path)
    with pytest.raises(ValueError, match="not attached"):
        block_expansion.save(base, path)


@pytest.mark.parametrize(
    "key, value",
    [("positions", None), ("positions", [1.5]), ("depth", "6"), ("width", None), ("base", 7), ("num_classes", "x")],
)
def test_a_damaged_header_is_one_clear_error(tmp_path, key, value):
    base = vit(6)
    path = block_expansion.save(attached(base, p=3), tmp_path / "delta.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["header"]) | {key: value}
    save_file(load_file(path), path, metadata | {"header": json.dumps(header)})
    before = snapshot(base)
    with pytest.raises(ValueError, match=rf"the header of .* is damaged \({key}="):
        block_expansion.load(base, path)
    assert equal(base.state_dict(), before) and not hasattr(base, "block_expansion")


def _with_lora(model: nn.Module) -> nn.Module:
    model.blocks[0].attn.register_parameter("lora_A", nn.Parameter(torch.zeros(2)))
    return model


BAD = {
    r"p=5 does not divide the depth 12; p can be 1, 2, 3, 4, 6, 12": {"p": 5},
    "p=0 does not divide": {"p": 0},
    "p=True does not divide": {"p": True},
    r"p=3\.0 does not divide": {"p": 3.0},
    "either p or positions; got p=None": {},
    "either p or positions; got p=2": {"p": 2, "positions": [1]},
    r"12 is no block of 0\.\.11": {"positions": [3, 12]},
    r"-1 is no block of 0\.\.11": {"positions": [-1]},
    "block 3 is named twice": {"positions": [3, 7, 3]},
    "name at least one": {"positions": []},
    "positions=10 must be a list": {"positions": 10},
    "have no LayerScale": {"p": 3, "reset_layer_scale": True},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_change_nothing(message):
    model = vit(12)
    state, flags = snapshot(model), trained(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **BAD[message])
    assert equal(model.state_dict(), state) and trained(model) == flags


def test_models_that_cannot_be_expanded():
    class ByIndex(VisionTransformer):
        """Its forward goes by the index of a block, as ConViT's does."""

        def forward_features(self, x):
            x = self._pos_embed(self.patch_embed(x))
            for i, block in enumerate(self.blocks):
                x = block(x) + 0.1 * i
            return self.norm(x)

    class Beside(timm.models.vision_transformer.Block):
        def forward(self, x):
            return super().forward(x) + self.norm1(x)

    class Unknown(timm.models.vision_transformer.Block):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.attn.out, self.mlp.down = self.attn.proj, self.mlp.fc2
            del self.attn.proj, self.mlp.fc2

    expanded, broken, merged = attached(vit(12), p=2), vit(12), vit(12)
    baselines.lora(merged, rank=2)
    baselines.merge(merged)
    with torch.no_grad():
        broken.blocks[3].mlp.fc1.weight[0] = math.inf
    hiera = timm.create_model("hiera_tiny_224", embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), img_size=32)
    cases = {
        "attached already; detach": expanded,
        "features that are not finite": broken,
        "treats blocks by their index": vit(12, ByIndex),
        "writes into the residual stream beside attn.proj, mlp.fc2": vit(12, block_fn=Beside),
        "blocks.0 is a Unknown whose residual-writing layers": vit(12, block_fn=Unknown, weight_init="skip"),
        "has LoRA already": _with_lora(vit(12)),
        "LoRA was merged into blocks.0.attn.qkv": merged,
        "OptimizedModule has no flat list of blocks .* before it is wrapped": torch.compile(vit(12), backend="eager"),
        "PeftModel has no flat list of blocks": peft.get_peft_model(
            vit(12), peft.IA3Config(target_modules=["qkv"], feedforward_modules=[])
        ),
        "hierarchical networks cannot": timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1)),
        "have widths 8 to 64; hierarchical": hiera,
    }
    for message, model in cases.items():
        state, flags = snapshot(model), trained(model)
        with pytest.raises(ValueError, match=message):
            attach(model, p=2)
        now = model.state_dict()
        assert list(now) == list(state) and all(torch.equal(now[n].nan_to_num(), state[n].nan_to_num()) for n in now)
        assert trained(model) == flags


def test_layer_scale_can_start_at_one():
    old = vit(4, init_values=1e-5)
    model, x = attached(old, p=2, reset_layer_scale=True), images()
    assert torch.equal(model(x), old(x))
    for a in model.block_expansion.added:
        assert torch.equal(model.blocks[a].ls1.gamma, torch.ones(16))
    assert torch.equal(model.blocks[0].ls1.gamma, old.blocks[0].ls1.gamma)


@pytest.mark.parametrize("family", ["vit", "no class token", "beit", "eva-02", "mixed rope", "relpos", "sam"])
@torch.no_grad()
def test_maps_by_the_original_index(family):  # T15
    old, x = FAMILIES[family]().eval(), images()
    model = attached(old, positions=[1, 4, 5])
    assert [info["module"] for info in model.feature_info] == [f"blocks.{i}" for i in range(9)]
    for info in model.feature_info:
        assert model.get_submodule(info["module"]) is model.blocks[int(info["module"][7:])]
        assert {k: v for k, v in info.items() if k != "module"}.items() <= old.feature_info[0].items()
    asked = [0, 2, 5]
    before = old.forward_intermediates(x, indices=asked, intermediates_only=True)
    after = model.forward_intermediates(x, indices=[new_index(model, i) for i in asked], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if hasattr(old, "get_intermediate_layers"):
        before = old.get_intermediate_layers(x, asked)
        after = model.get_intermediate_layers(x, [new_index(model, i) for i in asked])
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    seen = {}
    for m, name in ((old, "blocks.2"), (model, f"blocks.{new_index(model, 2)}")):
        m.get_submodule(name).register_forward_hook(lambda _, __, out, m=m: seen.update({id(m): out}))
        m(x)
    assert torch.equal(seen[id(old)], seen[id(model)])


def test_no_graph_below_the_lowest_new_block():
    model = attached(vit(12), positions=[7])
    graph = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: graph.update({i: out.requires_grad}))
    model(images())
    assert [graph[i] for i in range(13)] == [False] * 8 + [True] * 5


def test_saved_bytes():
    """The goals for 12 blocks: p = 3 saves at most 0.70 of full fine-tuning's bytes, p = 1 on top at most 0.12."""
    base = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, num_heads=2, depth=12, num_classes=5)
    x = images(4, 32)
    full = cost.saved_bytes(base, x)
    assert cost.saved_bytes(attached(base, p=3), x) <= 0.70 * full
    assert cost.saved_bytes(attached(base, p=1), x) <= 0.12 * full


def test_together_with_lbp_wht():
    model, x = vit(4, img_size=32, patch_size=2, embed_dim=32), images(2, 32)
    attach(model, p=2)
    before = trained(model)
    lbp_wht.attach(model, "LP_L1-2", scope=None, exact_when="never")
    assert trained(model) == before
    train(model, 2, x=x)
    lbp_wht.detach(model)
    out = model.eval()(x)
    assert out.isfinite().all() and surgery.count(model)[0] == count_formula(32, 2, 5)
