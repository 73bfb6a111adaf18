"""Published against measured: each comparison at and beyond its edge, and entries that cannot be compared."""

import numpy
import pytest

from leanvit import claims, params, record

ENTRY = {
    "id": "a",
    "paper": "P",
    "table": "Table 1",
    "claim": "what it says",
    "value": 100.0,
    "tag": "C",
    "kind": "structural",
    "compare": "equal",
    "needs": "a GPU",
    "unit": "MFLOPs",
}


def claim(**changes):
    """A claim that differs from the usual one."""
    return claims.Claim(**{**ENTRY, **changes})


def verdict(ours, **changes):
    """What becomes of `ours` against a claim."""
    return claims.check([claim(**changes)], {"a": ours})[0]


@pytest.mark.parametrize(
    ("changes", "ours", "expected"),
    [
        ({}, 100, "matches"),
        ({}, 100.0 + 1e-10, "matches"),  # the last bits of a float
        ({}, 100.001, "differs"),
        ({"tolerance": {"abs": 0.5}}, 100.5, "matches"),
        ({"tolerance": {"abs": 0.5}}, 99.4, "differs"),
        ({"tolerance": {"rel": 0.01}}, 101.0, "matches"),
        ({"tolerance": {"rel": 0.01}}, 98.9, "differs"),
        ({"value": -100.0, "tolerance": {"rel": 0.01}}, -100.9, "matches"),
        ({"value": 0, "tolerance": {"rel": 0.5}}, 0.1, "differs"),
        ({"compare": "at_least"}, 100.0, "matches"),
        ({"compare": "at_least"}, 1e9, "matches"),
        ({"compare": "at_least"}, 99.99, "differs"),
        ({"compare": "at_least", "tolerance": {"abs": 0.1}}, 99.95, "matches"),
        ({"compare": "at_most"}, 100.0, "matches"),
        ({"compare": "at_most"}, 100.01, "differs"),
        ({"compare": "true", "value": True}, True, "matches"),
        ({"compare": "true", "value": True}, numpy.bool_(False), "differs"),
        ({}, numpy.float32(100), "matches"),
        ({}, float("nan"), "differs"),
        ({"compare": "at_least"}, float("inf"), "differs"),  # no number, so no evidence
        ({}, None, "not run"),
    ],
)
def test_verdicts(changes, ours, expected):
    assert verdict(ours, **changes).verdict == expected


def test_a_difference_is_explained():
    assert verdict(94.0, tolerance={"rel": 0.01}).why == "94 against 100 (-6 %), tolerance 0.01 of it"
    assert verdict(94.0, compare="at_least").why == "94 against at least 100 (-6 %)"
    assert verdict(None).why == "a GPU"
    assert claims.check([claim()], {})[0].why == "a GPU"


def test_a_mean_brings_its_spread():
    got = verdict(record.summary([99.0, 101.0]))
    assert (got.verdict, got.ours, got.spread) == ("matches", 100.0, pytest.approx(2**0.5))
    assert "± 1.4" in claims.table([got])["ours"][0]


def test_a_number_that_was_never_found_cannot_match():
    got = verdict(5.0, value=None, tag="N")
    assert got.verdict == "not run" and "no published number" in got.why and got.ours == 5.0


def test_mistakes_of_the_notebook_are_raised():
    with pytest.raises(KeyError, match="no claim has the id flops_a .did you mean flops_b"):
        claims.check([claim(id="flops_b")], {"flops_a": 1})
    with pytest.raises(TypeError, match="true or false"):
        verdict(1.0, compare="true", value=True)
    with pytest.raises(TypeError, match="has the number 100.0, but what was measured is True"):
        verdict(True)


def write(path, *entries):
    """A claims file."""
    import json

    path.write_text(json.dumps(list(entries)))  # JSON is YAML
    return path


def test_load(tmp_path):
    loaded = claims.load(write(tmp_path / "claims.yaml", ENTRY, {**ENTRY, "id": "b", "compare": True, "value": True}))
    assert [item.id for item in loaded] == ["a", "b"]
    assert loaded[0] == claim() and loaded[1].compare == "true"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tag": "X"}, r"entry 1 \(a\): tag is 'X'; it must be one of C, A, S"),
        ({"kind": "sped"}, "kind is 'sped'"),
        ({"compare": "about"}, "compare is 'about'"),
        ({"colour": 1}, "there is no field colour"),
        ({"tolerence": 1}, "did you mean tolerance"),
        ({"value": "many"}, "value is 'many'; it must be a number"),
        ({"value": None}, "null only with the tag N"),
        ({"value": True}, "value is True; it must be a number"),
        ({"compare": "true"}, "so value must be true"),
        ({"kind": "accuracy"}, "kind accuracy that must be equal needs a tolerance"),
        ({"tolerance": 0.1}, "tolerance is 0.1"),
        ({"tolerance": {"abs": -1}}, "tolerance is"),
        ({"tolerance": {"abs": 1, "rel": 1}}, "tolerance is"),
        ({"needs": None}, "must be text"),
    ],
)
def test_malformed_entries_are_named(tmp_path, changes, message):
    with pytest.raises(params.ParameterError, match=message):
        claims.load(write(tmp_path / "claims.yaml", {**ENTRY, **changes}))


def test_malformed_files_are_named(tmp_path):
    path = tmp_path / "claims.yaml"
    for text, message in (
        ("", "must hold a list"),
        ("a: 1", "must hold a list"),
        ("- 1", "entry 1: must be a mapping"),
    ):
        path.write_text(text)
        with pytest.raises(params.ParameterError, match=message):
            claims.load(path)
    with pytest.raises(params.ParameterError, match="the id a stands twice"):
        claims.load(write(path, ENTRY, ENTRY))
    with pytest.raises(params.ParameterError, match="table, needs missing"):
        claims.load(write(path, {name: value for name, value in ENTRY.items() if name not in ("table", "needs")}))


def test_counts_and_table():
    verdicts = claims.check([claim(), claim(id="b"), claim(id="c")], {"a": 100, "b": 7})
    assert claims.counts(verdicts) == {"matches": 1, "differs": 1, "not run": 1}
    assert claims.counts([vars(item) for item in verdicts]) == claims.counts(verdicts)
    table = claims.table(verdicts)
    assert list(table["verdict"]) == ["matches", "differs", "not run"]
    assert list(table["ours"]) == ["100", "7", "–"] and table["where"][0] == "P, Table 1 [C]"
