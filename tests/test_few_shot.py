"""ELEVATER's protocol: sampling, split, search, selection, and the head."""

import json
import math
import random
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import VisionTransformer, create_model
from torch import nn

from leanvit import baselines, data, few_shot, models, surgery, train
from leanvit.few_shot import SearchFailed, adapt, cheap_search, recipe, sample, search, select, split, weight_decay
from leanvit.head import FewShotHead, class_embeddings, few_shot_head, language_head
from leanvit.images import DataError, ImageSet
from leanvit.models import WeightsError
from leanvit.train import History, TrainingDiverged


def pool(size: int = 60, classes: int = 3, name: str = "pool", kind: type = ImageSet) -> ImageSet:
    """Small images, brighter from class to class; every image is another one."""
    labels = torch.arange(size) % classes
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(size, 3, 8, 8, generator=generator) * 60 + 60 * labels[:, None, None, None]).to(torch.uint8)
    return kind(name, [f"c{k}" for k in range(classes)], labels, images, name)


def several(rows: list[list[int]], classes: int = 3) -> ImageSet:
    labels = torch.zeros(len(rows), classes)
    for i, present in enumerate(rows):
        labels[i, present] = 1
    return ImageSet("several", [f"c{k}" for k in range(classes)], labels, list(range(len(rows))), "")


def tiny(classes: int = 3, **settings) -> VisionTransformer:
    torch.manual_seed(0)
    kwargs = dict(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=classes)
    return VisionTransformer(**kwargs | settings)


# ---- T20: sampling and the split -----------------------------------------------------------------------------------


def test_t20_five_per_class_deterministic_in_the_order_of_pythons_random():
    whole = pool(300, 6)
    chosen = sample(whole, 5, seed=1)
    order = list(range(300))
    random.Random(1).shuffle(order)
    expected = [i for k, i in enumerate(order) if sum(j % 6 == i % 6 for j in order[:k]) < 5]
    assert torch.equal(chosen.images, whole.images[expected]) and chosen.labels.bincount().tolist() == [5] * 6
    assert torch.equal(chosen.images, sample(whole, 5, seed=1).images)
    assert not torch.equal(chosen.images, sample(whole, 5, seed=2).images)


def test_t20_the_split_is_one_to_four_first_of_each_class_and_disjoint():
    chosen = sample(pool(300, 6), 5, seed=0)
    kept, held = split(chosen)
    assert kept.labels.bincount().tolist() == [4] * 6 and held.labels.bincount().tolist() == [1] * 6
    rows = {row.numpy().tobytes() for row in kept.images}, {row.numpy().tobytes() for row in held.images}
    assert len(rows[0]) == 24 and len(rows[1]) == 6 and not rows[0] & rows[1]
    for c in range(6):
        assert torch.equal(held.images[held.labels == c][0], chosen.images[chosen.labels == c][0])
    for n, expected in ((2, 1), (6, 2), (10, 2), (11, 3)):  # ceil(n / 5)
        assert len(split(sample(pool(300, 6), n, seed=0))[1]) == 6 * expected


def test_t20_several_classes_an_image():
    rng = random.Random(3)
    rows = [rng.sample(range(4), rng.choice([0, 1, 1, 2, 3])) for _ in range(400)]
    whole = several(rows, 4)
    chosen = sample(whole, 5, seed=0)
    counts = chosen.labels.sum(0)
    assert counts.min() >= 5 and counts.max() <= 3 * 5 and (chosen.labels.sum(1) == 0).sum() <= 5
    kept, held = split(chosen)
    assert len(kept) + len(held) == len(chosen) and not set(kept.images) & set(held.images)
    assert (held.labels.sum(0) >= (counts / 5).ceil()).all() and (held.labels.sum(1) > 0).all()


@pytest.mark.parametrize(
    ("shots", "rows", "kept"),
    [
        # an image is passed over when every class of it has 2; two without a class are enough
        (2, [[0], [0], [0], [0, 1], [0, 1], [0, 1], [], [], [], [2], [2]], [0, 1, 3, 4, 6, 7, 9, 10]),
        # with 3 of class 1: kept at 6 of class 0, passed over at 8; the walk ends with the 4th of class 2
        (4, [[0, 1], [0, 1], [0, 1], [0], [0, 2], [0, 2], [0, 1], [0, 2], [0, 2], [], [2], []],
         [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]),
    ],
)  # fmt: skip
def test_several_classes_rule_by_hand(shots, rows, kept):
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    arranged = [None] * len(rows)
    for position, row in zip(order, rows, strict=True):
        arranged[position] = row
    chosen = sample(several(arranged), shots, seed=0)
    assert chosen.images == [order[k] for k in kept]


