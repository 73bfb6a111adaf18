"""What a plan costs: multiply-adds, or milliseconds from a table measured on the user's machine.

Both know `attention(block, heads, width)`, `mlp(block, units)`, what is `fixed`, what the `dense` model costs, and the
`ratio` of real-numbered counts, with its derivatives. Multiply-adds are those of UVC's specification, 1.6; milliseconds
are ours, the paper has none.
"""

import bisect
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from leanvit import cost as measure
from leanvit.evaluate import device_of, modes_restored
from leanvit.sites import blank_images
from leanvit.uvc_math import ceil_through, flops_ratio
from leanvit.uvc_plan import (
    BlockPlan,
    BlockShape,
    Plan,
    Shapes,
    attention_macs,
    dense_macs,
    fixed_macs,
    mlp_macs,
    read_shapes,
    whole_plan,
)
from leanvit.uvc_slicing import apply


class FlopsCost:
    """Multiply-adds of one image, on `tokens` tokens in the blocks; the dense model's are those of all its tokens."""

    name = "FLOPs"

    def __init__(self, shapes: Shapes, tokens: int | None = None):
        self.shapes, self.tokens = shapes, tokens or shapes.tokens
        self.fixed, self.dense = fixed_macs(shapes, self.tokens), dense_macs(shapes)

    def attention(self, block: int, heads: int, width: int) -> float:
        """Multiply-adds of `heads` heads of `width` value dimensions each."""
        shape = self.shapes.blocks[block]
        kept = BlockShape(heads, shape.head_dim, (width,) * heads, 0, padded=shape.padded)
        return attention_macs(kept, self.shapes.width, self.tokens)

    def mlp(self, block: int, units: int) -> float:
        """Multiply-adds of so many hidden units."""
        kept = BlockShape(0, 0, (), units, self.shapes.blocks[block].mlp_ranks)
        return mlp_macs(kept, self.shapes.width, self.tokens)

    def ratio(self, s: Tensor, r: Tensor, dead: Tensor, run: Tensor) -> Tensor:
        """R, `()`, the part of the dense multiply-adds, of real-numbered counts `s (L, 2)` and `r (L, most heads)`,
        differentiable; these, dead and run as in `uvc_math.flops_ratio`.
        """
        return flops_ratio(self.shapes, s, r, dead, run, paper=False, tokens=self.tokens)


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one block's attention and MLP, with its norms, at some sizes, and of all the rest of the model.

    A model's time is taken as `rest + sum(attention + mlp)`, in between linear. Plain data with a JSON form; it holds
    for the model, machine, threads, batch and dtype it was measured with (`about`).
    """

    heads: tuple[int, ...]
    attention_ms: tuple[float, ...]
    units: tuple[int, ...]
    mlp_ms: tuple[float, ...]
    rest_ms: float
    about: dict

    def to_json(self) -> str:
        """One line of JSON; `from_json` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LatencyTable":
        """The table of `to_json`."""
        data = json.loads(text)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


class LatencyCost:
    """Milliseconds from a `LatencyTable`. Value dimensions are not cut: narrower ones are hardly faster.

    Raises `ValueError` for a table of another model.
    """

    name = "latency"

    def __init__(self, shapes: Shapes, table: LatencyTable):
        for name, ours in _size(shapes).items():
            if table.about.get(name, ours) != ours:
                raise ValueError(
                    f"the latency table is of a model of {name} {table.about[name]}; this one has {ours}: measure it "
                    "on this model"
                )
        for i, shape in enumerate(shapes.blocks):
            if shape.heads > table.heads[-1] or shape.hidden > table.units[-1]:
                raise ValueError(
                    f"the latency table ends at {table.heads[-1]} heads and {table.units[-1]} units; block {i} has "
                    f"{shape.heads} and {shape.hidden}: measure it on this model"
                )
        self.shapes, self.table = shapes, table
        self.fixed = table.rest_ms
        self.dense = self.fixed + sum(
            self.attention(i, b.heads, b.head_dim) + self.mlp(i, b.hidden) for i, b in enumerate(shapes.blocks)
        )

    def attention(self, block: int, heads: int, width: int) -> float:
        """Milliseconds of so many heads; `width` does not count."""
        return float(_interpolate(self.table.heads, self.table.attention_ms, torch.tensor(float(heads))))

    def mlp(self, block: int, units: int) -> float:
        """Milliseconds of so many hidden units."""
        return float(_interpolate(self.table.units, self.table.mlp_ms, torch.tensor(float(units))))

    def ratio(self, s: Tensor, r: Tensor, dead: Tensor, run: Tensor) -> Tensor:
        """R, `()`, the part of the dense milliseconds, of real-numbered `s (L, 2)` heads and units to remove and
        `run (L,)`, differentiable; `r` and `dead` do not count.
        """
        total = torch.as_tensor(self.fixed, dtype=s.dtype)
        for i, b in enumerate(self.shapes.blocks):
            attention = _interpolate(self.table.heads, self.table.attention_ms, b.heads - ceil_through(s[i, 0]))
            mlp = _interpolate(self.table.units, self.table.mlp_ms, b.hidden - ceil_through(s[i, 1]))
            total = total + run[i] * (attention + mlp)
        return total / self.dense


