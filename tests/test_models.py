"""Models: the embedded backbone, checkpoints of every kind, strictness, position grids, transforms."""

import json
import os
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from leanvit import data, evaluate, models, state
from leanvit.models import WeightsError

REAL = Path(os.environ.get("LEANVIT_REAL_DATA") or Path(__file__).parents[2] / "shared" / "real")
TINY = "vit_tiny_patch16_224"


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def tiny(**kwargs):
    """A real timm ViT, kept small: two blocks, 32 pixels."""
    return models.create(TINY, **{"img_size": 32, "depth": 2} | kwargs)


def image_batch(size=32, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_embedded_vit_is_what_the_docs_say():
    model = models.create("embedded_vit")
    assert type(model) is VisionTransformer and model.num_features == 96 and len(model.blocks) == 6
    assert sum(p.numel() for p in model.parameters()) == 683_242
    assert models.token_grid(model) == ((8, 8), 1) and model(image_batch()).shape == (2, 10)
    assert models.create("embedded_vit", num_classes=0)(image_batch()).shape == (2, 96)
    train = data.load("fashion_mnist_10k", "train").images.float() / 255
    assert models.EMBEDDED_CFG["mean"] == (round(train.mean().item(), 4),) * 3
    assert models.EMBEDDED_CFG["std"] == (round(train.std().item(), 4),) * 3


def test_committed_weights_reach_the_accuracy_in_their_header():
    model = models.create("embedded_vit", checkpoint="embedded")
    header = state.read_header(models.EMBEDDED_WEIGHTS)
    test = data.load("fashion_mnist_10k", "test", transform=models.transforms(model, False))
    accuracy = evaluate.accuracy(model, test)
    assert accuracy == pytest.approx(header["accuracy"], abs=0.002) and accuracy >= 0.88
    assert header["test_sha256"] == test.sha256 and header["recipe"]["epochs"] > 0 and "commit" in header


def test_token_grid_counts_register_tokens():
    model = models.create("vit_small_patch14_reg4_dinov2", img_size=(28, 42), depth=1)
    assert models.token_grid(model) == ((2, 3), 5)
    with pytest.raises(ValueError, match="ResNet has no patch embedding"):
        models.token_grid(timm.create_model("resnet10t"))


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(name="vit_tinny_patch16_224"), "did you mean .*vit_tiny_patch16_224"),
        (dict(name="embedded_vot"), "did you mean embedded_vit"),
        (dict(name=TINY, checkpoint="embedded"), "weights of embedded_vit"),
        (dict(name=TINY, checkpoint="a.pth", pretrained=True), "not both"),
        (dict(name="embedded_vit", pretrained=True), 'checkpoint="embedded"'),
    ],
)
def test_wrong_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words) as error:
        models.create(**kwargs)
    one_line(error)


def test_unreachable_hub_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as error:
        models.create(TINY, pretrained=True)
    assert all(w in one_line(error) for w in (TINY, "timm/vit_tiny_patch16_224", "hf download", "checkpoint="))


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "plain", "state_dict", "model", "module.", "with args"])
def test_files_of_every_kind_load_exactly(kind, tmp_path):
    model = tiny()
    weights = model.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(weights, path, {"header": json.dumps({"accuracy": 0.5})})
    elif kind == "module.":
        torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}, path)
    elif kind == "plain":
        torch.save(weights, path)
    elif kind == "with args":
        torch.save({"model": weights, "epoch": 1, "lr": 0.1}, path)
    else:
        torch.save({kind: weights}, path)
    loaded = models.create(TINY, img_size=32, depth=2, checkpoint=path)
    assert torch.equal(loaded.eval()(image_batch()), model.eval()(image_batch()))
    assert models.load_checkpoint(loaded, path) == ({"accuracy": 0.5} if kind == "safetensors" else {})


