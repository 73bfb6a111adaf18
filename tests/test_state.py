import copy

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from leanvit import baselines
from leanvit.state import changed_names, load, read_header, save


def vit(**kwargs):
    torch.manual_seed(0)
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(**settings | kwargs)


def trained(model):
    """`model` with other values where it may be trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    return model


def outputs(model):
    return model.eval()(torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8))


def test_stores_what_was_trained_and_the_head(tmp_path):
    model = vit()
    baselines.lora(model, rank=2)
    trained(model)
    path = save(model, tmp_path / "new" / "a.safetensors", header={"accuracy": 0.5, "recipe": {"lr": 1e-3}})
    with safe_open(path, "pt") as f:
        stored = set(f.keys())
    layers = [f"blocks.{i}.attn.{n}.lora_{m}" for i in (0, 1) for n in ("qkv", "proj") for m in "AB"]
    assert stored == {*layers, "head.weight", "head.bias"} == set(changed_names(model))
    fresh = vit()
    baselines.lora(fresh, rank=2)
    assert load(fresh, path) == read_header(path) == {"accuracy": 0.5, "recipe": {"lr": 1e-3}}
    assert torch.equal(outputs(fresh), outputs(model))


def test_head_is_stored_even_when_frozen_and_buffers_follow(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 3))
    model.get_classifier = lambda: model[3]
    for p in model.parameters():
        p.requires_grad_(False)
    assert changed_names(model) == [
        "1.running_mean", "1.running_var", "1.num_batches_tracked", "3.weight", "3.bias"
    ]  # fmt: skip
    model(torch.randn(4, 3, 8, 8))
    fresh = copy.deepcopy(model)
    fresh[1].reset_running_stats()
    load(fresh, save(model, tmp_path / "bn.safetensors"))
    assert torch.equal(fresh[1].running_mean, model[1].running_mean) and fresh[1].num_batches_tracked == 1


def test_frozen_state_does_not_matter_when_loading(tmp_path):
    model = vit()
    baselines.linear_probe(model)
    path = save(trained(model), tmp_path / "probe.safetensors")
    assert path.stat().st_size < 4000
    plain = vit()
    load(plain, path)
    assert torch.equal(outputs(plain), outputs(model))


def test_strict_and_all_or_nothing(tmp_path):
    model = vit()
    baselines.lora(model, rank=2)
    path = save(trained(model), tmp_path / "a.safetensors")
    plain = vit()
    with pytest.raises(ValueError, match=r"8 missing, 16 unexpected.*\n  unexpected in the file: .*lora_A"):
        load(plain, path)
    wider = vit()
    baselines.lora(wider, rank=3)
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(ValueError, match=r"shape of blocks.0.attn.qkv.lora_A: \(2, 16\) in the file, \(3, 16\) in the"):
        load(wider, path)
    assert all(torch.equal(t, before[n]) for n, t in wider.state_dict().items())
    deeper = vit(depth=3)
    baselines.lora(deeper, rank=2)
    with pytest.raises(ValueError, match=r"missing in the file: blocks.2.norm1.weight \(16,\)"):
        load(deeper, path)
    shallow = vit(depth=1)
    baselines.lora(shallow, rank=2)
    with pytest.raises(ValueError, match=r"not in this model: blocks.1.norm1.weight"):
        load(shallow, path)
    other_head = vit(num_classes=5)
    baselines.lora(other_head, rank=2)
    with pytest.raises(ValueError, match=r"shape of head.weight: \(3, 16\) in the file, \(5, 16\) in the model"):
        load(other_head, path)
    frozen_base_differs = vit(mlp_ratio=2)
    baselines.lora(frozen_base_differs, rank=2)
    with pytest.raises(ValueError, match=r"shape of blocks.0.mlp.fc1.weight: \(64, 16\) in the file, \(32, 16\)"):
        load(frozen_base_differs, path)


def test_explicit_names_tied_weights_and_dtypes(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model.b.weight = model.a.weight
    load(copy.deepcopy(model), save(model, tmp_path / "tied.safetensors"))
    path = save(model, tmp_path / "one.safetensors", names=["b.bias"])
    half = copy.deepcopy(model).to(torch.bfloat16)
    load(half, path)
    assert half.b.bias.dtype == torch.bfloat16
    torch.testing.assert_close(half.b.bias, model.b.bias.to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"no tensor 'b.bais' \(did you mean b.bias\?\)"):
        save(model, path, names=["b.bais"])


def test_unwritable_and_damaged_files(tmp_path):
    model = vit()
    path = save(model, tmp_path / "a.safetensors", header={"n": 1})
    with pytest.raises(TypeError, match="header is not JSON"):
        save(model, path, header={"n": model})
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match=r"a.safetensors cannot be written"):
            save(model, path, header={"n": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_header(path) == {"n": 1} and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(OSError, match="cannot be written"):
        save(model, path / "below_a_file.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        load(model, tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load(model, path)


def test_a_plain_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"head.bias": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="not written by leanvit.save"):
        load(vit(), tmp_path / "plain.safetensors")
