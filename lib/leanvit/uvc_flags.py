"""The flags of UVC's released command line: which do something, with what default, and why others are refused.

See the specification of UVC (arXiv 2203.08243), sections 2.7 and 3.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

NEVER_USED = "is parsed and never used in the authors' code"

# flag -> why it is refused
INERT = {
    "patch_weight": NEVER_USED,
    "patch_l1_weight": NEVER_USED,
    "patchloss": NEVER_USED,
    "patchlr": f"{NEVER_USED}; their patch gates move at the weights' rate",
    "warmup_lr": "is overwritten by the scheduler after one step",
    "save_budgets": NEVER_USED,
    "patch_ratio": "only sets tokens to zero, which saves nothing; keep_patches= of the corrected solver removes them",
}
# flag -> (the value that is accepted, why no other is)
ONLY = {
    "enable_patch_gating": (
        0,
        "saves no FLOPs; keep_patches= of the corrected solver removes patches",
    ),
    "enable_pruning": (1, "calls a function with 14 arguments that takes 10: it crashes"),
    "flops_with_mhsa": (1, "crashes in the authors' resource function"),
    "enable_part_gating": (0, "is only partly wired in the authors' code"),
    "enable_jumping": (0, "is a network of its own and in no published run"),
    "warmup_reset": (0, "is in no published run"),
    "soptim": ("sgd", "is in no published run"),
    "roptim": ("sgd", "is in no published run"),
}
# flags of the launch, the data and the loss: the caller's matter
CALLERS = {
    "gpu_num", "uvc_train", "model_type", "model_path", "distillation_type", "distillation_alpha", "distillation_tau",
    "train_batch_size", "eval_every", "enable_deit", "num_workers", "output_dir", "log_interval",
}  # fmt: skip

# the command of the authors' README, stage 1, without the address of the weights
README = (
    "--gpu_num 0,1 --uvc_train --model_type deit_tiny_patch16_224 --distillation-type soft --distillation-alpha 0.1 "
    "--train_batch_size 512 --num_epochs 30 --eval_every 1000 --flops_with_mhsa 1 --zlr_schedule_list 1,5,9,13,17 "
    "--learning_rate 1e-4 --enable_deit 0 --budget 0.5 --enable_pruning 1 --enable_block_gating 1 "
    "--enable_patch_gating 1 --gating_weight 5e-4 --patch_weight 5 --patch_l1_weight 0.01 --patchloss l1 "
    "--use_gumbel 1 --glr 0.1 --patchlr 0.01 --num_workers 64 --seed 730 "
    "--output_dir mc_deit_tiny_patch16_224_with_patch --log_interval 1000 --eps 0.1 --eps_decay 0.92 "
    "--enable_warmup 1 --warmup_epochs 5 --warmup_lr 1e-4 --z_grad_clip 0.5 --gating_interval 50"
).split()


@dataclass(frozen=True)
class Flags:
    """The authors' flags that do something, with the values of their README's command (the last ones are hidden).

    Raises `ValueError` for a value of another kind or out of range.
    """

    budget: float = 0.5
    num_epochs: int = 30
    learning_rate: float = 1e-4
    zlr_schedule_list: str = "1,5,9,13,17"
    enable_block_gating: int = 1
    gating_weight: float = 5e-4
    gating_interval: int = 50
    use_gumbel: int = 1
    glr: float = 0.1
    z_grad_clip: float = 0.5
    eps: float = 0.1
    eps_decay: float = 0.92
    enable_warmup: int = 1
    warmup_epochs: int = 5
    seed: int = 730
    slr: float = 0.02
    rlr: float = 0.02
    ylr: float = 1e-4
    plr: float = 1e-4
    sl2wd: float = 0.0
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    warmup_steps: int = 500

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "zlr_schedule_list":
                continue
            whole = f.type in ("int", int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"--{f.name} {value!r} must be {'a whole number' if whole else 'a number'}")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"--{f.name} {value} must be a finite number of at least 0")
        for name in ("enable_block_gating", "use_gumbel", "enable_warmup"):
            if getattr(self, name) not in (0, 1):
                raise ValueError(f"--{name} {getattr(self, name)} must be 0 or 1")
        if self.num_epochs < 1 or self.gating_interval < 1:
            raise ValueError("--num_epochs and --gating_interval must be at least 1")
        if not 0 < self.budget <= 1:
            raise ValueError(f"--budget {self.budget} must be in (0, 1]")
        zlr_schedule(self.zlr_schedule_list, self.num_epochs)


@dataclass
class Parsed:
    """A command line of the authors, sorted: what the solver takes, what the caller must do, what did nothing."""

    flags: Flags
    caller: dict[str, Any] = field(default_factory=dict)
    inert: dict[str, str] = field(default_factory=dict)  # flag -> why


def zlr_schedule(text: str, num_epochs: int) -> dict[int, float]:
    """`{first epoch: rate of z}` of a list "v0,v1,..", v_j from epoch `j floor(num_epochs / m)` (specification, 2.3).

    >>> from leanvit.uvc_flags import zlr_schedule
    >>> zlr_schedule("1,5,9,13,17", 30)
    {0: 1.0, 6: 5.0, 12: 9.0, 18: 13.0, 24: 17.0}

    Raises `ValueError` for anything but numbers, or more of them than epochs.
    """
    try:
        rates = [float(v) for v in text.split(",")]
    except (AttributeError, ValueError):
        raise ValueError(f'--zlr_schedule_list {text!r} must be numbers with commas, as "1,5,9,13,17"') from None
    if not all(math.isfinite(v) and v >= 0 for v in rates) or len(rates) > num_epochs:
        raise ValueError(f"--zlr_schedule_list {text!r} must be at most num_epochs={num_epochs} finite rates >= 0")
    return {j * (num_epochs // len(rates)): v for j, v in enumerate(rates)}


def from_flags(flags: Mapping[str, Any] | Sequence[str], *, inert: str = "refuse") -> Parsed:
    """Read the authors' flags: a command line split into words, or `{name: value}`, names with or without dashes.

    A flag that did nothing in their code, or crashed it, raises `ValueError` with the reason; with `inert="drop"` it is
    left out and listed, so that the README's command (`README`) can be taken as it is. Unknown flags raise always.

    >>> from leanvit.uvc_flags import README, from_flags
    >>> from_flags(README, inert="drop").inert["patch_weight"]
    "--patch_weight 5: it is parsed and never used in the authors' code"
    """
    if inert not in ("refuse", "drop"):
        raise ValueError(f'inert={inert!r} must be "refuse" or "drop"')
    known = {f.name: f for f in fields(Flags)}
    given = {_name(k): v for k, v in (flags if isinstance(flags, Mapping) else _pairs(flags)).items()}
    values, caller, dropped = {}, {}, {}
    for name, value in given.items():
        if name in known:
            values[name] = _value(name, value, known[name].default)
        elif name in CALLERS:
            caller[name] = value
        elif name in INERT or name in ONLY:
            accepted, why = ONLY.get(name, (None, INERT.get(name)))
            if name not in ONLY or str(value) != str(accepted):
                dropped[name] = f"--{name} {value}: it {why}"
        else:
            near = difflib.get_close_matches(name, [*known, *CALLERS, *INERT, *ONLY], n=1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise ValueError(f"--{name} is no flag of UVC{hint}")
    result = Flags(**values)
    gone = {"eps", "eps_decay"} & set(values)
    if result.use_gumbel and gone:
        dropped |= {n: f"--{n} {values[n]}: it has no effect with use_gumbel 1" for n in sorted(gone)}
    if dropped and inert == "refuse":
        raise ValueError(f"{next(iter(dropped.values()))}; leave it out")
    return Parsed(result, caller, dropped)


def _name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            if name in pairs:
                raise ValueError(f"{name} is given twice")
            pairs[name] = value if value else True
        elif name is None or pairs[name] is not True:
            raise ValueError(f"{word!r} follows no flag")
        else:
            pairs[name] = word
    return pairs


def _value(name: str, value: Any, default: Any) -> Any:
    """A flag's value as a number of its kind."""
    if isinstance(default, str) or not isinstance(value, str):
        return value
    try:
        return type(default)(value)
    except ValueError:
        raise ValueError(f"--{name} {value!r} must be {'a whole number' if isinstance(default, int) else 'a number'}") \
            from None  # fmt: skip