def test_half_precision_file_keeps_the_models_dtype(tmp_path):
    model = tiny()
    save_file({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    loaded = tiny(checkpoint=tmp_path / "w.safetensors")
    assert next(loaded.parameters()).dtype == torch.float32
    assert torch.allclose(loaded.head.weight, model.head.weight, atol=1e-3)


def test_strictness_lists_what_differs_and_changes_nothing(tmp_path):
    weights = tiny().state_dict()
    weights["blocks.0.attn.qkv.wight"] = weights.pop("blocks.0.attn.qkv.weight")
    save_file(weights, tmp_path / "w.safetensors")
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        models.load_checkpoint(model, tmp_path / "w.safetensors")
    text = one_line(error)
    assert "1 missing: blocks.0.attn.qkv.weight" in text and "1 unexpected: blocks.0.attn.qkv.wight" in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "other, words",
    [
        (dict(depth=3), ["missing: blocks.2.norm1.weight", "and 4 more", "2 blocks of width 192, the model 3 of"]),
        (dict(depth=1), ["12 unexpected: blocks.1.", "the model 1 of width 192"]),
        (dict(embed_dim=96), ["of another shape", "cls_token (1, 1, 192) instead of (1, 1, 96)", "of width 96"]),
        (dict(reg_tokens=4), ["missing: reg_token"]),
    ],
)
def test_another_depth_or_width_is_one_clear_error(other, words, tmp_path):
    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as error:
        tiny(checkpoint=tmp_path / "w.safetensors", **other)
    assert all(word in one_line(error) for word in words), error.value


def test_head_may_differ_only_when_asked_for(tmp_path):
    model = tiny(num_classes=7)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"head.weight \(7, 192\) instead of \(1000, 192\)"):
        models.load_checkpoint(tiny(), tmp_path / "w.safetensors")
    five = tiny(checkpoint=tmp_path / "w.safetensors", num_classes=5)
    assert five.head.weight.shape == (5, 192) and torch.equal(five.norm.weight, model.norm.weight)
    none, x = tiny(checkpoint=tmp_path / "w.safetensors", num_classes=0).eval(), image_batch()
    assert torch.equal(none(x), model.forward_head(model.eval().forward_features(x), pre_logits=True))
    same = tiny(checkpoint=tmp_path / "w.safetensors", num_classes=7)
    assert torch.equal(same.head.weight, model.head.weight)
    save_file(tiny(num_classes=0).state_dict(), tmp_path / "headless.safetensors")
    assert tiny(checkpoint=tmp_path / "headless.safetensors", num_classes=3).head.out_features == 3
    with pytest.raises(WeightsError, match="2 missing: head.weight, head.bias"):
        tiny(checkpoint=tmp_path / "headless.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_without_a_number_the_classes_are_the_files(kind, tmp_path):
    model, path = tiny(num_classes=7), tmp_path / f"seven.{kind}"
    save_file(model.state_dict(), path) if kind == "safetensors" else torch.save({"model": model.state_dict()}, path)
    seven = tiny(checkpoint=path)
    assert seven.num_classes == 7 and torch.equal(seven.head.weight, model.head.weight)
    assert tiny(checkpoint=path, num_classes=5).num_classes == 5
    embedded = models.create("embedded_vit", num_classes=3)
    save_file(embedded.state_dict(), tmp_path / "three.safetensors")
    assert models.create("embedded_vit", checkpoint=tmp_path / "three.safetensors").num_classes == 3


@pytest.mark.parametrize(
    "name, settings",
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)}),  # head.fc
        ("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)}),
        ("efficientformerv2_s0", {}),  # head and head_dist
        ("vit_small_patch14_dinov2", {"depth": 1, "img_size": 28}),  # made without a classifier
        ("vit_base_patch32_clip_224", {"depth": 1}),
    ],
)
def test_the_classes_are_the_files_whatever_the_classifier_is_called(name, settings, tmp_path):
    saved = timm.create_model(name, num_classes=7, **settings)
    save_file(saved.state_dict(), tmp_path / "seven.safetensors")
    loaded = models.create(name, checkpoint=tmp_path / "seven.safetensors", **settings)
    assert loaded.num_classes == 7
    for key, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_a_distilled_model_takes_both_heads_from_the_file(tmp_path):
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=4)
    save_file(model.state_dict(), tmp_path / "four.safetensors")
    four = models.create("deit_tiny_distilled_patch16_224", checkpoint=tmp_path / "four.safetensors", depth=1)
    assert torch.equal(four.head.weight, model.head.weight) and torch.equal(four.head_dist.bias, model.head_dist.bias)


