"""The published numbers as data, and the honest comparison with ours.

params/<notebook>/claims.yaml is a list; an entry reads

    - id: efl1_last_mflops_vanilla      # unique
      paper: "LBP-WHT, NeurIPS 2023"
      table: "Table 1"                  # where it stands
      claim: "backward of the last stage, exact"
      value: 1483.60                    # a number, or true for a claim that holds or not
      unit: MFLOPs
      tag: C                            # how sure the number is: C, A, S, D, T, M, N of the specifications
      kind: structural                  # structural, accuracy, trend, speed, memory
      compare: equal                    # equal, at_least, at_most, true
      tolerance: {abs: 0.005}           # or {rel: 0.01}; without one a structural value must be equal
      needs: "nothing"                  # what it would take to run it, the reason of every `not run`

A verdict is `matches`, `differs` or `not run`. A tolerance never turns `at_least` into less than it says unless it is
written there.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvit import params

TAGS = ("C", "A", "S", "D", "T", "M", "N")
KINDS = ("structural", "accuracy", "trend", "speed", "memory")
COMPARISONS = ("equal", "at_least", "at_most", "true")
VERDICTS = ("matches", "differs", "not run")
REQUIRED = ("id", "paper", "table", "claim", "value", "tag", "kind", "compare", "needs")


@dataclass(frozen=True)
class Claim:
    """One published number (or, with compare "true", one statement)."""

    id: str
    paper: str
    table: str
    claim: str
    value: float | bool | None
    tag: str
    kind: str
    compare: str
    needs: str
    unit: str = ""
    tolerance: dict[str, float] | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of a claim. `ours` is our value (the mean, where there are several runs) and `spread` its standard
    deviation.
    """

    id: str
    claim: str
    paper: str
    table: str
    kind: str
    tag: str
    unit: str
    value: float | bool | None
    ours: float | bool | None
    spread: float | None
    verdict: str
    why: str


def load(path: Path | str) -> list[Claim]:
    """The claims in a file, in order. params.ParameterError names the entry and what is wrong with it."""
    path = Path(path)
    entries = params.read_yaml(path)
    if not isinstance(entries, list) or not entries:
        raise params.ParameterError(f"{path}: must hold a list of claims, each beginning with '- id:'")
    claims = [_claim(entry, f"{path.name}: entry {number}") for number, entry in enumerate(entries, 1)]
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise params.ParameterError(f"{path.name}: the id {claim.id} stands twice; ids must be unique")
        seen.add(claim.id)
    return claims


def _claim(entry: Any, where: str) -> Claim:
    if not isinstance(entry, dict):
        raise params.ParameterError(f"{where}: must be a mapping with {', '.join(REQUIRED)}")
    where = f"{where} ({entry.get('id', 'without id')})"
    for name in entry:
        if name not in Claim.__dataclass_fields__:
            raise params.ParameterError(
                f"{where}: there is no field {name}{params.near(name, Claim.__dataclass_fields__)}"
            )
    if missing := [name for name in REQUIRED if name not in entry]:
        raise params.ParameterError(f"{where}: {', '.join(missing)} missing")
    for name, allowed in (("tag", TAGS), ("kind", KINDS), ("compare", COMPARISONS)):
        value = (
            str(entry[name]).lower() if isinstance(entry[name], bool) else entry[name]
        )  # `compare: true` is a bool in YAML
        if value not in allowed:
            raise params.ParameterError(f"{where}: {name} is {entry[name]!r}; it must be one of {', '.join(allowed)}")
        entry = {**entry, name: value}
    claim = Claim(**entry)
    if not isinstance(claim.id, str) or not isinstance(claim.needs, str):
        raise params.ParameterError(f"{where}: id and needs must be text")
    _check_value(claim, where)
    return claim


def _check_value(claim: Claim, where: str) -> None:
    is_number = isinstance(claim.value, int | float) and not isinstance(claim.value, bool)
    if claim.compare == "true":
        if claim.value is not True:
            raise params.ParameterError(f"{where}: compare is true, so value must be true; it is {claim.value!r}")
    elif not is_number and not (claim.value is None and claim.tag == "N"):
        raise params.ParameterError(
            f"{where}: value is {claim.value!r}; it must be a number (null only with the tag N: not found)"
        )
    tolerance = claim.tolerance
    good = tolerance is None or (
        isinstance(tolerance, dict)
        and len(tolerance) == 1
        and set(tolerance) <= {"abs", "rel"}
        and all(isinstance(size, int | float) and size >= 0 for size in tolerance.values())
    )
    if not good:
        raise params.ParameterError(
            f"{where}: tolerance is {tolerance!r}; it must be {{abs: number}} or {{rel: number}}"
        )
    if tolerance is None and claim.compare == "equal" and claim.kind != "structural" and claim.value is not None:
        raise params.ParameterError(f"{where}: a claim of kind {claim.kind} that must be equal needs a tolerance")