def _size(shapes: Shapes) -> dict[str, int]:
    """What a model must share with the one that a table was measured on."""
    return {"width": shapes.width, "tokens": shapes.tokens, "depth": len(shapes.blocks)}


def _interpolate(xs: Sequence[int], ys: Sequence[float], x: Tensor) -> Tensor:
    """Piecewise linear, differentiable in `x`; the first piece goes on below `xs[0]`."""
    if len(xs) == 1:
        return x * ys[0] / xs[0]
    j = min(max(bisect.bisect_left(xs, float(x.detach())), 1), len(xs) - 1)
    return ys[j - 1] + (x - xs[j - 1]) * (ys[j] - ys[j - 1]) / (xs[j] - xs[j - 1])


def measure_latency(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    points: int = 4,
    rounds: int = 9,
    clock: Callable[[], float] | None = None,
) -> LatencyTable:
    """Time cut versions of the first block of `model` on this machine, with the threads that are set; in milliseconds.

    >>> import timm
    >>> from leanvit.uvc_cost import measure_latency
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
    ...                           num_heads=2, num_classes=4)
    >>> table = measure_latency(model, points=2, rounds=3)
    >>> table.heads, table.units
    ((1, 2), (64, 128))

    Args:
        images: a batch `(B, C, H, W)` of the size to be served; by default one blank image.
        points: sizes of the MLP and of the attention that are timed, from the smallest to the whole.
        rounds: interleaved rounds; the median counts.
        clock: seconds; `time.process_time` for CPU time on a machine that others use. By default wall clock, on CUDA
            events.

    Raises `ValueError` for points or rounds below 1, a model that UVC cannot cut, or one whose blocks differ in size.
    The published method knows no latency.
    """
    shapes = read_shapes(model)
    if len(set(shapes.blocks)) != 1:
        raise ValueError("a latency table is of a model whose blocks are all alike; measure it before the first cut")
    images = blank_images(model, 1) if images is None else images
    shape, device = shapes.blocks[0], device_of(model)
    if points < 1:
        raise ValueError(f"measure_latency: points={points} must be at least 1")
    heads = sorted({max(1, round(shape.heads * i / points)) for i in range(1, points + 1)})
    units = sorted({max(1, round(shape.hidden * i / points / 16) * 16) for i in range(1, points)} | {shape.hidden})
    tokens = torch.randn(len(images), shapes.tokens, shapes.width, device=device, dtype=images.dtype)
    source = model.blocks[0]

    def one_block(kept_heads: int, kept_units: int) -> nn.Module:
        small = nn.Module()  # a model of one block, as far as apply looks
        small.blocks, small.patch_embed = nn.Sequential(copy.deepcopy(source)), model.patch_embed
        small.embed_dim, small.num_prefix_tokens = shapes.width, shapes.prefix
        plan = whole_plan(read_shapes(small))
        values = plan.blocks[0].values[:kept_heads]
        block = BlockPlan(tuple(range(kept_heads)), values, tuple(range(kept_units)))
        apply(small, Plan(plan.shapes, (block,)))
        return small.blocks[0].eval()

    with torch.no_grad(), modes_restored(model):
        model.eval()
        calls: dict[str, Callable] = {}
        for count in heads:
            block = one_block(count, shape.hidden)
            calls[f"attention {count}"] = lambda b=block: tokens + b.ls1(b.attn(b.norm1(tokens)))
        for count in units:
            block = one_block(shape.heads, count)
            calls[f"mlp {count}"] = lambda b=block: tokens + b.ls2(b.mlp(b.norm2(tokens)))
        calls["model"] = lambda: model(images)
        timed = measure.interleaved(calls, rounds=rounds, device=device, clock=clock)
        times = {name: t["median_ms"] for name, t in timed.items()}
    attention = _rising([times[f"attention {c}"] for c in heads])
    mlp = _rising([times[f"mlp {c}"] for c in units])
    rest = max(0.0, times["model"] - len(shapes.blocks) * (attention[-1] + mlp[-1]))
    about = {
        "architecture": shapes.architecture or shapes.model,
        **_size(shapes),
        "batch": len(images),
        "dtype": str(images.dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "model_ms": times["model"],
    }
    return LatencyTable(tuple(heads), attention, tuple(units), mlp, rest, about)


def _rising(ms: list[float]) -> tuple[float, ...]:
    """A larger size is taken to be no faster than a smaller one, whatever noise says."""
    return tuple(max(ms[: i + 1]) for i in range(len(ms)))
