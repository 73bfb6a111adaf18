"""The modules of a model that UVC has cut, where timm's own do not serve: heads of several widths, fewer patches.

What is left of an attention is that of UVC's specification, 5.3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlicedAttention(nn.Module):
    """Self-attention whose heads have `head_dim` query and key dimensions and `values[i]` value dimensions each.

    `(B, N, C) -> (B, N, C)`, with an optional additive or boolean `attn_mask`; `ValueError` for one mask a head. Runs
    of neighbouring heads of equal width are computed together, so heads sorted by width are the fastest
    (specification, 5.3).
    """

    def __init__(self, attn: nn.Module, qkv: nn.Linear, proj: nn.Linear, values: Sequence[int]):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = len(values), attn.head_dim, attn.scale
        self.values = tuple(values)
        self.qkv, self.proj = qkv, proj
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.attn_drop, self.proj_drop = attn.attn_drop, attn.proj_drop
        self.training = attn.training

    @property
    def widths(self) -> list[int]:
        """Rows of `qkv` that are queries, keys and values."""
        inner = self.num_heads * self.head_dim
        return [inner, inner, sum(self.values)]

    def runs(self) -> list[tuple[int, int, int]]:
        """`(first head, heads, width)` of each run of neighbouring heads of equal width."""
        runs: list[tuple[int, int, int]] = []
        for i, width in enumerate(self.values):
            if runs and runs[-1][2] == width:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, width)
            else:
                runs.append((i, 1, width))
        return runs

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        images, tokens, _ = x.shape
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        q, k = (t.reshape(images, tokens, self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k))
        q, k = self.q_norm(q), self.k_norm(k)
        if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1] > 1:
            raise ValueError("SlicedAttention takes one attention mask for all heads, its heads are not the model's")
        outputs, first_value = [], 0
        for first, heads, width in self.runs():
            heads_q, heads_k = q[:, first : first + heads], k[:, first : first + heads]
            heads_v = v[..., first_value : first_value + heads * width]
            heads_v = heads_v.reshape(images, tokens, heads, width).transpose(1, 2)
            out = self._attend(heads_q, heads_k, heads_v, attn_mask, is_causal)
            outputs.append(out.transpose(1, 2).reshape(images, tokens, heads * width))
            first_value += heads * width
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return self.proj_drop(self.proj(out))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        # torch's fused CPU kernel wants values as wide as queries and falls back to one that takes twice the time of
        # the plain products
        if q.is_cuda or v.shape[-1] == q.shape[-1] or attn_mask is not None or is_causal:
            drop = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask, drop, is_causal, scale=self.scale)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        return self.attn_drop(weights) @ v

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, values={self.values}"


class KeepPatches(nn.Module):
    """`(B, prefix + n, C) -> (B, prefix + kept, C)`: takes the kept patch tokens, with their position embeddings, out.

    `tokens`: prefix + n, those of the grid on which the patches were chosen; any other number is a `ValueError`.
    """

    def __init__(self, keep: Sequence[int], prefix: int, tokens: int | None = None):
        super().__init__()
        self.uvc_keep, self.tokens = tuple(keep), tokens
        index = torch.tensor([*range(prefix), *(prefix + k for k in keep)])
        self.register_buffer("index", index, persistent=False)  # the plan holds it

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens is not None:
            check_grid(x, self.tokens)
        return x.index_select(1, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.uvc_keep)} patches"


def check_grid(x: Tensor, tokens: int) -> None:
    """Raise `ValueError` where `x (B, N, C)` has another number of tokens than the grid that patches were chosen on."""
    if x.shape[1] != tokens:
        raise ValueError(
            f"KeepPatches: tokens={x.shape[1]} must be {tokens}, those of the grid that the plan was made for; patches "
            "are kept by their places, so give images of that size"
        )


def refuse_open_search(model: nn.Module, what: str) -> None:
    """Raise `ValueError` where the gates and masks of a search that was not closed still act on `model`."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    if any(getattr(hook, "__module__", None) == "leanvit.uvc_training" for hook in hooks):
        raise ValueError(
            f"{what}: a UVC search is open on this {type(model).__name__}; call its close() first (before copying it)"
        )
