"""Ranks for ComCAT: what they cost, the authors' candidates and budget, and greedy choice under an exact budget.

Counts are weights of the linear layers (no biases, norms, embeddings), as in the authors' budget; `paper_parameters`
and `linear_macs` are the papers' own accountings (ComCAT's specification, 1.4, 2.1, 4.2).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leanvit import surgery
from leanvit.comcat_calibrate import Statistics, images_of, spectra
from leanvit.comcat_cut import Cutter
from leanvit.comcat_factors import Spectrum, worthwhile
from leanvit.comcat_plan import Part, Plan, make_plan, parts
from leanvit.evaluate import device_of, modes_restored

CANDIDATES = {
    192: (32, 64, 96, 128, 160),
    384: (64, 128, 192, 256, 320),
    768: (128, 192, 256, 320, 384, 448, 512),
}
# DeiT-S at the end of Adaptive-ComCAT's training log: qk, vo (over all heads), fc1, fc2 of each block, then the head
LOGGED_DEIT_S = (
    *(252, 318, 192, 192, 192, 252, 192, 192, 192, 252, 192, 128, 192, 252, 128, 64, 192, 60, 128, 128),
    *(192, 318, 128, 128, 192, 318, 128, 128, 126, 318, 192, 128, 126, 318, 192, 128, 60, 318, 192, 64),
    *(60, 318, 64, 64, 60, 318, 64, 64, 320),
)

# --- counts ----------------------------------------------------------------------------------------------------------


def total_weights(found: Iterable[Part], ranks: Mapping[str, int | None]) -> int:
    """Weights of all parts at these ranks per head (absent or None: dense)."""
    return sum(p.weights(ranks.get(p.name)) for p in found)


def patch_weights(model: nn.Module) -> int:
    """Weights of the patch embedding."""
    patch = getattr(model, "patch_embed", None)
    return sum(p.numel() for n, p in patch.named_parameters() if n.endswith("weight")) if patch is not None else 0


def authors_budget(model: nn.Module, reduction: float) -> int:
    """The authors' epsilon: weights left for the parts when `reduction` of (patch embedding + parts) shall go.

    `(1 - reduction) (w_patch + w_parts) - w_patch` (specification 2.3): 10,661,376 for DeiT-S at 0.5.
    Raises `ValueError` for a reduction that is not between 0 and 1.
    """
    if not 0 < reduction < 1:
        raise ValueError(f"authors_budget: reduction={reduction} must lie between 0 and 1 (0.5 takes half away)")
    patch = patch_weights(model)
    return round((1 - reduction) * (patch + sum(p.dense for p in parts(model)[0]))) - patch


def paper_parameters(model: nn.Module) -> int:
    """Parameters as the paper's Table 3 counts them: without norms, position embedding and tokens (21,955,432)."""
    left_out = {"pos_embed", "cls_token", "dist_token", "reg_token"}
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    kept = [(n, p) for n, p in model.named_parameters() if n not in left_out and n.rpartition(".")[0] not in norms]
    return sum(p.numel() for _, p in kept)


