"""The modules of a factored transformer, and reading the maps of an attention or a layer out of them.

ComCAT (arXiv 2305.17235), Eq. 1 to 3; biases as in its specification, 1.3.

`FactoredLinear` and `FactoredAttention` take the places of `nn.Linear` and timm's `Attention`; their children are plain
linear layers, so that other methods find them. They save, load, export and are smaller by what their ranks say.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

# --- modules ---------------------------------------------------------------------------------------------------------


class FactoredLinear(nn.Module):
    """`x (..., in) -> (x A) B + bias (..., out)`: `first` holds A and no bias, `second` B and the bias."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool = True, **kwargs):
        super().__init__()
        self.first = nn.Linear(inputs, rank, bias=False, **kwargs)
        self.second = nn.Linear(rank, outputs, bias=bias, **kwargs)

    @property
    def in_features(self) -> int:
        """As of `nn.Linear`."""
        return self.first.in_features

    @property
    def out_features(self) -> int:
        """As of `nn.Linear`."""
        return self.second.out_features

    @property
    def rank(self) -> int:
        """The width between its two layers."""
        return self.first.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class PackedLinear(nn.Linear):
    """A linear layer `(..., in) -> (..., out)` whose bias exists for the first `biased` outputs only."""

    def __init__(self, inputs: int, outputs: int, biased: int, **kwargs):
        super().__init__(inputs, outputs, bias=False, **kwargs)
        self.bias = nn.Parameter(torch.zeros(biased, **kwargs))

    def forward(self, x: Tensor) -> Tensor:
        # a padded bias rides in the product for free; adding it to a part of the output would copy that part
        return F.linear(x, self.weight, F.pad(self.bias, (0, self.out_features - self.bias.shape[0])))


class FactoredAttention(nn.Module):
    """Attention `(B, N, in) -> (B, N, out)`: in each head queries and keys are `key_dim` wide, values `value_dim`.

    `qkv` packs the rows of queries, keys and values, head-major within each: `Linear(in, heads * (2 r1 + r2))`; `proj`
    is `Linear(heads * r2, out)`. Scores are multiplied by `scale`, that of the original heads. Where r1 and r2 differ,
    the narrower ones are padded with zeros before the fused attention: CPU and GPU kernels take one width only, and
    without the padding torch falls back to the unfused form (measured: 1.7 times the time on a CPU).

    `biased` rows of `qkv`, from the first on, have a bias: the queries' r1 * heads where all biases are absorbed.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        scale: float,
        *,
        biased: int,
        proj_bias: bool,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **kwargs,
    ):
        super().__init__()
        self.num_heads, self.key_dim, self.value_dim, self.scale = num_heads, key_dim, value_dim, scale
        self.widths = [num_heads * key_dim, num_heads * key_dim, num_heads * value_dim]
        width = sum(self.widths)
        if 0 < biased < width:
            self.qkv = PackedLinear(inputs, width, biased, **kwargs)
        else:
            self.qkv = nn.Linear(inputs, width, bias=biased > 0, **kwargs)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.num_prefix_tokens, self.rotate_half = 0, False  # of rotary positions
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(num_heads * value_dim, outputs, bias=proj_bias, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def head_dim(self) -> int:
        """Dimensions of queries and keys in each head, as UVC calls them."""
        return self.key_dim

    @property
    def values(self) -> tuple[int, ...]:
        """Value dimensions of each head, as UVC calls them."""
        return (self.value_dim,) * self.num_heads

    def _rotated(self, t: Tensor, rope: Tensor) -> Tensor:
        prefix, grid = t[:, :, : self.num_prefix_tokens], t[:, :, self.num_prefix_tokens :]
        return torch.cat([prefix, apply_rot_embed_cat(grid, rope, half=self.rotate_half)], dim=2).type_as(t)

    def forward(
        self, x: Tensor, *, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        parts = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in parts)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotated(q, rope), self._rotated(k, rope)
        if not torch.onnx.is_in_onnx_export():  # ONNX has plain products, where padding would only cost
            width = max(self.key_dim, self.value_dim)
            q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
        dropout = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
        )
        y = y[..., : self.value_dim].transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(self.norm(y)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}, scale={self.scale:.4g}"


# --- reading the maps out of a module, and writing them -------------------------------------------------------------


@dataclass
class Heads:
    """The maps of one attention: `q, k (H, d, k)`, `v (H, d, k')`, `o (H, k', out)`, biases `bq, bk (H, k)`, `bv (H,
    k')`, `bo (out,)`, zero where there are none."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    bq: Tensor
    bk: Tensor
    bv: Tensor
    bo: Tensor


