"""Finding layers by full name, replacing, freezing, counting."""

import timm
import torch
from torch import nn

from leanvit import surgery


def test_linears_are_linear_layers_and_plain_1x1_convolutions():
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(2, 2),
            "point": nn.Conv2d(2, 2, 1),
            "strided": nn.Conv2d(2, 2, 1, stride=2),
            "padded": nn.Conv2d(2, 2, 1, padding=1),
            "grouped": nn.Conv2d(2, 2, 1, groups=2),
            "wide": nn.Conv2d(2, 2, 3),
            "norm": nn.LayerNorm(2),
        }
    )
    assert [n for n, _ in surgery.linears(model)] == ["fc", "point"]
    assert [n for n, _ in surgery.linears(model, lambda n, m: isinstance(m, nn.Conv2d))] == ["point"]


def test_replace_by_full_name_keeps_the_mode_and_returns_the_old_module():
    model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    old = model.blocks[0].mlp.fc1
    new = nn.Linear(192, 768)
    assert surgery.replace(model, "blocks.0.mlp.fc1", new) is old
    assert model.blocks[0].mlp.fc1 is new and not new.training


def test_freeze_and_count():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    surgery.freeze(model, keep=lambda name: name.startswith("blocks.1."))
    block = sum(p.numel() for p in model.blocks[1].parameters())
    assert surgery.count(model) == (block, sum(p.numel() for p in model.parameters()))
    surgery.freeze(model)
    assert surgery.count(model)[0] == 0


def test_heads_of_models_with_one_two_or_none():
    with torch.device("meta"):
        one = timm.create_model("vit_tiny_patch16_224", depth=1)
        two = timm.create_model("efficientformer_l1")
        none = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    assert surgery.head_parameters(one) == {"head.weight", "head.bias"}
    assert set(surgery.head_modules(two)) == {"head", "head_dist"}
    assert surgery.head_parameters(none) == set()


def test_a_report_reads_well():
    report = surgery.Report("LoRA", ["a"], {f"l{i}": "too narrow" for i in range(5)}, 10, 1000, ["a note"])
    assert str(report).splitlines() == [
        "LoRA: 1 layers, 10 of 1,000 parameters trained",
        "  skipped l0, l1, l2 and 2 more: too narrow",
        "  a note",
    ]
