"""Find layers by full name, replace and restore them, freeze, count.

Layers are found among `nn.Linear` and plain 1x1 `nn.Conv2d` by their full name, never by a substring, and are
replaced one by one in their parent; no block's class is swapped and no forward is rewritten.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor, nn

Match = Callable[[str, nn.Module], bool]


@dataclass
class Report:
    """What a method did to a model: names matched, what was skipped and why, and the parameter counts."""

    method: str
    matched: list[str]
    skipped: dict[str, str] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.method}: {len(self.matched)} layers, {self.trainable:,} of {self.total:,} parameters trained"]
        reasons: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  skipped {', '.join(names[:3])}{more}: {why}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` and for a 1x1 `nn.Conv2d` that is the same thing (stride 1, no padding, one group)."""
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
    )


def linears(model: nn.Module, match: Match | None = None) -> list[tuple[str, nn.Module]]:
    """`(full name, module)` of every linear layer (see `is_linear`) for which `match(name, module)` is true.

    >>> from torch import nn
    >>> from leanvit import surgery
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> [name for name, _ in surgery.linears(model)]
    ['0', '2']
    """
    return [(n, m) for n, m in model.named_modules() if is_linear(m) and (match is None or match(n, m))]


def replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` where `name` (full dotted name) is, under every name it is shared by, and return what was there.

    Raises `AttributeError` where there is no module of that name.
    """
    old = model.get_submodule(name)
    module.train(old.training)
    aliases = [n for n, m in model.named_modules(remove_duplicate=False) if m is old]
    for alias in aliases:
        parent, _, child = alias.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return old


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Afterwards gradients and buffers (BatchNorm's statistics) are what they were; inside, `.grad` is None."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    for parameter, _ in grads:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def freeze(model: nn.Module, keep: Callable[[str], bool] = lambda name: False) -> None:
    """Let exactly the parameters for which `keep(full name)` is true be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(keep(name)))


def count(model: nn.Module) -> tuple[int, int]:
    """`(trainable, total)` number of parameters; a shared tensor counts once.

    >>> from torch import nn
    >>> from leanvit import surgery
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> surgery.freeze(model, keep=lambda name: name.startswith("1."))
    >>> surgery.count(model)
    (10, 26)
    """
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def without_gaps(parameters: Iterable[Tensor]) -> bool:
    """Whether each of the tensors, of any shape, fills its memory: torch's fused optimisers take that for granted and
    would move the wrong numbers of a slice.
    """
    formats = {4: [torch.channels_last], 5: [torch.channels_last_3d]}
    return all(
        p.is_contiguous() or any(p.is_contiguous(memory_format=f) for f in formats.get(p.ndim, ())) for p in parameters
    )


def head_modules(model: nn.Module) -> list[str]:
    """Full names of the classifier modules of a timm model (`[]` where it has none)."""
    names = {id(m): n for n, m in model.named_modules()}
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    found = [*classifier] if isinstance(classifier, (tuple, list)) else [classifier]
    found.append(getattr(model, "aux_head", None))  # VOLO's second classifier
    return [names[id(m)] for m in found if m is not None and id(m) in names]


def head_parameters(model: nn.Module) -> set[str]:
    """Full names of the classifier's parameters."""
    heads = head_modules(model)
    return {n for n, _ in model.named_parameters() if any(n == h or n.startswith(h + ".") for h in heads)}


def need_head(model: nn.Module, method: str) -> set[str]:
    """`head_parameters`, or a `ValueError` for a model that has none."""
    head = head_parameters(model)
    if not head:
        raise ValueError(f"{method}: {type(model).__name__} has no classifier head (was it made with num_classes=0?)")
    return head


def is_whole(value: object, least: int = 1) -> bool:
    """Whether it is a whole number of at least `least`, numpy's too; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and bool(value >= least)


def check_whole(method: str, least: int = 1, /, **values: object) -> None:
    """Raise `ValueError` for a value (a rank, a width, a seed) that is no whole number of at least `least`.

    Python's own alone: plans and files keep such values as JSON.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{method}: {name}={value!r} must be a whole number of at least {least}")


# the first letters of a component of the names that an adapter trains
ADAPTERS = {
    "lora_": "LoRA", "kad_": "KAdaptation", "adapter_": "Adapter", "compacter_": "Compacter", "vera_": "VeRA",
    "intrinsic_": "a subspace", "comcat_": "ComCAT's adapter",
}  # fmt: skip


def adapter(model: nn.Module) -> tuple[str, str] | None:
    """`(parameter's name, title)` of an adapter that is attached, told by the names, or None."""
    for name, _ in model.named_parameters():
        for component in name.split("."):
            for prefix, title in ADAPTERS.items():
                if component.startswith(prefix):
                    return name, title
    return None


def fold(model: nn.Module, name: str, module: nn.Module, title: str) -> None:
    """`replace` an adapter called `title` by the layer it was merged into, which keeps note of it."""
    module.merged_by_leanvit = title
    replace(model, name, module)


class Merged:
    """What `merge` hands back: `unmerge()` puts the adapters over the weights that they were over, bit for bit.

    It holds the adapted modules and a copy of the tensors that merging may change: let go of it once the merged model
    is to stay. `parts` are further modules `(owner, name)` that merging takes out of the model.
    """

    def __init__(self, model: nn.Module, names: list[str], parts: Iterable[tuple[nn.Module, str]] = ()):
        self.model = model
        self.adapted = {name: model.get_submodule(name) for name in names}
        self.parts = [(owner, name, getattr(owner, name)) for owner, name in parts]
        around = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        own = [p for m in self.adapted.values() for p in m.parameters()]
        own += [p for m in around for n, p in m.named_parameters(recurse=False) if n in ("q_bias", "v_bias")]
        self.before = {id(p): (p, p.detach().clone()) for p in own}
        self.dtype = own[0].dtype
        inside = [m for adapted in self.adapted.values() for m in adapted.modules()]
        self.biases = {m: m.bias for m in inside if "bias" in m._parameters}
        self.separated = [m for m in around if hasattr(m, "separated_by_leanvit")]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo the merge: adapters as they were merged, stock weights as before it, bit for bit.

        What happened to the merged weights since is dropped. Raises `ValueError` where the layers are no longer those
        that the merge left (a second `unmerge`, another surgery); the model is then as it was.
        """
        layers = {name: self.model.get_submodule(name) for name in self.adapted}
        for name, layer in layers.items():
            inside = any(module is layer for module in self.adapted[name].modules())
            if not inside or not hasattr(layer, "merged_by_leanvit"):
                raise ValueError(f"unmerge: {name} ({type(layer).__name__}) is not the layer that this merge left")
        for parameter, value in self.before.values():
            parameter.copy_(value)
        for name, layer in layers.items():
            if layer in self.biases:
                layer.bias = self.biases[layer]  # the merge may have made one
            del layer.merged_by_leanvit
            replace(self.model, name, self._follow(self.adapted[name], layer))
        for attention in self.separated:
            attention.qkv_bias_separate = attention.separated_by_leanvit = True
        for owner, name, module in self.parts:
            setattr(owner, name, self._follow(module, next(iter(layers.values()))))

    def _follow(self, adapted: nn.Module, layer: nn.Module) -> nn.Module:
        """Take what was not in the model to where it has gone (`.cuda()`, `.half()`) meanwhile."""
        now = next(layer.parameters())
        return adapted.to(device=now.device, dtype=now.dtype if now.dtype != self.dtype else None)


def refuse_adapted(model: nn.Module, method: str) -> None:
    """Raise `ValueError` when an adapter is attached (a second would freeze it) or was merged into the weights."""
    found = adapter(model)
    if found is not None:
        raise ValueError(f"{method}: this model has {found[1]} already ({found[0]}); merge or detach it first")
    for name, module in model.named_modules():
        title = getattr(module, "merged_by_leanvit", None)
        if title is not None:
            raise ValueError(
                f"{method}: {title} was merged into {name}, so that this model's weights are not the pretrained ones; "
                "to go on from them on purpose, load its state dict into a new model"
            )
