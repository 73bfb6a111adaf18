"""Local intrinsic dimension: how many directions of one module's weights are enough to adapt it.

The measure behind KAdaptation (arXiv 2203.16329; specification, section 1.2), after Li et al., arXiv 1804.08838: of one
module m of one layer (an attention, an MLP) with D parameters, only

    theta = theta_0 + P z        z (d,), starting at 0        P (D, d) fixed and random

is trained, with the head; everything else is frozen. The local intrinsic dimension d90 is the smallest d that reaches
90 % of what training all D parameters reaches (`reference`, `dimension`).

P is Fastfood, one for each tensor of D' numbers, all with the same z, at O(L log L) (Le, Sarlos, Smola, 2013):

    P z = [H G Pi H B pad(z)]_{1..D'} / sqrt(D' sum(G^2))        E |P z|^2 = |z|^2 for each tensor

with B random signs, Pi a permutation, G normal numbers, H the Walsh-Hadamard matrix of order L.

Known divergences from the authors' code: theta_0 are the *pretrained* weights (theirs are a fresh random start, since
the loaded ones go to a module that is not the wrapped one); only the chosen module has a z; L is at least d, so that a
tensor of fewer numbers than d (a bias) still sees every direction (theirs drops those beyond L).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leanvit.surgery import Merged, Report, check_whole, count, fold, freeze, head_parameters, refuse_adapted, replace

_ORDER = 16  # the transform goes along axes of at most this length, each a matrix product: the fastest of 2 to 256


def walsh_hadamard(x: Tensor) -> Tensor:
    """`H x` for `x (L,)`, L a power of two, H unnormalised in natural order (`scipy.linalg.hadamard`): O(L log L).

    `H_L` is the Kronecker product of `H_16`s, each of which acts on one axis of `x` seen as (…, 16, 16). What Fastfood
    (Le, Sarlos, Smola, ICML 2013) mixes with. Raises `ValueError` for a tensor of another shape.
    """
    length = x.numel()
    if x.dim() != 1 or length < 1 or length & (length - 1):
        raise ValueError(f"walsh_hadamard: a vector of a power of two numbers is needed, got {tuple(x.shape)}")
    matrix = two = x.new_tensor([[1, 1], [1, -1]])
    while len(matrix) < _ORDER:
        matrix = torch.kron(matrix, two)
    inner = 1
    while inner < length:
        order = min(_ORDER, length // inner)
        part = matrix[:order, :order]  # the corner of H_16 is the smaller H
        # the innermost axis as one product from the right, the others from the left
        x = x.view(-1, order) @ part if inner == 1 else part @ x.view(-1, order, inner)
        x, inner = x.reshape(-1), inner * order
    return x


class Fastfood(nn.Module):
    """The fixed random map `z (d,) -> (D',)` of one tensor, drawn from `generator`; linear, columns of norm near 1."""

    def __init__(self, size: int, d: int, generator: torch.Generator, device: torch.device | None = None):
        super().__init__()
        self.size = size
        self.length = 1 << max(0, math.ceil(math.log2(max(size, d, 1))))
        signs = torch.randint(0, 2, (self.length,), generator=generator).mul_(2).sub_(1).to(torch.int8)
        order = torch.randperm(self.length, generator=generator)
        gauss = torch.randn(self.length, generator=generator)
        gauss /= math.sqrt(size * float(gauss.double().square().sum()))  # with the normalisation
        # not persistent: the seed holds them
        self.register_buffer("signs", signs.to(device), persistent=False)
        self.register_buffer("order", order.to(device), persistent=False)
        self.register_buffer("gauss", gauss.to(device), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(z, (0, self.length - z.numel())) * self.signs
        mixed = walsh_hadamard(padded)[self.order] * self.gauss.to(z.dtype)
        return walsh_hadamard(mixed)[: self.size]


class Subspace(nn.Module):
    """`base` with the parameters `theta_0 + P z`; `intrinsic_z (d,)` in float32 is all that can be trained in it."""

    def __init__(self, base: nn.Module, d: int, seed: int):
        super().__init__()
        self.base = base
        parameters = dict(base.named_parameters())
        device = next(iter(parameters.values())).device
        self.settings = {"seed": seed}  # `state.load` compares it: a z belongs to its map
        self.intrinsic_z = nn.Parameter(torch.zeros(d, device=device)) if d else None
        generator = torch.Generator().manual_seed(seed)
        # a module's name may not hold a dot
        self.maps = nn.ModuleList(Fastfood(p.numel(), d, generator, device) for p in parameters.values() if d)

    def parameters_now(self) -> dict[str, Tensor]:
        """`{name in base: theta_0 + P z}`, each of the same shape as theta_0."""
        own = dict(self.base.named_parameters())
        if self.intrinsic_z is None:
            return own
        return {
            name: p + ray(self.intrinsic_z).view(p.shape).to(p.dtype)
            for (name, p), ray in zip(own.items(), self.maps, strict=True)
        }

    def forward(self, *args, **kwargs):
        if self.intrinsic_z is None:
            return self.base(*args, **kwargs)
        # reductions and casts of autocast belong to the layers, not to the map
        with torch.autocast(self.intrinsic_z.device.type, enabled=False):
            parameters = self.parameters_now()
        return functional_call(self.base, parameters, args, kwargs)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base with `theta_0 + P z` as its weights."""
        for name, value in self.parameters_now().items():
            self.base.get_parameter(name).copy_(value)
        return self.base


