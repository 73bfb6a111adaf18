"""The parameter checker under anything that a file can hold: a value of the declared type or one ParameterError, soon.

Hypothesis draws the same examples each time (conftest.py). What a message says of a wrong value is in test_run.py.
"""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanvit import params

CELL = """\
flag: bool = True
steps: int = 3  # steps of training [1..100]
seed: int = 0  # [>= 0]
lr: float = 1e-3  # learning rate [> 0]
method: str = "exact"  # which method [one of exact|lora]
note: str | None = None
save_to: str | None = None  # folder beside the result [a plain name]
shots: list[int] = [5]  # images per class [1..64]
names: list[str] = []"""
KNOWN = params.parse_cell(CELL, "nb")
TYPES = {"bool": bool, "int": int, "float": float, "str": str}


def read(folder, content: bytes):
    """`resolve(read_values(file))` of a file with this content: the values, or None where it was refused."""
    file = folder / "smoke.yaml"
    file.write_bytes(content)
    began = time.process_time()
    try:
        values = params.resolve(KNOWN, params.read_values(file), "smoke.yaml")
    except params.ParameterError as error:
        values = None
        assert "smoke.yaml" in str(error)
        str(error).encode()  # a terminal must be able to print it
        assert all(len(line) < 1000 for line in str(error).splitlines())
    assert time.process_time() - began < 5
    return values


