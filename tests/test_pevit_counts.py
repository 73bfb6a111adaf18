"""The published counts, measured on attached models of the published shapes (T3 and T11 of the specifications)."""

from fractions import Fraction

import peft
import pytest
import timm
import torch

from leanvit.counts import CLIP_B16, CLIP_B32, DINO_B16, FORMULAS, expansion, pevit

KA = "KAdaptation"


@pytest.mark.parametrize("name", [CLIP_B32, CLIP_B16])
@pytest.mark.parametrize(
    ("method", "backbone", "published"),
    [
        (KA, 50_176, 79_699),
        ("Adapter", 1_208_064, 1_237_587),
        ("LoRA", 147_456, 176_979),
        ("Compacter", 48_384, 77_907),
        ("linear probing", 0, 29_523),
    ],
)
def test_published_counts_of_pevit(name, method, backbone, published):
    measured = pevit(method, name)
    assert (measured.backbone, measured.total) == (backbone, published)
    assert measured.head == Fraction("29523.15") and sum(measured.kinds.values()) == backbone
    assert FORMULAS[method](768, 12) == backbone


def test_full_fine_tuning_is_openais_tower():
    assert (pevit("full").backbone, pevit("full").total) == (87_849_216, 87_878_739)
    assert (pevit("full", CLIP_B16).backbone, pevit("full", CLIP_B16).total) == (86_192_640, 86_222_163)


def test_decomposition():
    kinds = pevit("Adapter").kinds
    assert kinds == {
        "blocks.*.mlp.adapter_norm.weight": 12 * 768,
        "blocks.*.mlp.adapter_norm.bias": 12 * 768,
        "blocks.*.mlp.adapter_down.weight": 12 * 768 * 64,
        "blocks.*.mlp.adapter_down.bias": 12 * 64,
        "blocks.*.mlp.adapter_up.weight": 12 * 64 * 768,
        "blocks.*.mlp.adapter_up.bias": 12 * 768,
    }
    rules = {f"kad_rules.{role}.kad_{factor}": 32 * 32 for role in "qv" for factor in "st"}
    own = {f"blocks.*.attn.qkv.{role}.kad_{factor}": 9_216 for role in "qv" for factor in "uv"}
    assert pevit(KA).kinds == rules | own | {"blocks.*.attn.qkv.q.kad_bias": 9_216}  # specification, 1.5
    assert pevit("LoRA").kinds == {
        f"blocks.*.attn.qkv.{role}.lora_{matrix}": 12 * 4 * 768 for role in "qv" for matrix in "AB"
    }
    kinds = pevit("Compacter").kinds
    assert kinds["blocks.*.mlp.compacter_down.left"] == 12 * 4 * 192
    assert kinds["blocks.*.mlp.compacter_down.right"] == 12 * 4 * 16
    assert not any("rule" in kind for kind in kinds)


def test_formulas_of_other_widths():
    sizes = {(192, 12): 15_616, (384, 12): 27_136, (768, 12): 50_176, (1024, 24): 126_976}
    assert {key: FORMULAS[KA](*key) for key in sizes} == sizes


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("All", 85_875_556),
        ("Linear", 76_900),
        ("Top-3", 21_340_516),
        ("Top-3 and final norm", 21_342_052),
        ("LoRA r=4", 224_356),
        ("LoRA r=8", 371_812),
        ("LoRA r=16", 666_724),
        ("Block p=1", 7_164_772),
        ("Block p=2", 14_252_644),
        ("Block p=3", 21_340_516),
        ("Block p=4", 28_428_388),
    ],
)
def test_counts_of_block_expansion(method, trained):
    measured = expansion(method)
    assert measured.total == trained and measured.head == 76_900


def test_the_published_sizes_of_lora_hold_the_head_twice():
    assert [expansion(f"LoRA r={r}").doubled_head for r in (4, 8, 16)] == [301_256, 448_712, 743_624]
    # today's PEFT keeps the second head too, but frozen: the sum of both is what 0.3.0 trained
    with torch.device("meta"):
        model = timm.create_model(DINO_B16, num_classes=100)
    peft_model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head"]))
    head = peft_model.base_model.model.head
    heads = sum(p.numel() for m in (head.original_module, head.modules_to_save) for p in m.parameters())
    assert heads == 2 * 76_900
    assert heads + sum(p.numel() for n, p in peft_model.named_parameters() if "lora_" in n) == 301_256


def test_bad_input():
    with pytest.raises(ValueError, match="unknown method 'Lora'; there are KAdaptation"):
        pevit("Lora")
