"""Pareto fronts, the choice under limits, and the peak memory of one call."""

import math

import matplotlib
import pytest
import torch

matplotlib.use("agg")

from leanvit import pareto, peak, plots  # noqa: E402

POINTS = {"a": (1.0, 50.0), "b": (2.0, 70.0), "c": (2.0, 60.0), "d": (3.0, 70.0), "e": (4.0, 71.0), "f": (0.5, 10.0)}


def test_front_holds_what_no_other_dominates():
    assert pareto.front(POINTS) == ["f", "a", "b", "e"]
    for name, (cost, merit) in POINTS.items():
        beaten = any((c < cost and m >= merit) or (c <= cost and m > merit) for c, m in POINTS.values())
        assert (name not in pareto.front(POINTS)) == beaten


def test_front_of_equals_ties_and_one():
    assert pareto.front({"x": (1, 1), "y": (1, 1)}) == ["x", "y"]
    assert pareto.front({"x": (1, 1), "y": (1, 2)}) == ["y"]
    assert pareto.front({"x": (1, 1)}) == ["x"] and pareto.front({}) == []
    with pytest.raises(ValueError, match="bad lies at"):
        pareto.front({"bad": (1.0, math.nan), "x": (1, 1)})


def test_draw_joins_the_front_and_fades_the_rest():
    summary = {n: ({"mean": c, "std": 0.1}, {"mean": m, "std": 0.0}) for n, (c, m) in POINTS.items()}
    fig, ax = plots.figure()
    assert pareto.draw(ax, summary, plots.looks(POINTS)) == ["f", "a", "b", "e"]
    alphas = {c.get_label(): c.lines[0].get_alpha() for c in ax.containers}
    assert {n for n, alpha in alphas.items() if alpha == 1} == {"f", "a", "b", "e"}
    assert {n for n, alpha in alphas.items() if alpha == pareto.FAINT} == {"c", "d"}


def test_choose_keeps_every_limit():
    rows = [{"name": n, "cost": c, "merit": m, "old": 100 - m} for n, (c, m) in POINTS.items()]
    rows.append({"name": "unknown", "cost": None, "merit": 99.0, "old": math.nan})
    assert pareto.choose(rows, "merit")["name"] == "unknown"
    assert pareto.choose(rows, "merit", at_most={"cost": 3})["name"] == "b"  # the earlier of equals
    assert pareto.choose(rows, "merit", at_most={"cost": 3}, at_least={"old": 40})["name"] == "c"
    assert pareto.choose(rows, "merit", at_most={"cost": 0.1}) is None
    with pytest.raises(KeyError):
        pareto.choose(rows, "merit", at_most={"weight": 1})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_peak_counts_what_is_held_at_once(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.ones(2**20, device=device)  # 4 MiB that do not count

    def one_after_the_other():
        for _ in range(3):
            _ = before + 1

    def together():
        return [before + i for i in range(3)]

    assert peak.peak_bytes(one_after_the_other, device) <= 2 * before.nbytes + 4096
    assert peak.peak_bytes(one_after_the_other, device) >= before.nbytes
    assert 3 * before.nbytes <= peak.peak_bytes(together, device) <= 3 * before.nbytes + 4096