def test_a_head_of_another_width_is_not_taken_for_one_of_more_classes(tmp_path):
    wide = timm.create_model("vit_small_patch16_224", depth=1, num_classes=7)
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match=r"head.weight \(7, 384\) instead of \(1000, 192\)|width 384"):
        models.create("vit_tiny_patch16_224", checkpoint=tmp_path / "wide.safetensors", depth=1)


def test_position_grid_is_resampled_and_said():
    model = models.create("embedded_vit", checkpoint="embedded", img_size=48)
    assert models.token_grid(model) == ((12, 12), 1)
    header = models.load_checkpoint(model, models.EMBEDDED_WEIGHTS)
    assert header["resampled"] == ["pos_embed (1, 65, 96) -> (1, 145, 96)"]
    small = models.create("embedded_vit", checkpoint="embedded")
    assert torch.equal(model.pos_embed[:, 0], small.pos_embed[:, 0])  # the class token's is no part of the grid
    corner = [p.pos_embed[0, 1] for p in (small, model)]
    assert torch.cosine_similarity(*corner, dim=0) > 0.9
    assert models.transforms(model, False)(Image.new("L", (20, 30))).shape == (3, 48, 48)


def jax_archive(model: VisionTransformer) -> dict:
    """The tensors of a ViT under the names and shapes of Google's JAX checkpoints."""
    w = {k: v.numpy() for k, v in model.state_dict().items()}
    d, heads = model.embed_dim, (model.blocks[0].attn.num_heads, -1)
    out = {"cls": w["cls_token"], "Transformer/posembed_input/pos_embedding": w["pos_embed"]}
    out["embedding/kernel"] = w["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    out["embedding/bias"] = w["patch_embed.proj.bias"]

    def norm(to, of):
        out[f"{to}/scale"], out[f"{to}/bias"] = w[f"{of}.weight"], w[f"{of}.bias"]

    def dense(to, of):
        out[f"{to}/kernel"], out[f"{to}/bias"] = w[f"{of}.weight"].T, w[f"{of}.bias"]

    norm("Transformer/encoder_norm", "norm")
    dense("head", "head")
    for i in range(len(model.blocks)):
        to, of = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        norm(f"{to}/LayerNorm_0", f"{of}.norm1")
        norm(f"{to}/LayerNorm_2", f"{of}.norm2")
        dense(f"{to}/MlpBlock_3/Dense_0", f"{of}.mlp.fc1")
        dense(f"{to}/MlpBlock_3/Dense_1", f"{of}.mlp.fc2")
        attention = f"{to}/MultiHeadDotProductAttention_1"
        kernels, biases = (np.split(w[f"{of}.attn.qkv.{p}"], 3) for p in ("weight", "bias"))
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            out[f"{attention}/{name}/kernel"] = kernel.T.reshape(d, *heads)
            out[f"{attention}/{name}/bias"] = bias.reshape(heads)
        out[f"{attention}/out/kernel"] = w[f"{of}.attn.proj.weight"].T.reshape(heads[0], d // heads[0], d)
        out[f"{attention}/out/bias"] = w[f"{of}.attn.proj.bias"]
    return out


def test_npz_of_the_jax_vits(tmp_path):
    model = tiny(num_classes=5)
    np.savez(tmp_path / "w.npz", **jax_archive(model))
    loaded = tiny(num_classes=5, checkpoint=tmp_path / "w.npz")
    assert torch.allclose(loaded.eval()(image_batch()), model.eval()(image_batch()), atol=1e-6)
    with pytest.raises(WeightsError, match="2 blocks, the model 3"):
        tiny(num_classes=5, depth=3, checkpoint=tmp_path / "w.npz")
    narrow = tiny(num_classes=5, embed_dim=96)
    before = {k: v.clone() for k, v in narrow.state_dict().items()}
    with pytest.raises(WeightsError, match="w.npz: does not fit"):
        models.load_checkpoint(narrow, tmp_path / "w.npz")
    assert all(torch.equal(v, before[k]) for k, v in narrow.state_dict().items())


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"garbage")
    (tmp_path / "a.pth").write_bytes(b"garbage")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04garbage")
    torch.save({"epoch": 1, "optimizer": "adamw"}, tmp_path / "b.pth")
    torch.save({"state_dict": {"w": torch.zeros(1)}, "args": Fraction(1, 2)}, tmp_path / "code.pth")
    model = tiny()
    for name in ("a.safetensors", "a.pth", "empty.pth", "a.npz", "b.pth", "code.pth", "absent.pth"):
        with pytest.raises(WeightsError, match=name) as error:
            models.load_checkpoint(model, tmp_path / name)
        one_line(error)
    whole = tmp_path / "whole.safetensors"
    save_file(model.state_dict(), whole)
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cannot be read"):
        models.load_checkpoint(model, whole)


def test_real_dinov2_file():
    path = REAL / "dinov2_vits14.safetensors"
    if not path.is_file():
        pytest.skip("dinov2_vits14.safetensors is not there; set LEANVIT_REAL_DATA to the folder that holds it")
    model = models.create("vit_small_patch14_dinov2", checkpoint=path, num_classes=0, img_size=56)
    assert models.token_grid(model) == ((4, 4), 1) and model(image_batch(56)).isfinite().all()
    with pytest.raises(WeightsError, match="12 blocks of width 384, the model 3 of width 384"):
        models.create("vit_small_patch14_dinov2", checkpoint=path, num_classes=0, img_size=56, depth=3)


# ---- transforms ----------------------------------------------------------------------------------------------------


def test_transforms_follow_the_models_own_configuration():
    clip = models.create("vit_base_patch32_clip_224", depth=1)
    white = models.transforms(clip, False)(Image.new("RGB", (300, 400), "white"))
    mean, std = (torch.tensor(clip.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    assert white.shape == (3, 224, 224) and torch.allclose(white, ((1 - mean) / std).expand_as(white), atol=1e-5)
    half = models.transforms(tiny(), False)(Image.new("RGB", (64, 64), "white"))
    assert half.shape == (3, 32, 32) and torch.allclose(half, torch.ones(3, 32, 32))  # this family's own are 0.5


def test_tensors_and_pil_images_give_the_same():
    model = models.create("embedded_vit")
    images = data.load("fashion_mnist_10k", "test", limit=4)
    evaluated = models.transforms(model, False)
    batch = evaluated(images.images.expand(-1, 3, -1, -1))
    for i in range(4):
        assert torch.allclose(batch[i], evaluated(images.pil(i)), atol=1e-6)
    larger = models.transforms(models.create(TINY, depth=1, img_size=64), False)
    a, b = larger(images.images.expand(-1, 3, -1, -1))[0], larger(images.pil(0))
    assert a.shape == b.shape == (3, 64, 64) and torch.equal(a, b)
    with pytest.raises(ValueError, match="float32"):
        evaluated(torch.zeros(3, 32, 32))


def test_training_transforms_are_timms_random_and_seeded():
    model = models.create("embedded_vit")
    images = data.load("fashion_mnist_10k", "train", limit=8)
    train = images.with_transform(models.transforms(model, True, hflip=0.5, re_prob=0.25))

    def draw(seed):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        return train.__getitems__(list(range(8)))[0]

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    still = images.with_transform(models.transforms(model, True, padding=0, hflip=0.0))
    plain = images.with_transform(models.transforms(model, False))
    assert torch.allclose(still.__getitems__([0, 1])[0], plain.__getitems__([0, 1])[0], atol=1e-6)
    assert "RandAugment" in repr(models.transforms(model, True, auto_augment="rand-m5-n1").pil)
    assert "RandomResizedCrop" in repr(models.transforms(tiny(img_size=64), True).pil)
    with pytest.raises(ValueError, match="did you mean padding"):
        models.transforms(model, True, pading=2)
    with pytest.raises(ValueError, match="needs train=True"):
        models.transforms(model, False, hflip=0.5)


def test_a_file_of_anything_is_named(tmp_path):
    for content in (b"junk", b"", b"\x80\x02garbage" * 9):
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="weights.pth: (cannot be read as weights|holds more than tensors)"):
            models.create("embedded_vit", checkpoint=path)
