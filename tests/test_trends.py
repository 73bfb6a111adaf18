"""Trends: what counts as a clear difference, what is reversed, undecided, or told by too few seeds."""

import pytest

from leanvit import record, trends


def test_a_difference_is_clear_when_it_exceeds_its_spread_over_three_seeds():
    assert trends.clear(record.summary([2.0, 3.0, 4.0]))
    assert not trends.clear(record.summary([0.0, 3.0, -2.0]))
    assert not trends.clear(record.summary([2.0, 3.0]))  # two seeds decide nothing
    assert not trends.clear(record.summary([-2.0, -3.0, -4.0]))
    assert trends.clear(record.summary([1.0, 1.0, 1.0]))
    assert not trends.clear(record.summary([0.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([2.0, 3.0, 4.0], "holds"),
        ([-2.0, -3.0, -4.0], "reversed"),
        ([0.0, 3.0, -2.0], "undecided"),
        ([0.0, 0.0, 0.0], "undecided"),
        ([2.0, 3.0], "too few seeds"),
    ],
)
def test_outcome_in_one_word(values, word):
    assert trends.outcome(record.summary(values)) == word


def test_a_rule_of_the_caller_decides_what_holds():
    near = record.summary([0.1, -0.1, 0.3])  # "within one point" holds without a clear difference
    assert trends.outcome(near, True) == "holds"
    assert trends.outcome(record.summary([-2.0, -3.0, -4.0]), False) == "reversed"
    assert trends.outcome(record.summary([0.1, -0.1]), True) == "too few seeds"


def test_differences_are_paired():
    assert trends.less([3.0, 5.0, 4.0], [1.0, 4.0, 4.0])["values"] == [2.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="less: 3 and 2 values"):
        trends.less([3.0, 5.0, 4.0], [1.0, 4.0])


def test_weakest_takes_what_is_not_clear_before_what_is_small():
    wide, small = record.summary([9.0, 1.0, -1.0]), record.summary([0.2, 0.2, 0.2])
    assert trends.weakest({"small": small, "wide": wide}) == ("wide", wide)
    assert trends.weakest({"small": small, "large": record.summary([5.0, 5.0, 5.0])}) == ("small", small)
