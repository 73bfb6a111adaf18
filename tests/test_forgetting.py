import copy
import math

import numpy as np
import peft
import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from leanvit import baselines, block_expansion, forgetting, surgery, train
from leanvit.evaluate import accuracy
from leanvit.forgetting import cka, drift, features, knn, knn_accuracy, measure
from leanvit.images import ImageSet

# ---- k-NN -----------------------------------------------------------------------------------------------------------


def cloud(n: int, d: int = 12, classes: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around class centres, so near that neighbours disagree."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.5 * torch.randn(n, d, generator=generator), labels


def brute_force(bank, labels, queries, k: int, temperature: float) -> list[int]:
    predicted = []
    for query in queries.double():
        cosines = []
        for key in bank.double():
            cosines.append(float(query @ key) / math.sqrt(float(query @ query) * float(key @ key)))
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        scores = {}
        for i in nearest:
            scores[int(labels[i])] = scores.get(int(labels[i]), 0) + math.exp(cosines[i] / temperature)
        predicted.append(max(scores, key=scores.get))
    return predicted


def test_knn_is_the_double_loop():  # T13
    bank, labels = cloud(230)
    queries, _ = cloud(57, seed=1)
    predicted = knn(bank, labels, queries)
    assert list(predicted) == [10, 20, 100, 200]
    for k in predicted:
        assert predicted[k].tolist() == brute_force(bank, labels, queries, k, 0.07)
    plain = knn(bank, labels, queries, [20], temperature=0.5)[20]
    assert plain.tolist() == brute_force(bank, labels, queries, 20, 0.5)
    assert not torch.equal(predicted[10], predicted[200])  # k matters here, and so do T and the weights
    assert not torch.equal(plain, predicted[20])


def test_knn_invariances():  # T13
    bank, labels = cloud(230)
    queries, _ = cloud(57, seed=1)
    expected = knn(bank, labels, queries)

    def same(other: dict) -> bool:
        return all(torch.equal(expected[k], other[k]) for k in expected)

    scale = torch.rand(230, 1, generator=torch.Generator().manual_seed(3)) + 0.1
    assert same(knn(bank * scale, labels, 7 * queries))
    order = torch.randperm(230, generator=torch.Generator().manual_seed(4))
    assert same(knn(bank[order], labels[order], queries))
    for chunks in ((1, 230), (7, 1), (56, 57), (1000, 100), (57, 199)):
        assert same(knn(bank, labels, queries, query_chunk=chunks[0], bank_chunk=chunks[1]))
    assert same(knn(bank.double(), labels.int(), queries.double()))
    for tiny_or_huge in (1e-30, 1e30):  # their squares leave float32
        assert same(knn(bank * tiny_or_huge, labels, queries * tiny_or_huge))
    assert same({k: p - 10**15 for k, p in knn(bank, labels + 10**15, queries).items()})  # ids of classes, with gaps
    assert same(knn(bank, labels.to(torch.uint8), queries, np.array([10, 20, 100, 200])))
    few = knn(bank.bfloat16(), labels, queries[:1].bfloat16(), [1])[1]
    assert few.tolist() == brute_force(bank.bfloat16(), labels, queries[:1].bfloat16(), 1, 0.07)
    assert all(len(p) == 0 for p in knn(bank, labels, queries[:0]).values())


def test_knn_limits():  # T13
    bank, labels = cloud(230)
    queries, query_labels = cloud(57, seed=1)
    assert knn_accuracy(bank, labels, bank, labels, [1]) == {1: 1.0}
    nearest = knn(bank, labels, queries, [1])[1]
    assert torch.equal(knn(bank, labels, queries, [50], temperature=1e-4)[50], nearest)
    _, indices = forgetting.neighbours(bank, queries, 51)
    votes = nn.functional.one_hot(labels[indices], 6).sum(1).sort(descending=True)
    majority = knn(bank, labels, queries, [51], temperature=1e6)[51]
    clear = votes.values[:, 0] > votes.values[:, 1]
    assert clear.sum() > 40 and torch.equal(majority[clear], votes.indices[clear, 0])
    score = knn_accuracy(bank, labels, queries, query_labels, [20])[20]
    assert score == (knn(bank, labels, queries, [20])[20] == query_labels).double().mean().item()


class _Largest(TorchDispatchMode):
    """The number of elements of the largest new tensor (views of an argument do not count)."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_knn_memory_is_bounded_by_the_chunk():
    bank, labels = cloud(5000)
    queries, _ = cloud(1000, seed=1)
    for query_chunk, bank_chunk in ((100, 500), (50, 1000)):
        with _Largest() as largest:
            knn(bank, labels, queries, [5, 10], query_chunk=query_chunk, bank_chunk=bank_chunk)
        assert largest.elements <= max(query_chunk * bank_chunk, 10 * len(queries), bank_chunk * 12)


def test_knn_refuses():
    bank, labels = cloud(30)
    queries, query_labels = cloud(5, seed=1)
    broken = queries.clone()
    broken[3, 2] = math.nan
    for message, arguments in {
        "k=31 neighbours are more than the 30 features of the bank": (bank, labels, queries, [10, 31]),
        "1 of 5 features are not finite, first row 3": (bank, labels, broken, [3]),
        "bank features have 12 dimensions, queries 4": (bank, labels, queries[:, :4], [3]),
        "30 bank features need as many integer labels": (bank, labels[:4], queries, [3]),
        r"need as many integer labels; got \(30,\) torch.float32": (bank, labels.float(), queries, [3]),
        "label -1 is negative": (bank, torch.full_like(labels, -1), queries, [3]),
        r"k=\(0,\) must be whole numbers": (bank, labels, queries, [0]),
        r"k=\(\) must be whole numbers": (bank, labels, queries, []),
        r"k=5 must be whole numbers of at least 1, e\.g\. \[10, 20\]": (bank, labels, queries, 5),
        r"features are \(N, D\) floating-point, D > 0; got \(30, 0\)": (bank[:, :0], labels, queries[:, :0], [3]),
        "temperature=0 must be above 0": (bank, labels, queries, [3], 0),
        r"features are \(N, D\) floating-point": (bank.long(), labels, queries, [3]),
    }.items():
        with pytest.raises(ValueError, match=message):
            knn(*arguments)
    broken[3, 2] = -math.inf
    with pytest.raises(ValueError, match="not finite"):
        knn(broken, query_labels, queries, [3])
    with pytest.raises(ValueError, match=r"5 queries need as many labels, one class each; got \(30,\)"):
        knn_accuracy(bank, labels, queries, labels, [3])
    with pytest.raises(ValueError, match="no query"):
        knn_accuracy(bank, labels, queries[:0], query_labels[:0], [3])
    for wrong in ({"query_chunk": 0}, {"bank_chunk": -5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))} must be at least 1"):
            knn(bank, labels, queries, [3], **wrong)
    with pytest.raises(ValueError, match="k=31 neighbours are more than the 30"):
        forgetting.neighbours(bank, queries, 31)


# ---- drift and CKA --------------------------------------------------------------------------------------------------


def test_drift_and_cka():
    before, _ = cloud(200)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1))).Q
    other = torch.randn(200, 30, generator=torch.Generator().manual_seed(2))
    assert drift(before, before) == 0 and drift(before, -before) == pytest.approx(2)
    assert drift(before, 3 * before) == pytest.approx(0, abs=1e-12)
    by_hand = (
        1 - sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(before, before @ rotation, strict=True)) / 200
    )
    assert drift(before, before @ rotation) == pytest.approx(by_hand, abs=1e-6)
    assert cka(before, before) == pytest.approx(1) == cka(before, 5 * before @ rotation + 3)
    x, y = (f.double() - f.double().mean(0) for f in (before, other))
    k, m = x @ x.T, y @ y.T  # by the kernels
    expected = ((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()).item()
    assert cka(before, other) == pytest.approx(expected) and expected < 0.3
    broken = before.clone()
    broken[7] = math.nan
    for message, call in {
        "1 of 200 features are not finite, first row 7": lambda: drift(before, broken),
        "drift: 12 dimensions before and 30 after": lambda: drift(before, other),
        "200 features before and 100 after": lambda: cka(before, other[:100]),
        "the same on one side": lambda: cka(before, torch.full((200, 3), 1 / 3, dtype=torch.float64)),
        "cka: 1 of 200 features are not finite": lambda: cka(broken, before),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ---- features of every method ---------------------------------------------------------------------------------------


def vit(depth: int = 4, **settings) -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(
        **{"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 5, "depth": depth}
        | settings
    )


def noise_set(n: int = 12, size: int = 16, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return ImageSet("noise", ["a", "b", "c"], torch.arange(n) % 3, pictures, "0" * 64)


def _peft(config: peft.PeftConfig, wrap: bool):
    def attach(model: nn.Module) -> nn.Module:
        return peft.get_peft_model(model, config) if wrap else peft.inject_adapter_in_model(config, model)

    return attach


def _lora_config() -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=["qkv"], r=2, modules_to_save=["head"])


METHODS = {
    "full": baselines.full,
    "linear": baselines.linear_probe,
    "bitfit": baselines.bitfit,
    "lora": lambda m: baselines.lora(m, rank=2),
    "block expansion": lambda m: block_expansion.attach(m, p=2),
    "peft, wrapped": _peft(_lora_config(), True),
    "peft, injected": _peft(_lora_config(), False),
}
for _name, _attach in {
    "lora on q and v": lambda m: baselines.lora_qv(m, rank=2),
    "adapter": lambda m: baselines.adapter(m, width=4),
    "compacter": lambda m: baselines.compacter(m, width=4, n=2),
    "top blocks": lambda m: baselines.top_blocks(m, 2),
    "vera": lambda m: baselines.vera(m, rank=2),
}.items():
    METHODS[_name] = _attach


def _kadaptation(model: nn.Module) -> None:
    from leanvit import kadaptation

    kadaptation.attach(model, n=4)


METHODS["kadaptation"] = _kadaptation


@pytest.mark.parametrize("method", METHODS)
def test_features_do_not_depend_on_the_head(method):  # T12
    out = METHODS[method](vit())
    model = out if isinstance(out, nn.Module) else None
    if model is None:
        model = vit()
        METHODS[method](model)
    images = noise_set()
    torch.manual_seed(3)
    with torch.no_grad():  # after a training, so to say
        for name, p in model.named_parameters():
            if p.requires_grad and ".head." not in f".{name}.":
                p.add_(0.05 * torch.randn_like(p))
    model.train()
    before = features(model, images, batch_size=5)
    assert before.shape == (12, 16) and all(m.training for m in model.modules())
    with torch.no_grad():
        heads = [p for n, p in model.named_parameters() if ".head." in f".{n}."]
        for p in heads:
            p.normal_()
    assert heads and torch.equal(features(model, images, batch_size=5), before)
    timm_model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():  # the class token behind the final norm
        expected = timm_model.eval().forward_features(torch.stack([images[i][0] for i in range(12)]))[:, 0]
    torch.testing.assert_close(before, expected)
    if method != "linear":
        assert not torch.allclose(before, features(vit(), images))


@pytest.mark.parametrize("head", ["in place", "another width", "none"])
def test_features_of_other_models(head):  # T12
    models = {
        "pooled": vit(class_token=False, global_pool="avg"),
        "attention pooling": vit(global_pool="map"),
        "beit": Beit(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5),
        "distilled": timm.create_model(
            "deit_tiny_distilled_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2
        ),
    }
    for model in models.values():
        before = features(model, noise_set())
        if head == "in place":
            for name in surgery.head_parameters(model):
                nn.init.normal_(model.get_parameter(name))
        else:
            model.reset_classifier(3 if head == "another width" else 0)
        assert before.shape == (12, 16) and torch.equal(features(model, noise_set()), before)


def test_features_refuse():
    broken = vit()
    nn.init.constant_(broken.norm.weight, math.nan)
    with pytest.raises(ValueError, match="12 of 12 features are not finite"):
        features(broken, noise_set())
    with pytest.raises(ValueError, match=r"gives \(12, 5, 16\) in front of its head"):
        features(vit(global_pool="", num_classes=0, fc_norm=False), noise_set())
    with pytest.raises(TypeError, match="Linear is no timm model"):
        features(nn.Linear(2, 2), noise_set())


# ---- forgetting -----------------------------------------------------------------------------------------------------


def test_what_does_not_move_the_feature_forgets_nothing():  # T10
    model, bank, queries = vit(), noise_set(30, seed=1), noise_set(12, seed=2)
    before = features(model, queries)
    start = measure(model, bank, queries, before=before, k=[1, 5])
    assert start["adapted"]["drift"] == 0 and start["adapted"]["cka"] == pytest.approx(1) and "off" not in start
    probe = copy.deepcopy(model)
    baselines.linear_probe(probe)
    train.fit(probe, noise_set(16), train.Recipe(batch_size=8, lr=0.1, steps=3), progress=False)
    assert not torch.equal(probe.head.weight, model.head.weight)
    assert torch.equal(features(probe, queries), before)
    assert measure(probe, bank, queries, before=before, k=[1, 5]) == start
    block_expansion.attach(model, p=2)
    assert measure(model, bank, queries, before=before, k=[1, 5]) == start
    train.fit(model, noise_set(16), train.Recipe(batch_size=8, lr=0.1, steps=3), progress=False)
    both = measure(model, bank, queries, before=before, k=[1, 5], off=block_expansion.bypass)
    assert both["off"] == start["adapted"] and both["adapted"]["drift"] > 1e-4 and both["adapted"]["cka"] < 1


def patterns(domain: str, n: int, seed: int) -> ImageSet:
    """Eight classes of 8x8 images, each a random pattern under noise; in domain b other ones, bright or inverted.

    The inversion leaves a class no mean, so that a linear probe of features for domain a can do little.
    """
    generator = torch.Generator().manual_seed(seed)
    templates = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(100 if domain == "a" else 200))
    labels = torch.arange(n) % 8
    pictures = 30 * templates[labels] + 50 * torch.randn(n, 1, 8, 8, generator=generator)
    if domain == "b":
        pictures *= 2 * torch.randint(2, (n, 1, 1, 1), generator=generator) - 1
    pictures = (pictures + 128).clamp(0, 255).to(torch.uint8)
    return ImageSet(f"patterns {domain}", list("01234567"), labels, pictures, f"{seed:064d}").with_transform(_centred)


def _centred(images: torch.Tensor) -> torch.Tensor:
    return (images.float() - 128) / 50


_centred.batched = True


@pytest.mark.parametrize("seed", [0, 1])
def test_adapting_and_forgetting_small(seed):  # T16
    """Block expansion learns the new domain better than a linear probe and forgets less than full fine-tuning."""
    torch.manual_seed(seed)
    source = VisionTransformer(img_size=8, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=8)
    bank, queries, target, test = (
        patterns(d, n, s) for d, n, s in (("a", 800, 1), ("a", 400, 2), ("b", 1600, 3), ("b", 400, 4))
    )

    def fit(model: nn.Module, images: ImageSet, steps: int) -> None:
        recipe = train.Recipe(batch_size=32, lr=1e-3, steps=steps, warmup_steps=10, seed=seed)
        train.fit(model, images, recipe, progress=False)

    def old_task(model: nn.Module) -> float:
        return measure(model, bank, queries, k=[20])["adapted"]["knn"][20]

    fit(source, bank, 100)
    learnt, old = {}, {"before": old_task(source)}
    methods = {
        "linear": baselines.linear_probe,
        "block": lambda m: block_expansion.attach(m, p=2),
        "full": baselines.full,
    }
    for name, attach in methods.items():
        model = copy.deepcopy(source)
        model.reset_classifier(8)
        attach(model)
        fit(model, target, 200)
        learnt[name], old[name] = accuracy(model, test), old_task(model)
    print(learnt, old)
    assert old["before"] > 0.5 and old["linear"] == old["before"]  # chance is 0.125
    assert learnt["block"] > learnt["linear"] + 0.08
    assert old["block"] > old["full"] + 0.04


@pytest.mark.parametrize("method", ["lora", "lora on q and v", "adapter", "compacter", "vera", "kadaptation"])
def test_blocks_with_adapters_are_not_copied(method):
    model = vit()
    METHODS[method](model)
    with pytest.raises(ValueError, match="merge or detach it first"):
        block_expansion.attach(model, p=2)
    assert len(model.blocks) == 4
