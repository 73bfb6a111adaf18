"""Low-rank factors of products of thin matrices: the mathematics of ComCAT (arXiv 2305.17235), torch alone.

Row vectors: `y = x W`, `W (in, out)`; a leading dimension runs over heads. A product `A B` of a thin `A (H, m, k)` and
`B (H, k, n)` is never formed: its singular values are those of the k x k core between two QR decompositions
(specification 1.2), O((m + n) k^2) instead of O(m n min(m, n)).
"""

import torch
from torch import Tensor


def product_svd(a: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of `a @ b` by the QR route (specification 1.2): `U (..., m, r), S (..., r), V (..., n, r)`, r = min(m, k, n).

    Args:
        a, b: `(..., m, k)` and `(..., k, n)`, float32 or wider, finite; without `b`, the SVD of `a` alone.

    Raises:
        ValueError: an entry is NaN or infinite.
    """
    for what, tensor in (("left", a), ("right", b)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(
                f"product_svd: the {what} factor {tuple(tensor.shape)} holds NaN or infinity; mend it first"
            )
    if b is None:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        return u, s, vh.mT
    k = a.shape[-1]
    left = a.shape[-2] > k
    right = b.shape[-1] > k
    qa, core = torch.linalg.qr(a) if left else (None, a)
    qb, rb = torch.linalg.qr(b.mT) if right else (None, b.mT)
    u, s, vh = torch.linalg.svd(core @ rb.mT, full_matrices=False)
    return (qa @ u if left else u), s, (qb @ vh.mT if right else vh.mT)


def split(u: Tensor, s: Tensor, v: Tensor, balanced: bool = True) -> tuple[Tensor, Tensor]:
    """`U diag(S) V^T`, `u (..., m, r)`, `s (..., r)`, `v (..., n, r)`, as `left (..., m, r)` and `right (..., r, n)`.

    Balanced, each side gets the square root of the singular values; otherwise the right side gets all of them, as in
    the authors' code. Both have the same product.
    """
    if not balanced:
        return u, s[..., :, None] * v.mT
    root = s.sqrt()
    return u * root[..., None, :], root[..., :, None] * v.mT


def roots(covariance: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """`C^(1/2)` and its pseudo-inverse, of symmetric `covariance (..., d, d)` plus `ridge * trace / d` on its diagonal.

    Directions whose eigenvalue is below rounding (d * eps of the largest) are no part of either. Float64 throughout.
    What data-aware factors are weighted by (specification 6.2).
    """
    covariance = covariance.double()
    d = covariance.shape[-1]
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0) + ridge * values.clamp_min(0).mean(-1, keepdim=True)
    kept = values > values.amax(-1, keepdim=True) * d * torch.finfo(torch.float64).eps
    root = torch.where(kept, values, 0).sqrt()
    inverse = torch.where(kept, root, 1).reciprocal() * kept
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT


class Spectrum:
    """What every rank of a product `a (..., m, k)`, `b (..., k, n)` is cut from: one SVD, kept in float32 or wider.

    With `left` and `right` = (C^(1/2), C^(-1/2)) of the two sides, the SVD is that of `C_l^(1/2) A B C_r^(1/2)`, whose
    truncations minimise the error under these covariances; the factors are brought back by the inverse roots. Then
    `energy[j]`, the sum of the squared singular values over heads, is the error that dropping direction j adds.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor | None,
        left: tuple[Tensor, Tensor] | None = None,
        right: tuple[Tensor, Tensor] | None = None,
    ):
        self.dtype = a.dtype
        wide = torch.float64 if left or right else torch.promote_types(a.dtype, torch.float32)
        a, b = left[0] @ a.to(wide) if left else a.to(wide), None if b is None else b.to(wide)
        self.u, self.s, self.v = product_svd(a, b @ right[0] if right else b)
        self.left, self.right = left, right

    @property
    def energy(self) -> Tensor:
        """`(r,)`: squared singular values, summed over heads."""
        energy = self.s.double().square()
        return energy.sum(0) if energy.dim() == 2 else energy

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return self.s.shape[-1]

    def factors(self, rank: int | None = None, balanced: bool = True, first: int = 0) -> tuple[Tensor, Tensor]:
        """`left (..., m, r)` and `right (..., r, n)` of the directions `first .. rank`: the best approximation."""
        cut = slice(first, rank)
        left, right = split(self.u[..., cut], self.s[..., cut], self.v[..., cut], balanced)
        left = self.left[1] @ left if self.left else left
        right = right @ self.right[1] if self.right else right
        return left.to(self.dtype), right.to(self.dtype)


def break_even(inputs: int, outputs: int) -> float:
    """The rank `in * out / (in + out)` at which a factored linear layer has the size of the dense one."""
    return inputs * outputs / (inputs + outputs)


def worthwhile(inputs: int, outputs: int) -> int:
    """The largest rank at which two thin products are also faster than the dense one, about 0.9 of `break_even`.

    Measured on CPUs: at the break-even rank itself 0.89 to 0.99 of the dense speed, at 0.9 of it 0.98 to 1.1.
    """
    return max(1, int(0.9 * break_even(inputs, outputs)))