def linear_macs(model: nn.Module, images: Tensor | None = None) -> int:
    """Multiply-adds of the linear and convolution layers for one image: the paper's "FLOPs" (4,241,218,560, DeiT-S).

    Counted by torch on the model as it is, from `images (B, 3, H, W)`, one of zeros by default; products inside the
    attention (QK^T, AV) are left out.
    """
    if images is None:
        size = model.patch_embed.img_size
        weight = next(model.parameters())
        images = torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype)
    with modes_restored(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(images)
    kinds = ("mm", "addmm", "convolution")
    flops = counter.get_flop_counts()["Global"]
    return sum(n for op, n in flops.items() if str(op).rpartition(".")[2] in kinds) // 2 // images.shape[0]


def attention_macs(model: nn.Module, tokens: int) -> int:
    """Multiply-adds of QK^T and AV for one image, `N^2 (R1 + R2)` a layer, without the padding of unequal widths.

    What the papers' FLOPs leave out (specification 4.2).
    """
    total = 0
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads"):
            values = module.proj.in_features
            total += tokens**2 * ((module.qkv.out_features - values) // 2 + values)
    return total


# --- choices by hand -------------------------------------------------------------------------------------------------


def nominal_candidates(width: int) -> tuple[int, ...]:
    """The authors' ranks for a layer whose smaller side is `width`; for other widths 1/6 .. 5/6 of it."""
    return CANDIDATES.get(width) or tuple(sorted({max(1, round(width * i / 6)) for i in range(1, 6)}))


def realised(part: Part, nominal: int) -> int:
    """The rank per head that a nominal rank (total over heads) gives: `nominal // h`; a linear layer's is itself."""
    return nominal // part.heads


def paying(part: Part) -> int:
    """The largest rank that makes a part smaller and faster (0: none does)."""
    return worthwhile(part.inputs, part.outputs) if part.kind == "fc" else part.full - 1


def candidates(part: Part, mode: str = "corrected") -> list[int | None]:
    """Ranks per head to choose among, rising; corrected: without those too large to pay, and with dense (None)."""
    width = part.heads * part.full if part.kind != "fc" else part.full
    ranks = sorted({realised(part, n) for n in nominal_candidates(width)} - {0}) or [1]
    if mode == "faithful":
        return ranks
    return [r for r in ranks if r <= paying(part)] + [None]


def own_candidates(
    found: Iterable[Part], ranks: Mapping[str, Sequence[int | None]], mode: str = "corrected"
) -> dict[str, list[int | None]]:
    """The candidates that a user gives for some parts, after making sure that a search can choose them all.

    Raises `ValueError` for names of no part, and for ranks outside 1 .. full (corrected: at or above break-even, where
    dense, None, is smaller).
    """
    known, result = {p.name: p for p in found}, {}
    for name, mine in ranks.items():
        if name not in known:
            some = ", ".join(list(known)[:3])
            raise ValueError(f"RankSearch: ranks={name!r} must be full names of the model's parts, as {some}")
        part = known[name]
        top = part.full if mode == "faithful" else max(paying(part), math.ceil(part.break_even) - 1)
        fits = isinstance(mine, Sequence) and len(mine) > 0
        if not fits or not all(mode != "faithful" if r is None else type(r) is int and 1 <= r <= top for r in mine):
            dense = "" if mode == "faithful" else ", or None for dense"
            raise ValueError(f"RankSearch: ranks of {name}={mine!r} must be a list of whole numbers in 1..{top}{dense}")
        result[name] = list(mine)
    return result


def ranks_from_list(model: nn.Module, totals: Sequence[int]) -> dict[str, int]:
    """Ranks per head from the authors' list (`ranks.txt`: qk, vo, fc1, fc2 of each block, then the classifier).

    Raises `ValueError` when the list is not as long as the model has parts.
    """
    found, _ = parts(model)
    if len(totals) != len(found):
        raise ValueError(f"ranks_from_list: {len(totals)} ranks for a model of {len(found)} parts")
    return {p.name: realised(p, int(r)) for p, r in zip(found, totals, strict=True)}


def uniform_ranks(model: nn.Module, *, attention: float = 0.0, mlp: float = 0.0) -> dict[str, int]:
    """Ranks that take the same part of the weights (0 .. 1) out of every attention, or out of every MLP layer.

    The setting of the paper's Tables 1 and 4. The part removed is at least what is asked for.
    Raises `ValueError` for one outside of 0 .. 1, 1 excluded.
    """
    ranks = {}
    for part in parts(model)[0]:
        removed = attention if part.kind != "fc" else mlp if "mlp" in part.name.split(".") else 0.0
        if not 0 <= removed < 1:
            raise ValueError(f"uniform_ranks: {removed} of {part.name} must lie in 0..1, 1 excluded")
        if removed:
            ranks[part.name] = max(1, math.floor((1 - removed) * part.dense / part.unit + 1e-9))
    return ranks


# --- choice under a budget -------------------------------------------------------------------------------------------

Points = list[tuple[int | None, int, float]]  # (rank, weights, gain), weights and gain rising


def check_budget(budget: float) -> None:
    """Raise `ValueError` for a budget that is no finite number."""
    if isinstance(budget, bool) or not isinstance(budget, Real) or not math.isfinite(budget):
        raise ValueError(f"ComCAT: budget={budget!r} must be a finite number of weights")


def check_weights(method: str, found: Iterable[Part], weights: Mapping[str, float]) -> None:
    """Raise `ValueError` where `weights` lack a part or hold something else than a finite number from 0 on."""
    for part in found:
        if part.name not in weights:
            raise ValueError(f"{method}: weights say nothing of {part.name}; measure them on this model")
        value = weights[part.name]
        if not isinstance(value, Real) or not 0 <= value < math.inf:
            raise ValueError(f"{method}: weight of {part.name}={value!r} must be a finite number of at least 0")


def between(part: Part, ranks: Sequence[int | None]) -> list[int | None]:
    """Every rank from the smallest to the largest candidate; with dense (None) beside others, every one that pays."""
    whole = [r for r in ranks if r is not None]
    if None not in ranks:
        return [*range(min(whole), max(whole) + 1)]
    return [*range(1, max(paying(part), *whole) + 1), None] if whole else [None]


def curve(part: Part, energy: Tensor, ranks: Sequence[int | None] | None = None, weight: float = 1.0) -> Points:
    """What each rank of a part costs and keeps: `gain = weight * (energy of the directions kept)`.

    `energy (directions,)` of the part's `Spectrum`. `ranks`: those allowed (None is dense); by default every one that
    pays, then dense.
    """
    kept = torch.cumsum(energy.double(), 0).tolist()
    if ranks is None:
        ranks = [*range(1, paying(part) + 1), None]
    points = [(r, part.weights(r), weight * kept[(part.full if r is None else r) - 1]) for r in ranks]
    return sorted(points, key=lambda point: point[1])


def project(curves: Mapping[str, Points], budget: int, start: Mapping[str, int | None] | None = None) -> dict:
    """Ranks whose weights are at most `budget`, so that no step of any part fits any more.

    From `start` (or from the smallest ranks) steps down give way by the least gain lost for each weight freed; then
    steps up come by the most gain for each weight (several ranks at once where that is better: up to dense, say), as
    long as one fits. Greedy is exact for this additive measure up to the last steps.

    Raises `ValueError` for a budget below the smallest ranks (the floor is named) or not finite.
    """
    check_budget(budget)
    floor = sum(points[0][1] for points in curves.values())
    if budget < floor:
        raise ValueError(f"ComCAT: a budget of {budget:,} weights cannot be met; the smallest ranks take {floor:,}")
    at = {n: 0 for n in curves}
    if start is not None:
        at = {n: [p[0] for p in points].index(start.get(n)) for n, points in curves.items()}
    used = sum(points[at[n]][1] for n, points in curves.items())

    def down(name: str) -> float:
        (_, less, low), (_, more, high) = curves[name][at[name] - 1], curves[name][at[name]]
        return (high - low) / (more - less)

    while used > budget:
        name = min((n for n in curves if at[n] > 0), key=lambda n: (down(n), n))
        used -= curves[name][at[name]][1] - curves[name][at[name] - 1][1]
        at[name] -= 1
    best = {name: _best_step(points, at[name], budget - used) for name, points in curves.items()}
    while any(best.values()):
        name = max((n for n in best if best[n]), key=lambda n: (best[n][0], n))
        _, target = best[name]
        cost = curves[name][target][1] - curves[name][at[name]][1]
        if used + cost > budget:  # the room has shrunk since this step was found
            best[name] = _best_step(curves[name], at[name], budget - used)
            continue
        used, at[name] = used + cost, target
        best[name] = _best_step(curves[name], target, budget - used)
    return {name: curves[name][i][0] for name, i in at.items()}


def _best_step(points: Points, at: int, room: int) -> tuple[float, int] | None:
    """(gain per weight, index) of the best step up from `at` that fits into `room`."""
    _, cost, gain = points[at]
    steps = []
    for i in range(at + 1, len(points)):
        if points[i][1] - cost > room:
            break
        steps.append(((points[i][2] - gain) / max(1, points[i][1] - cost), i))
    return max(steps, default=None)


def greedy(
    model: nn.Module,
    budget: int,
    *,
    statistics: Statistics | None = None,
    weights: Mapping[str, float] | None = None,
    multiple: int = 1,
) -> Plan:
    """The plan that keeps most (weighted) energy of the singular values within `budget` weights of all parts.

    Args:
        statistics: of `calibrate`, for data-aware singular values.
        weights: what a unit of lost energy matters, by part, see `sensitivity`; without them the energy of each part
            counts in parts of its own total.
        multiple: ranks are multiples of it (8 suits CPUs and GPUs).

    Raises `ValueError` for a budget that cannot be met or is no number, weights that lack a part or are negative,
    statistics of another model, and a multiple below 1.
    """
    surgery.check_whole("greedy", multiple=multiple)
    found, _ = parts(model)
    if weights is not None:
        check_weights("greedy", found, weights)
    spectrum, curves = spectra(model, statistics), {}
    for part in found:
        energy = spectrum[part.name].energy
        weight = weights[part.name] if weights is not None else 1 / max(float(energy.sum()), 1e-300)
        ranks = [*range(multiple, paying(part) + 1, multiple)] or [1]
        curves[part.name] = curve(part, energy, [*ranks, None], weight)
    ranks = project(curves, budget)
    about = {"ranks": "greedy", "budget": budget, "weights": total_weights(found, ranks)}
    return make_plan(model, ranks, about=about)


@torch.no_grad()
def sensitivity(
    model: nn.Module, batches: Iterable, *, statistics: Statistics | None = None, part_kept: float = 0.5
) -> dict[str, float]:
    """How much a unit of lost energy matters, by part: the rise of KL(dense || cut) when that part alone is cut.

    Each part in turn keeps `part_kept` of its ranks. The batches are gone through once for each part, and once dense.
    Give statistics: the energy of plain singular values says little about the outputs, and ranks by such weights were
    worse than without (embedded backbone, 70 % removed: KL 0.061 against 0.014; with statistics 0.004 against 0.013).
    A measure of ours, of no paper. Raises `ValueError` for no images, a part outside of 0 .. 1, statistics of
    another model, or a model that cannot be factored.
    """
    batches = [images_of(b) for b in batches]
    if not batches:
        raise ValueError("sensitivity: there are no images")
    if not 0 < part_kept < 1:
        raise ValueError(f"sensitivity: part_kept={part_kept} must lie between 0 and 1")
    found, _ = parts(model)
    spectrum, device, result = spectra(model, statistics), device_of(model), {}

    def logs(network: nn.Module) -> list[Tensor]:
        return [F.log_softmax(network(b.to(device)).double(), -1) for b in batches]

    with modes_restored(model):
        dense = logs(model.eval())
        for part in found:
            rank = max(1, int(part_kept * part.full))
            with _cut_alone(model, part, rank, spectrum[part.name], statistics):
                pairs = zip(dense, logs(model), strict=True)
                lost = [F.kl_div(cut, full, reduction="batchmean", log_target=True) for full, cut in pairs]
            energy = float(spectrum[part.name].energy[rank:].sum())
            result[part.name] = max(float(sum(lost) / len(lost)), 0.0) / max(energy, 1e-300)
    return result


@contextmanager
def _cut_alone(model: nn.Module, part: Part, rank: int, spectrum: Spectrum, statistics: Statistics | None):
    """Inside the block, one part of the model has a lower rank."""
    plan = make_plan(model, {part.name: rank}, mode="faithful", bias="absorb")  # also where it saves nothing
    cutter = Cutter(plan, lambda *_: spectrum.factors(rank), None if statistics is None else statistics.shift)
    old = model.get_submodule(part.module)
    surgery.replace(model, part.module, cutter.make(part, old))
    try:
        yield
    finally:
        surgery.replace(model, part.module, old)