def right(parameter: params.Parameter, value) -> bool:
    """Whether a value is of the declared type and in its range, in plain words of this file."""
    if value is None:
        return parameter.optional
    if parameter.is_list:
        one = params.Parameter("", parameter.kind, None, "", low=parameter.low, high=parameter.high)
        return type(value) is list and all(right(one, v) for v in value)
    if type(value) is not TYPES[parameter.kind] or (parameter.choices and value not in parameter.choices):
        return False
    if type(value) in (int, float):
        low = -math.inf if parameter.low is None else parameter.low
        high = math.inf if parameter.high is None else parameter.high
        return math.isfinite(value) and low <= value <= high and not (parameter.low_open and value == low)
    return not parameter.plain_name or not set(value) & set("/\\\0:") and not value.startswith(".")


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.text(), st.dates(),
    st.datetimes(), st.binary(max_size=20), st.sampled_from(["../x", "/etc/passwd", "a/b", "", "..", "C:\\x", "x\0y"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@given(st.dictionaries(st.sampled_from([*KNOWN, "lrr", "x"]) | st.text(max_size=8), VALUES, max_size=4))
def test_any_value_is_of_its_type_or_refused_by_name(values):
    try:
        resolved = params.resolve(KNOWN, values, "f.yaml")
    except params.ParameterError as error:
        lines = str(error).splitlines()
        named = [n for n in values if n not in KNOWN or any(line.startswith(f"f.yaml: {n} = ") for line in lines)]
        assert named and (": must be " in str(error) or "there is no such parameter" in str(error))
        assert all(right(KNOWN[n], KNOWN[n].convert(v)) for n, v in values.items() if n not in named)
        str(error).encode()
        return
    assert list(resolved) == list(KNOWN) and set(values) <= set(KNOWN)
    assert all(right(KNOWN[n], v) for n, v in resolved.items())
    assert json.loads(json.dumps(resolved)) == resolved  # what the runner hands to its workers


@given(VALUES)
def test_yaml_brings_values_back(tmp_path_factory, value):
    """A value written as YAML (JSON is YAML) is what is read, and what `-p` reads; or it is refused by name."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError):
        return
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(f"note: {text}\n", encoding="utf-8", errors="surrogatepass")
    try:
        back = params.read_values(file)["note"]
    except params.ParameterError as error:
        assert "round.yaml" in str(error)
        return
    assert back == json.loads(text) and params.parse_value(text) == back
    assert read(file.parent, file.read_bytes()) in (None, {n: p.default for n, p in KNOWN.items()} | {"note": back})


PIECES = st.sampled_from(
    "lr steps seed flag method shots note names save_to << : - ? | > & * ! !! % @ ` { } [ ] , # \" ' ~ null 1 -0 "
    "1e400 .nan -.inf 0x 0o7 1_000 2001-02-30 12:30:45 !!binary !!int !!float !!bool !!set !!omap !!pairs !!timestamp "
    "!!python/tuple !!python/object:os.system !!python/object/apply:os.system &a *a --- ... %YAML %TAG =".split()
    + [": ", "- ", "? ", "<<: *a", "%YAML 1.1\n---\n", "\n", "\t", " ", "\0", "\x07", "\x85", "\u2028"]
    + ["\ufeff", "\ud800"]
)  # fmt: skip


@settings(max_examples=400)
@given(st.lists(PIECES | st.text(max_size=3), max_size=14).map("".join))
def test_pieces_of_yaml(tmp_path_factory, text):
    values = read(tmp_path_factory.getbasetemp(), text.encode("utf-8", "surrogatepass"))
    assert values is None or all(right(KNOWN[n], v) for n, v in values.items())
    params.parse_value(text)  # -p takes any text


@given(st.binary(max_size=200))
def test_bytes(tmp_path_factory, content):
    read(tmp_path_factory.getbasetemp(), content)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{y}: &{y} [{', '.join([f'*{x}'] * 10)}]\n" for x, y in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS + "lr: *j", "anchors (&) and aliases (*) are not read"),
        ("a: &a {x: 1}\nb: &b {<<: *a}\n<<: *b", "anchors (&) and aliases (*) are not read"),
        ("lr: &x [*x]", "anchors (&) and aliases (*) are not read"),
        ("lr: " + "[" * 100_000, "more than 20 levels deep"),
        ("lr: " + "{a: " * 5_000, "more than 20 levels deep"),
        ("\n".join(" " * i + "a:" for i in range(500)), "more than 20 levels deep"),
        ("lr: " + "9" * 5_000, "cannot be read: Exceeds the limit"),
        ("steps: 0x" + "f" * 5_000, "steps = a number of thousands of digits (an integer): must be an integer from 1"),
        (f"seed: {2**63}", "must be an integer >= 0 and of 64 bits"),
        (f"lr: {10**400}", "must be a number > 0 and of 64 bits"),
        ("lr: 1e400", "lr = inf (a number): must be a number > 0"),
        ("lr: 2001-02-30", "cannot be read: day is out of range"),
        ("lr: !!int many", "cannot be read: invalid literal"),
        ("lr: !!bool maybe", "cannot be read"),
        ("? [[a]]\n: 1", "cannot be read"),
        ("lr: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("lr: 1\nlr: 2", "line 2: the key lr stands twice"),
        ("\tlr: 1", "not valid YAML"),
        (b"lr: \xff\xfe", "cannot be read: 'utf-8' codec"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "cannot be read"),
        ("note: x\n" * 200_000, "it has 1,600,000 characters; at most 1,000,000 are read"),
        ("note: '" + "x" * 900_000 + "'\nlr: '" + "y" * 50_000 + "'", "lr = 'yyyy"),
        ("? " + "y" * 70_000 + "\n: 1", "there is no such parameter"),
        ('note: "\\ud800"', "must be text, or null and of whole characters"),
        ("save_to: ../../elsewhere", "must be a plain name (letters, digits, _ . + -), no path, or null"),
        ("save_to: /etc", "must be a plain name"),
        ("save_to: ..", "must be a plain name"),
        ("save_to: .git", "must be a plain name"),
        ("save_to: 'C:\\x'", "must be a plain name"),
        ("save_to: a/b", "must be a plain name"),
    ],
)
def test_what_a_file_must_not_hold(tmp_path, content, message):
    file = tmp_path / "smoke.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.process_time()
    with pytest.raises(params.ParameterError) as caught:
        params.resolve(KNOWN, params.read_values(file), "smoke.yaml")
    assert message in str(caught.value) and len(str(caught.value)) < 1000
    assert time.process_time() - began < 5


def test_a_plain_name_is_taken():
    assert params.resolve(KNOWN, {"save_to": "models_2-b.x"}, "f")["save_to"] == "models_2-b.x"


LINES = st.sampled_from(
    ["lr: float = 1e-3", "  # rate [> 0]", "  # [1..", "  # [1.2.3..4]", "  # [.]", "  # [> .]", "  # [one of ]"]
    + ["\t", "\n", "x: int = (", "x: list[int] = [[]]", "x: str = {[]: 1}", "x: int = -'a'"]
    + ["x: bool = not 1", "'\''", "\0"]
    + ["x: int = 1_000", "(" * 300, "-" * 3000 + "1", f"x: int = {'9' * 5000}"]
) | st.text(max_size=4)  # fmt: skip


@given(st.lists(LINES, max_size=6).map("".join))
def test_parameter_cells(source):
    try:
        found = params.parse_cell(source, "nb.ipynb")
    except params.ParameterError as error:
        assert "nb.ipynb" in str(error)
        return
    assert all(right(p, p.default) for p in found.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just(CELL),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from("cells metadata tags source cell_type".split()), inner, max_size=4),
)


@given(JSON | st.builds(lambda c: {"cells": c}, JSON))
def test_notebooks_that_are_none(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "nb.ipynb"
    file.write_text(json.dumps(content))
    with pytest.raises(params.ParameterError, match="nb.ipynb"):
        params.declared(file)
