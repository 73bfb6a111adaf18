"""Figures that hold what they were given."""

import pytest

from leanvit import plots


def test_trade_off_takes_a_spread_on_both_axes():
    look = plots.looks(["a", "b"])
    points = {"a": ({"mean": 2.0, "std": 0.5}, {"mean": 70.0, "std": 1.0}), "b": (4.0, {"mean": 80.0, "std": 0.0})}
    _, ax = plots.figure()
    plots.trade_off(ax, points, look, joined=["b", "a"])
    assert ax.lines[0].get_xydata().tolist() == [[4.0, 80.0], [2.0, 70.0]]
    horizontal, vertical = ax.containers[0].lines[2]
    assert horizontal.get_segments()[0].tolist() == [[1.5, 70.0], [2.5, 70.0]]
    assert vertical.get_segments()[0].tolist() == [[2.0, 69.0], [2.0, 71.0]]
    assert ax.containers[1].lines[2] == ()  # no spread, no bar


@pytest.mark.parametrize(("sources", "first_grey"), [([10], 11), ([3, 7, 11], 4)])
def test_block_stack_shows_copies_and_what_needs_no_backward_pass(sources, first_grey):
    _, ax = plots.figure()
    plots.block_stack(ax, 12, sources)
    boxes = dict(zip([t.get_text() for t in ax.texts], ax.patches, strict=True))
    copies = [f"copy of {i}" for i in sources]
    places = [boxes[name].get_y() + boxes[name].get_height() / 2 for name in copies]
    assert places == pytest.approx([i + j + 1 for j, i in enumerate(sources)])
    assert len(boxes) == 12 + len(sources) + 1 and list(boxes)[-1] == "head"
    learning = {name for name, box in boxes.items() if box.get_facecolor() == boxes["head"].get_facecolor()}
    assert learning == {*copies, "head"}
    pale = {name for name, box in boxes.items() if box.get_facecolor() == boxes["0"].get_facecolor()}
    assert pale == {str(i) for i in range(first_grey)}