def _module(model: nn.Module, name: str, what: str) -> nn.Module:
    names = dict(model.named_modules())
    module = names.get(name)
    if not name or module is None:
        children = ", ".join([n for n in names if n.endswith((".attn", ".mlp"))][:4]) or "none"
        raise ValueError(
            f"{what}: {type(model).__name__} has no module {name!r}; attentions and MLPs are {children}, …"
        )
    if not any(True for _ in module.parameters()):
        raise ValueError(f"{what}: {name} ({type(module).__name__}) has no parameters")
    return module


def attach(model: nn.Module, name: str, d: int, seed: int = 0) -> Report:
    """Train `d` random directions of the module called `name` (say "blocks.3.attn"), and the head; in place.

    Args:
        d: directions, 0 to train the head alone. seed: of the map; a saved z belongs to it.

    Raises `ValueError` for a name that is none, a d below 0 or above the module's number of parameters, and where a
    subspace or an adapter is attached already; the model is then as it was.
    """
    module = _module(model, name, "intrinsic")
    size = sum(p.numel() for p in module.parameters())
    if isinstance(d, bool) or not isinstance(d, int) or not 0 <= d <= size:
        raise ValueError(f"intrinsic: d={d!r} must be a whole number from 0 to {size}, the parameters of {name}")
    check_whole("intrinsic", 0, seed=seed)
    if any(isinstance(m, Subspace) for m in model.modules()):  # one of d = 0 has no parameter to be told by
        raise ValueError(
            f"intrinsic: {type(model).__name__} has a subspace already; merge(model) or detach(model) first"
        )
    refuse_adapted(model, "intrinsic")
    head = head_parameters(model)
    inside = [n for n in head if n.startswith(name + ".")]
    if inside:
        raise ValueError(f"intrinsic: {name} holds the head ({inside[0]}), which is trained as it is")
    subspace = Subspace(module, d, seed)
    freeze(model, keep=head.__contains__)
    replace(model, name, subspace)
    note = f"{d} of {size:,} dimensions of {name}, in {len(subspace.maps)} tensors"
    return Report("intrinsic", [name], {}, *count(model), [note])


def reference(model: nn.Module, name: str) -> Report:
    """Train all parameters of the module called `name`, and the head: what d90 is measured against.

    Raises `ValueError` for a name that is none.
    """
    _module(model, name, "reference")
    head = head_parameters(model)
    freeze(model, keep=lambda n: n in head or n.startswith(name + "."))
    return Report("intrinsic reference", [name], {}, *count(model))


def dimension(curve: Mapping[int, float], full: float, fraction: float = 0.9) -> int | None:
    """The smallest d of `curve {d: accuracy}` with at least `fraction` of the accuracy `full`, or None."""
    return min((d for d, accuracy in curve.items() if accuracy >= fraction * full), default=None)


def _subspace(model: nn.Module, what: str) -> tuple[str, Subspace]:
    found = next(((n, m) for n, m in model.named_modules() if isinstance(m, Subspace)), None)
    if found is None:
        raise ValueError(f"{what}: no subspace is attached to this {type(model).__name__}")
    return found


def merge(model: nn.Module) -> Merged:
    """Make `theta_0 + P z` the weights; the stock module is back, with the same outputs.

    `unmerge()` of what it returns undoes it. Raises `ValueError` where no subspace is attached.
    """
    name, subspace = _subspace(model, "merge")
    undo = Merged(model, [name])
    fold(model, name, subspace.merged(), "a subspace")
    return undo


def detach(model: nn.Module) -> None:
    """Drop z: the module as it was, bit for bit. What may be trained stays as it is.

    Raises `ValueError` where no subspace is attached.
    """
    name, subspace = _subspace(model, "detach")
    replace(model, name, subspace.base)