def read_heads(m: nn.Module) -> Heads:
    """The maps of timm's fused attention or of a `FactoredAttention`."""
    heads, rows, values = m.num_heads, m.qkv.out_features, m.proj.in_features
    widths = [(rows - values) // 2, (rows - values) // 2, values]
    bias = m.qkv.bias
    if getattr(m, "q_bias", None) is not None:  # EVA
        bias = torch.cat([m.q_bias, m.k_bias, m.v_bias])
    if bias is None:
        bias = m.qkv.weight.new_zeros(rows)
    bias = F.pad(bias.detach(), (0, rows - bias.shape[0]))
    weights = [w.unflatten(0, (heads, -1)).mT for w in m.qkv.weight.detach().split(widths)]
    biases = [b.unflatten(0, (heads, -1)) for b in bias.split(widths)]
    o = m.proj.weight.detach().T.unflatten(0, (heads, -1))
    bo = o.new_zeros(o.shape[-1]) if m.proj.bias is None else m.proj.bias.detach()
    return Heads(*weights, o, *biases, bo)


def factored_attention(m: nn.Module, heads: Heads, *, biased: int, proj_bias: bool) -> FactoredAttention:
    """A `FactoredAttention` with the maps `heads` and what `m` has around them (scale, norms, dropout, positions)."""
    weight = m.qkv.weight
    new = FactoredAttention(
        heads.q.shape[1],
        heads.o.shape[2],
        heads.q.shape[0],
        heads.q.shape[2],
        heads.v.shape[2],
        m.scale,
        biased=biased,
        proj_bias=proj_bias,
        attn_drop=m.attn_drop.p,
        proj_drop=m.proj_drop.p,
        device="meta",  # no random start, which would also move the caller's generator
        dtype=weight.dtype,
    ).to_empty(device=weight.device)
    new.q_norm, new.k_norm, new.norm = m.q_norm, m.k_norm, getattr(m, "norm", nn.Identity())
    new.num_prefix_tokens = getattr(m, "num_prefix_tokens", 0)
    new.rotate_half = getattr(m, "rotate_half", False)
    with torch.no_grad():
        new.qkv.weight.copy_(torch.cat([w.mT.flatten(0, 1) for w in (heads.q, heads.k, heads.v)]))
        new.proj.weight.copy_(heads.o.flatten(0, 1).T)
        if biased:
            rows = torch.cat([b.flatten() for b in (heads.bq, heads.bk, heads.bv)])
            new.qkv.bias.copy_(rows[:biased])
        if proj_bias:
            new.proj.bias.copy_(heads.bo)
    for parameter in new.parameters():
        parameter.requires_grad_(weight.requires_grad)
    return new.train(m.training)


def factored_linear(m: nn.Module, left: Tensor, right: Tensor, bias: Tensor | None) -> FactoredLinear:
    """A `FactoredLinear` with `left (in, r)`, `right (r, out)`, `bias (out,)` in the place of the linear layer `m`."""
    weight = next(m.parameters())
    new = FactoredLinear(
        left.shape[0], right.shape[1], left.shape[1], bias is not None, device="meta", dtype=weight.dtype
    ).to_empty(device=weight.device)
    with torch.no_grad():
        new.first.weight.copy_(left.T)
        new.second.weight.copy_(right.T)
        if bias is not None:
            new.second.bias.copy_(bias)
    for parameter in new.parameters():
        parameter.requires_grad_(weight.requires_grad)
    return new.train(m.training)


def read_linear(m: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(W, None, bias)` of a linear layer, `W (in, out)`; `(A, B, bias)` of a factored one."""
    if isinstance(m, FactoredLinear):
        bias = m.second.bias
        a, b = m.first.weight.detach().T, m.second.weight.detach().T
    else:
        a, b, bias = m.weight.detach().T, None, m.bias
    return a, b, None if bias is None else bias.detach()


def query_side(heads: Heads, absorb: bool) -> Tensor:
    """`(H, d [+ 1], k)`: the queries' maps, with their bias as a last row where it is absorbed."""
    return torch.cat([heads.q, heads.bq[:, None]], 1) if absorb else heads.q