def test_fewer_images_than_shots():
    with pytest.raises(DataError, match=r"6 shots of pool: too few images of c0 \(5\), c1 \(5\)"):
        sample(pool(15), 6, seed=0)
    with pytest.raises(DataError, match=r"too few images of c2 \(1\)"):
        sample(several([[0, 1], [0, 1], [2]]), 2, seed=0)
    with pytest.raises(DataError, match="at least 1"):
        sample(pool(), 0, seed=0)
    with pytest.raises(DataError, match="c0 has only one image; at least two"):
        split(sample(pool(), 1, seed=0))


def test_labels_of_several_classes_are_zeros_and_ones():
    with pytest.raises(DataError, match=r"must be 0 or 1, \(N, 3\)"):
        ImageSet("x", ["a", "b", "c"], torch.tensor([[0, 2.0, 0]]), [None], "")
    with pytest.raises(DataError, match=r"must be 0 or 1, \(N, 2\)"):
        ImageSet("x", ["a", "b"], torch.zeros(1, 3), [None], "")


# ---- T21: the search -----------------------------------------------------------------------------------------------


def hill(target: float, calls: list):
    """A score with its top at log10(weight decay) = target and at lr 1e-3."""

    def score(lr, decay):
        calls.append((lr, decay))
        return 1 - 0.01 * abs(math.log10(decay) - target) - 0.1 * abs(math.log10(lr) + 3)

    return score


