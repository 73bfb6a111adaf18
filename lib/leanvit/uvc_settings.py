"""What the corrected solver of UVC may be told: which kinds of groups may go, rates and gains of a whole search.

The quantities are those of UVC's specification, 2.8.
"""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Settings:
    """How the corrected solver searches. Rates are for the whole search.

    The default `importance="loss"` (Fisher's estimate) was chosen over the specification's norms (`"norms"`) on
    held-out training images: the embedded backbone at 50 % of its FLOPs, one seed.

    `heads`, `dims`, `units`, `blocks`: what may go. `dims` is off: value dimensions narrower than the keys save FLOPs
    that a CPU hardly notices. `keep_patches`: how many patch positions go through the blocks; the search finds which.

    Raises `ValueError` for a value of another kind or out of range, and where nothing may go.
    """

    heads: bool = True
    dims: bool = False
    units: bool = True
    blocks: bool = True
    keep_patches: int | None = None
    importance: str = "loss"  # of a group: what its removal costs ("loss", Fisher's estimate), or the paper's "norms"
    warmup: float = 0.0  # part of the steps in which the weights alone learn, under random gates
    ramp: float = 0.5  # part of the rest in which the target falls to the budget; then masks and gates are fixed
    width_rate: float = 12.0  # of the fractions removed
    gate_rate: float = 28.0  # of the gates' logits, with momentum 0.9
    gate_start: float = 3.0  # logit: a block runs with probability 0.95 at first
    y_rate: float = 4.0  # of the duals of the least-k sums
    y_limit: float = 0.1
    shrink: float = 56.0  # proximal step, times y
    z_integral: float = 120.0
    z_proportional: float = 60.0
    z_limit: float = 20.0
    round_units: int = 16
    round_dims: int = 8
    lr: float = 1e-4
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    lr_warmup: float = 0.05  # part of the steps
    seed: int = 0

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("heads", "dims", "units", "blocks"):
                if not isinstance(value, bool):
                    raise ValueError(f"Settings: {f.name}={value!r} must be True or False")
            elif f.name == "importance":
                if value not in ("loss", "norms"):
                    raise ValueError(f"Settings: importance={value!r} must be loss or norms")
            elif f.name == "keep_patches" and value is None:
                continue
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"Settings: {f.name}={value!r} is not a finite number")
            elif value < 0 and f.name != "gate_start":
                raise ValueError(f"Settings: {f.name}={value} must be >= 0")
        for name in ("round_units", "round_dims", "seed", "keep_patches"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or (value < 1 and name != "seed")):
                raise ValueError(f"Settings: {name}={value!r} must be a whole number of at least 1")
        if not (self.heads or self.dims or self.units or self.blocks):
            raise ValueError("Settings: nothing may go; let at least one of heads, dims, units, blocks be True")
        if not 0 < self.ramp <= 1 or self.warmup >= 1:
            raise ValueError(f"Settings: ramp={self.ramp} must be in (0, 1] and warmup={self.warmup} in [0, 1)")