def check(claims: list[Claim], measured: dict[str, Any]) -> list[Verdict]:
    """One verdict a claim, in order. `measured` maps ids to numbers, booleans or a record.summary; else `not run`.

    Raises `KeyError` for an id that no claim has, `TypeError` for a number where a claim is true or false, or the
    other way round.

    >>> from leanvit import claims
    >>> claim = claims.Claim("flops", "LBP-WHT", "Table 1", "backward", 1483.6, "C", "structural", "equal", "nothing")
    >>> [verdict] = claims.check([claim], {"flops": 1490.0})
    >>> verdict.verdict, verdict.why
    ('differs', '1490 against 1483.6 (+0.43 %)')
    """
    ids = [claim.id for claim in claims]
    for name in measured:
        if name not in ids:
            raise KeyError(f"no claim has the id {name}{params.near(name, ids)}")
    return [_verdict(claim, measured.get(claim.id)) for claim in claims]


def _verdict(claim: Claim, ours: Any) -> Verdict:
    spread = None
    if isinstance(ours, dict):
        ours, spread = ours["mean"], ours["std"]
    if hasattr(ours, "item"):  # a number of numpy or torch
        ours = ours.item()
    if ours is None:
        verdict, why = "not run", claim.needs
    elif isinstance(ours, float) and not math.isfinite(ours):
        ours, verdict, why = None, "differs", f"ours is {ours}: not a finite number"
    elif claim.value is None:
        verdict, why = "not run", f"no published number was found; ours is {_number(ours)} {claim.unit}".rstrip()
    else:
        verdict, why = _compare(claim, ours)
    return Verdict(
        claim.id,
        claim.claim,
        claim.paper,
        claim.table,
        claim.kind,
        claim.tag,
        claim.unit,
        claim.value,
        ours,
        spread,
        verdict,
        why,
    )


def _compare(claim: Claim, ours: Any) -> tuple[str, str]:
    if claim.compare == "true":
        if not isinstance(ours, bool):
            raise TypeError(f"claim {claim.id} is true or false, but what was measured is {ours!r}")
        return ("matches", "") if ours else ("differs", "it does not hold here")
    if isinstance(ours, bool):
        raise TypeError(f"claim {claim.id} has the number {claim.value}, but what was measured is {ours!r}")
    tolerance = claim.tolerance or {}
    slack = tolerance.get("abs", 0.0) + tolerance.get("rel", 0.0) * abs(claim.value)
    slack += 1e-9 * abs(claim.value)  # the last bits of floating point are no difference
    gap = ours - claim.value
    holds = {"equal": abs(gap) <= slack, "at_least": gap >= -slack, "at_most": gap <= slack}[claim.compare]
    relative = f" ({100 * gap / abs(claim.value):+.2g} %)" if claim.value else ""
    within = "".join(f", tolerance {size:g}{'' if kind == 'abs' else ' of it'}" for kind, size in tolerance.items())
    asked = {"equal": "", "at_least": "at least ", "at_most": "at most "}[claim.compare]
    text = f"{_number(ours)} against {asked}{_number(claim.value)}{relative}{within}"
    return ("matches", text if gap else "") if holds else ("differs", text)


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def counts(verdicts) -> dict[str, int]:
    """How many match, differ, were not run; takes Verdicts or the mappings that a result JSON holds."""
    names = [verdict["verdict"] if isinstance(verdict, dict) else verdict.verdict for verdict in verdicts]
    return {name: names.count(name) for name in VERDICTS}


def table(verdicts: list[Verdict]):
    """The ledger as a pandas DataFrame: claim, where it stands, published, ours, unit, verdict, why."""
    import pandas

    rows = [
        {
            "claim": verdict.claim,
            "where": f"{verdict.paper}, {verdict.table} [{verdict.tag}]",
            "published": "–" if verdict.value is None else _number(verdict.value),
            "ours": _ours(verdict),
            "unit": verdict.unit,
            "verdict": verdict.verdict,
            "why": verdict.why,
        }
        for verdict in verdicts
    ]
    return pandas.DataFrame(rows)


def _ours(verdict: Verdict) -> str:
    if verdict.ours is None:
        return "–"
    return _number(verdict.ours) + (f" ± {verdict.spread:.2g}" if verdict.spread is not None else "")