def test_t21_candidates():
    assert (weight_decay(0), weight_decay(48), weight_decay(96)) == (1e-6, 1, 1e6)
    assert few_shot.RATES == (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@pytest.mark.parametrize("k", [0, 3, 21, 48, 50, 77, 95, 96])
def test_t21_at_most_15_runs_a_rate_and_the_top_is_found(k):
    calls = []
    best = search(hill(k / 8 - 6, calls))
    assert best.lr == 1e-3 and best.weight_decay == weight_decay(k) and best.runs == len(calls) == len(set(calls))
    for lr in few_shot.RATES:
        tried = [decay for rate, decay in calls if rate == lr]
        assert tried[:7] == [weight_decay(i) for i in range(0, 97, 16)] and len(tried) <= 15


def test_t21_both_neighbours_with_their_own_decay_from_the_peak_at_the_start_of_the_span():
    calls = []
    search(hill(50 / 8 - 6, calls), rates=(1e-3,))
    indices = [round(8 * (math.log10(decay) + 6)) for _, decay in calls]
    # peak 48: 40, 56; 44, 52; 46, 50 -> 50: 49, 51
    assert indices == [0, 16, 32, 48, 64, 80, 96, 40, 56, 44, 52, 46, 50, 49, 51]


def test_t21_equals_keep_the_earlier_candidate():
    best = search(lambda lr, decay: 0.5)
    assert (best.lr, best.weight_decay) == (1e-6, 1e-6)
    assert search(lambda lr, decay: 0.0, rates=(1e-2, 1e-3)).lr == 1e-2  # a score of zero is no failure


@pytest.mark.parametrize("find", [search, cheap_search])
def test_t21_all_failed_raises_and_single_failures_do_not(find):
    def diverges(lr, decay):
        raise TrainingDiverged("step 1: the loss is nan")

    for failing in (diverges, lambda lr, decay: float("nan")):
        with pytest.raises(SearchFailed, match="runs failed"):
            find(failing)
    best = find(lambda lr, decay: diverges(lr, decay) if lr > 1e-3 else lr)
    assert best.lr == 1e-3
    with pytest.raises(KeyError):  # a mistake is not swallowed
        find(lambda lr, decay: {}["no"])


@pytest.mark.parametrize("find", [search, cheap_search])
def test_an_interrupted_search_goes_on_from_its_cache(find, tmp_path):
    whole, calls, file = [], [], tmp_path / "cache.json"
    expected = find(hill(0.25, whole))

    def interrupted(lr, decay):
        if len(calls) == 5:
            raise KeyboardInterrupt
        return hill(0.25, calls)(lr, decay)

    with pytest.raises(KeyboardInterrupt):
        find(interrupted, cache={}, on_run=lambda cache: file.write_text(json.dumps(cache)))
    assert find(hill(0.25, calls), cache=json.loads(file.read_text())) == expected
    assert calls == whole


@pytest.mark.parametrize("entry", ["0.5", True, math.nan, math.inf, [0.5]])
def test_a_cache_of_other_things_is_refused(entry):
    with pytest.raises(ValueError, match=r"the cache holds .* for lr=0.001 weight_decay=1e-06; .* remove the entry"):
        search(lambda lr, decay: 0.5, rates=(1e-3,), cache={"lr=0.001 weight_decay=1e-06": entry})


@pytest.mark.parametrize("find", [search, cheap_search])
def test_a_search_of_nothing_is_refused(find):
    with pytest.raises(ValueError, match="no learning rate"):
        find(lambda lr, decay: 0.5, rates=())
    with pytest.raises(ValueError, match="no learning rate or no weight decay"):
        cheap_search(lambda lr, decay: 0.5, decays=())


def test_cheap_search_is_eight_runs():
    calls = []
    best = cheap_search(hill(-2, calls))
    assert (best.lr, best.weight_decay, best.runs) == (1e-3, 1e-2, 8) and len(calls) == 8


# ---- training and selection ----------------------------------------------------------------------------------------


class Watched(ImageSet):
    """A set that remembers when it is read."""

    reads: list = []

    def __getitems__(self, indices):
        self.reads.append(len(indices))
        return super().__getitems__(indices)


@pytest.mark.parametrize("rule", few_shot.RULES)
def test_t20_the_test_set_is_read_after_the_sweep_alone(rule, monkeypatch):
    test_set, sets = pool(30, name="test", kind=Watched), []
    test_set.reads = []
    monkeypatch.setattr(train, "fit", lambda *a, fit=train.fit, **k: sets.append((len(a[1]), a[2])) or fit(*a, **k))

    def find(score, **kept):
        best = cheap_search(score, rates=(1e-2, 1e-1), decays=(1e-6,), **kept)
        assert test_set.reads == [] and [n for n, _ in sets] == [12, 12]
        return best

    cache = {}
    outcome = adapt(tiny, pool(), test_set, find=find, rule=rule, sweep_epochs=2, epochs=4, cache=cache)
    assert len(cache) == 2 and outcome.best.runs == 2
    images, final = sets[-1]
    assert images == (12 if rule == "val-best" else 15)
    assert (final.optimizer, final.momentum, final.schedule, final.epochs) == ("sgd", 0.9, "constant", 4)
    assert (final.lr, final.weight_decay) == (outcome.best.lr, outcome.best.weight_decay)
    assert sum(test_set.reads) == 30 * (1 if rule == "last" else 4)
    assert outcome.score == outcome.entry["accuracies"]["test"] and outcome.rule == rule
    if rule == "last":
        assert outcome.entry["epoch"] == 4


def test_adapt_tests_as_often_as_it_is_asked_to():
    how = {"find": lambda score, **kept: few_shot.Best(0.1, 1e-6, 0, 0), "epochs": 4}
    outcome = adapt(tiny, pool(), pool(30, name="test"), eval_every=2, **how)
    assert [e["epoch"] for e in outcome.history.epochs if "accuracies" in e] == [2, 4]
    assert outcome.rule == "last" and outcome.entry["epoch"] == 4
    assert select(outcome.history, "test-best")["accuracies"]["test"] >= outcome.score


def test_adapt_learns():
    outcome = adapt(tiny, pool(), pool(30, name="test"), find=lambda score, **kept: few_shot.Best(0.1, 1e-6, 0, 0))
    assert outcome.score > 0.9 and outcome.history.steps == 50
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        adapt(tiny, pool(), pool(), rule="best")
    with pytest.raises(ValueError, match="unknown metric 'f1': known are accuracy, mean_per_class"):
        adapt(tiny, pool(), pool(), metric="f1")


def test_select():
    scores = [(0.1, 0.3), (0.4, 0.5), (0.4, 0.6), (0.2, 0.6)]
    history = History([{"epoch": k, "accuracies": {"val": v, "test": t}} for k, (v, t) in enumerate(scores)])
    assert [select(history, rule)["epoch"] for rule in ("last", "val-best", "test-best")] == [3, 1, 2]
    single = History([{"epoch": k, "accuracy": t} for k, (_, t) in enumerate(scores)] + [{"epoch": 4}])
    assert [select(single, rule)["epoch"] for rule in ("last", "test-best")] == [3, 2]
    with pytest.raises(ValueError, match='needs the scores of a set named "val"'):
        select(single, "val-best")
    with pytest.raises(ValueError, match="unknown rule 'first': known are last, val-best, test-best"):
        select(single, "first")
    with pytest.raises(ValueError, match="no epoch was evaluated"):
        select(History([{"epoch": 1}]))


def test_recipe_takes_settings():
    assert recipe(1e-2, 1e-4, 10).batch_size == 64 and recipe(1e-2, 1e-4, 10, batch_size=8, workers=1).workers == 1


# ---- T18: the head -------------------------------------------------------------------------------------------------


def embeddings(classes: int = 5, width: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"c{k}": 3 * torch.randn(4, width, generator=generator) for k in range(classes)}


def test_t18_language_head_is_zero_shot_clip():
    tower = tiny(12, pre_norm=True)  # as timm's CLIP towers: the head is the projection
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))  # untrained images are all alike
    images, prompts = torch.randn(64, 3, 8, 8), embeddings()
    projected = F.normalize(tower(images), dim=1)
    text = torch.stack([F.normalize(F.normalize(p, dim=1).mean(0), dim=0) for p in prompts.values()])
    zero_shot = (projected @ text.T).argmax(1)
    weight = language_head(prompts, list(prompts))
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    head = few_shot_head(tower, 5, weight=weight, keep_projection=True)
    assert torch.equal(tower(images).argmax(1), zero_shot) and zero_shot.unique().numel() > 2
    assert not head.linear.bias.any() and torch.equal(head.linear.weight, weight)
    assert surgery.head_parameters(tower) == {"head.linear.weight", "head.linear.bias"} and tower.num_classes == 5
    assert baselines.linear_probe(tower).trainable == 13 * 5
    feature = tower.forward_head(tower.forward_features(images), pre_logits=True)
    torch.testing.assert_close(F.normalize(feature, dim=1), projected)


