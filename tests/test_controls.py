"""The controls: at the budget and not above it, still models, each with its own choice."""

import copy
import warnings

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from leanvit import comcat, controls, models, surgery, uvc
from leanvit.uvc_plan import BlockPlan, Plan, dense_macs, read_shapes, whole_plan


def small(depth=4, **kwargs):
    torch.manual_seed(0)
    settings = dict(img_size=16, patch_size=4, embed_dim=32, depth=depth, num_heads=4, num_classes=5)
    net = timm.models.vision_transformer.VisionTransformer(**settings | kwargs)
    net.pretrained_cfg = {"input_size": (3, 16, 16)}
    return net.eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6) % 5) for _ in range(2)]


def widths(net):
    blocks = [(b.attn.num_heads, b.mlp.fc1.out_features) for b in net.blocks]
    return net.embed_dim, blocks


@pytest.mark.parametrize("kind", controls.KINDS)
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_at_the_budget(kind, budget):
    net = small()
    before = copy.deepcopy(net.state_dict())
    cut = controls.cut(net, kind, budget, batches=batches() if kind.startswith("iso") else None)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert cut(torch.zeros(1, 3, 16, 16)).shape == (1, 5)
    left = counter.get_total_flops() / 2 - 5 * cut.embed_dim
    shapes = read_shapes(net)
    group = 2 * shapes.tokens * shapes.width * 16  # sixteen hidden units
    if not kind.startswith("iso"):  # which know no group smaller than sixteen units or a head
        group = max(group, shapes.tokens * shapes.width * 8 * 4 + 2 * shapes.tokens**2 * 8)
    assert budget * dense_macs(shapes) - group < left <= budget * dense_macs(shapes)
    assert left == controls.macs(cut) == dense_macs(read_shapes(cut))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert surgery.count(cut)[1] < surgery.count(net)[1]


def test_isomorphic_takes_all_kinds_and_narrow_leaves_the_stream():
    net = small()
    width, blocks = widths(controls.isomorphic(net, 0.5))
    assert width < 32 and sum(h for h, _ in blocks) < 16 and sum(u for _, u in blocks) < 4 * 128
    width, blocks = widths(controls.isomorphic(net, 0.5, residual=False))
    assert width == 32 and sum(h for h, _ in blocks) < 16 and sum(u for _, u in blocks) < 4 * 128


def test_what_is_unused_goes_first():
    """Half of the hidden units do nothing: with them alone gone, the outputs stay."""
    net = small()
    with torch.no_grad():
        for block in net.blocks:
            for tensor in (block.mlp.fc2.weight.T, block.mlp.fc1.weight, block.mlp.fc1.bias):
                tensor[1::2] = 0
    images = torch.randn(2, 3, 16, 16)
    for gradients in (None, controls._gradients(net, batches(), controls.cross_entropy)):
        cut = controls._pruned(net, 0.0, 0.5, gradients, True)
        assert [b.mlp.fc1.out_features for b in cut.blocks] == [64] * 4
        with torch.no_grad():
            torch.testing.assert_close(cut(images), net(images))


def test_taylor_needs_the_loss_and_magnitude_does_not():
    net, other = small(), batches()
    other = [(-images, (labels + 1) % 5) for images, labels in other]
    states = [controls.isomorphic(net, 0.5, batches=b).state_dict() for b in (batches(), other, None)]

    def same(a, b):
        return all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)

    assert not same(states[0], states[1]) and not same(states[0], states[2])
    assert same(states[0], controls.isomorphic(net, 0.5, batches=batches()).state_dict())


def test_seed_of_random():
    net = small()
    a, b, c = (controls.cut(net, "random", 0.5, seed=s) for s in (0, 0, 1))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(a(images), b(images)) and not torch.equal(a(images), c(images))


