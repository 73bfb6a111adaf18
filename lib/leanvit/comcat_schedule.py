"""When to search and how hot: the schedules of ComCAT and of Adaptive-ComCAT, and the penalty on the size.

Adaptive-ComCAT (The Visual Computer; here after its released code and log) searches less often once the ranks stay: a
coefficient F doubles while they do and falls to 1 when they change (specification 3.2). Its name for this is dynamic
programming; it is exponential back-off with reset.
"""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Schedule:
    """Which epochs search. `due(epoch)` asks, `record(epoch, ranks)` tells what the search of that epoch chose.

    `adaptive=False` is ComCAT: every epoch from `first` on. Adaptive: the next search comes F epochs after the last;
    ranks count as the same when `sum |change| / sum <= tolerance`; F stays at or below `cap`. `faithful`: the released
    gate, epochs that F divides (so the gap after a search is the way to the next multiple of F); no tolerance, no cap.

    Raises `ValueError` for a `first` or `tolerance` below 0, a `cap` below 1, and a faithful gate with one of the two.
    """

    adaptive: bool = True
    faithful: bool = False
    first: int = 1
    tolerance: float = 0.0
    cap: int | None = None
    coefficient: int = 1
    next: int = -1
    history: list[tuple[int, list[int]]] = field(default_factory=list)

    def __post_init__(self):
        if self.first < 0 or self.tolerance < 0 or (self.cap is not None and self.cap < 1):
            raise ValueError(
                f"Schedule: first={self.first} and tolerance={self.tolerance} must be >= 0, cap={self.cap} >= 1 or None"
            )
        if self.faithful and (self.tolerance or self.cap):
            raise ValueError("Schedule: the faithful schedule has neither tolerance nor cap; leave them at 0 and None")
        self.next = max(self.next, self.first)

    def due(self, epoch: int) -> bool:
        """Does this epoch begin with a search?"""
        if self.faithful:
            return epoch >= self.first and epoch % self.coefficient == 0
        return epoch >= self.next

    def record(self, epoch: int, ranks: list[int]) -> None:
        """The search of `epoch` chose `ranks` (one number a part, in a fixed order)."""
        ranks = [int(r) for r in ranks]
        if self.adaptive and self.history:
            stay = self._same(self.history[-1][1], ranks)
            self.coefficient = 2 * self.coefficient if stay else 1
            if self.cap is not None:
                self.coefficient = min(self.coefficient, self.cap)
        self.history.append((epoch, ranks))
        self.next = epoch + self.coefficient

    def _same(self, old: list[int], new: list[int]) -> bool:
        change = sum(abs(a - b) for a, b in zip(old, new, strict=True))
        return change <= self.tolerance * max(1, sum(old))

    def state_dict(self) -> dict:
        """What `load_state_dict` needs to go on: plain data."""
        return {"coefficient": self.coefficient, "next": self.next, "history": [[e, list(r)] for e, r in self.history]}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self.coefficient, self.next = state["coefficient"], state["next"]
        self.history = [(e, list(r)) for e, r in state["history"]]


def temperature(k: float, epochs: int, start: float = 5.0, end: float = 0.1) -> float:
    """Temperature after `k` of `epochs` decays, `start (end / start)^(k / epochs)` (specification 2.4).

    The authors decay once a search, the corrected mode once an epoch.
    """
    return start * (end / start) ** (k / epochs)


def penalised(loss: Tensor, size: Tensor, budget: int, beta: float = 1.5, always: bool = False) -> Tensor:
    """`loss (P / eps)^beta` for the expected size P (paper, Eq. 6); loss and size are scalars, P and eps count weights.

    The released code leaves the loss alone at P <= eps; `always` is the paper's form.
    """
    return loss * (size / budget) ** beta if always or float(size.detach()) > budget else loss