def test_head_counts_on_the_real_clip_shapes():
    for patch in (32, 16):
        with torch.device("meta"):
            tower = create_model(f"vit_base_patch{patch}_clip_quickgelu_224.openai")
        few_shot_head(tower, 20, keep_projection=True)
        report = baselines.linear_probe(tower)
        assert report.trainable == 513 * 20 and tower.head.linear.weight.device.type == "meta"


def test_head_replaces_a_plain_classifier_and_is_replaced():
    for model in (tiny(7), tiny(0), models.create("embedded_vit")):
        head = few_shot_head(model, 4, batch_norm=True)
        assert head.in_features == model.embed_dim
        assert model(torch.randn(6, 3, *model.patch_embed.img_size)).shape == (6, 4)
        assert few_shot_head(model, 10).in_features == model.embed_dim and model.num_classes == 10
    digits = data.load("digits", "train", limit=40, transform=models.transforms(model, False))
    baselines.linear_probe(model)
    settings = train.Recipe(batch_size=40, lr=0.1, steps=20, optimizer="sgd")
    history = train.fit(model, digits, settings, progress=False)
    assert history.epochs[-1]["loss"] < 0.9 * history.epochs[0]["loss"]


def test_batch_norm_and_the_released_freeze():
    x = torch.randn(32, 6) * 3 + 2
    plain, normed, frozen = FewShotHead(6, 2), FewShotHead(6, 2, batch_norm=True), None
    assert torch.equal(plain(x), plain.linear(x))
    torch.testing.assert_close(normed(x), normed.linear((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()))
    frozen = FewShotHead(6, 2, batch_norm=True, frozen_after=1)
    for _ in range(20):
        frozen.train(), normed.train()
        frozen(x), normed(x)
    # as in the released loops after one batch: mean 0.1 mu, variance 0.9 + 0.1 sigma^2
    torch.testing.assert_close(frozen.norm.running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(frozen.norm.running_var, 0.9 + 0.1 * x.var(0))
    torch.testing.assert_close(normed.norm.running_mean, x.mean(0), rtol=0.15, atol=0.05)
    expected = frozen.linear((x - 0.1 * x.mean(0)) / (0.9 + 0.1 * x.var(0) + 1e-5).sqrt())
    torch.testing.assert_close(frozen.train()(x), expected)
    with pytest.raises(ValueError, match="frozen_after=2 needs batch_norm"):
        FewShotHead(6, 2, frozen_after=2)


def test_bad_heads_leave_the_model_as_it_is():
    model = tiny(7)
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=r"weight is \(3, 5\); 3 classes on a feature of 16 need \(3, 16\)"):
        few_shot_head(model, 3, weight=torch.ones(3, 5))
    for wrong in (0, -1, 2.0):
        with pytest.raises(ValueError, match=f"num_classes={wrong} must be a whole number of at least 1"):
            few_shot_head(model, wrong)
    few_shot_head(other := tiny(7), 3)
    with pytest.raises(ValueError, match="keep_projection needs a linear head"):
        few_shot_head(other, 3, keep_projection=True)
    two = create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    with pytest.raises(ValueError, match="classifiers head, head_dist; one nn.Linear is needed"):
        few_shot_head(two, 3)
    with pytest.raises(ValueError, match="no classifier"):
        few_shot_head(nn.Sequential(nn.Linear(2, 2)), 3)
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in before]