def test_trains_and_keeps_what_was_frozen():
    net = small(init_values=0.1).train()
    surgery.freeze(net, lambda name: name.startswith(("head", "blocks.3")))
    cut = controls.isomorphic(net, 0.6, batches=batches())
    assert cut.training and net.training
    learning = {n for n, p in cut.named_parameters() if p.requires_grad}
    assert learning == {n for n, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is None for m in (cut, net) for p in m.parameters())
    cut(torch.randn(3, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for n, p in cut.named_parameters() if n in learning)
    with torch.no_grad():  # a fresh head fits the narrower stream
        cut.reset_classifier(7)
        assert cut(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def test_embedded_backbone_and_a_distilled_one():
    net = models.create("embedded_vit", checkpoint="embedded")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0.395 < controls.macs(controls.isomorphic(net, 0.4)) / controls.macs(net) <= 0.4
    distilled = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, depth=2, num_classes=4, pretrained=False
    ).eval()
    cut = controls.isomorphic(distilled, 0.5)
    assert cut.head_dist.out_features == 4 and cut.embed_dim < 192
    assert 0.48 < controls.macs(cut) / controls.macs(distilled) <= 0.5


def test_bad_input():
    net = small()
    with pytest.raises(ValueError, match="'tome' is none of random, magnitude"):
        controls.cut(net, "tome", 0.5)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        controls.isomorphic(net, 1.5)
    with pytest.raises(ValueError, match=r"budget=0.001 cannot be met: .* one group of each kind, 0\.0\d\d\d") as e:
        controls.isomorphic(net, 0.001)
    least = float(str(e.value).rsplit(" ", 1)[1]) + 5e-5  # rounded
    assert 0.001 < controls.macs(controls.isomorphic(net, least)) / controls.macs(net) <= least
    with pytest.raises(ValueError, match="there are no batches"):
        controls.isomorphic(net, 0.5, batches=[])
    with pytest.raises(ValueError, match="no flat list of blocks"):
        controls.isomorphic(timm.create_model("resnet18"), 0.5)
    assert widths(controls.isomorphic(net, 1.0)) == widths(net)


@pytest.mark.parametrize("kind", ["isomorphic", "isomorphic_narrow"])
def test_models_that_the_library_cannot_cut(kind):
    """Torch-Pruning would fall over their attentions; the other controls take them."""
    ragged = small()
    shapes = read_shapes(ragged)
    blocks = list(whole_plan(shapes).blocks)
    blocks[1] = BlockPlan((0, 2), ((1, 3), (0, 1, 5)), blocks[1].units)
    uvc.apply(ragged, Plan(shapes, tuple(blocks)))
    factored = small()
    comcat.apply(factored, comcat.make_plan(factored, {"blocks.2.attn.qk": 2}))
    cases = {
        "blocks.0 normalises queries and keys": small(qk_norm=True),
        "blocks.1.attn is SlicedAttention": ragged,
        "blocks.2.attn is FactoredAttention": factored,
        "pools by an attention of its own": small(global_pool="map"),
    }
    for message, net in cases.items():
        with pytest.raises(ValueError, match=f"isomorphic: .*{message}"):
            controls.cut(net, kind, 0.5)
        if "SlicedAttention" not in message:
            assert 0.4 < controls.macs(controls.cut(net, "magnitude", 0.5)) / controls.macs(net) <= 0.5


def test_macs_do_not_disturb():
    """Attention pooling has few queries, which torch's counter does not bear under no_grad."""
    for net in (small(global_pool="map"), small().train()):
        net.blocks[0].requires_grad_(False)
        net.head.weight.grad = torch.ones_like(net.head.weight)
        learning, training = [p.requires_grad for p in net.parameters()], net.training
        images = torch.zeros(1, 3, 16, 16)
        with FlopCounterMode(display=False) as counter:
            copy.deepcopy(net).requires_grad_(False)(images)
        assert controls.macs(net) == counter.get_total_flops() // 2 - 32 * 5
        assert [p.requires_grad for p in net.parameters()] == learning and net.training == training
        assert torch.equal(net.head.weight.grad, torch.ones(5, 32))


def test_every_block_keeps_a_head_and_a_unit():
    """Torch-Pruning alone, refused the last head of a block, would leave that block whole."""
    for gradients in (None, controls._gradients(small(), batches(), controls.cross_entropy)):
        width, blocks = widths(controls._pruned(small(), 0.99, 0.999, gradients, True))
        assert width == 1 and blocks == [(1, 1)] * 4