def test_language_head_reads_files_and_names_what_is_wrong(tmp_path):
    prompts = embeddings()
    save_file(prompts, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{k: v.numpy() for k, v in prompts.items()})
    (tmp_path / "a.json").write_text(json.dumps({k: v.tolist() for k, v in prompts.items()}))
    names = ["c3", "c0"]
    for kind in ("safetensors", "npz", "json"):
        torch.testing.assert_close(language_head(tmp_path / f"a.{kind}", names), language_head(prompts, names))
    with pytest.raises(ValueError, match=r"a.npz has no embedding of c33, x; did you mean 'c3'"):
        language_head(tmp_path / "a.npz", ["c1", "c33", "x"])
    for wrong in (torch.full((12,), torch.nan), torch.zeros(12), torch.ones(2, 3, 4)):
        with pytest.raises(ValueError, match=r"embedding of 'c0' in the mapping is .*finite and not zero"):
            language_head(prompts | {"c0": wrong}, names)
    for wrong in ([[1.0, 2.0], [1.0]], "x", None, [torch.ones(3), torch.ones(2)]):
        with pytest.raises(ValueError, match=r"embedding of 'c0' in the mapping is no array of numbers"):
            language_head(prompts | {"c0": wrong}, names)
    with pytest.raises(ValueError, match="prompts of 'c0' in the mapping cancel each other"):
        language_head(prompts | {"c0": torch.tensor([[1.0] * 12, [-1.0] * 12])}, names)
    with pytest.raises(ValueError, match="no class is named"):
        language_head(prompts, [])
    with pytest.raises(ValueError, match=r"different widths: \[9, 12\]"):
        language_head(prompts | {"c0": torch.ones(9)}, names)
    with pytest.raises(FileNotFoundError, match="there is no file .*none.npz"):
        language_head(tmp_path / "none.npz", names)
    broken = {"cut.safetensors": b"12345678", "cut.npz": b"PK", "cut.json": b"{", "a.txt": b"", "list.json": b"[]"}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            language_head(tmp_path / name, names)


def test_class_embeddings_through_open_clip(monkeypatch):
    class Tower(nn.Module):
        def encode_text(self, tokens):
            assert not self.training
            return tokens.float()[:, :4] + 1

    def tokenize(prompts):
        return torch.tensor([[len(p), p.count("a"), p.count("dog"), p.count("cat")] for p in prompts])

    fake = types.ModuleType("open_clip")
    fake.create_model = lambda name, pretrained: Tower()
    fake.get_tokenizer = lambda name: tokenize
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    found = class_embeddings(["cat", "dog"], ["a {}", "a photo of a {}."])
    expected = F.normalize(tokenize(["a dog", "a photo of a dog."]).float() + 1, dim=1)
    torch.testing.assert_close(found["dog"], expected)
    torch.testing.assert_close(language_head(found, ["dog"])[0], F.normalize(expected.mean(0), dim=0))
    with pytest.raises(ValueError, match=r"templates with \{\}.*\['a photo'\]"):
        class_embeddings(["cat"], ["a photo"])

    def offline(name, pretrained):
        raise OSError("cannot reach the hub\nmore")

    fake.create_model = offline
    with pytest.raises(WeightsError, match=r"ViT-B-32-quickgelu with weights 'openai' here \(cannot reach the hub\)"):
        class_embeddings(["cat"], ["{}"])
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="open_clip is not installed"):
        class_embeddings(["cat"], ["{}"])
