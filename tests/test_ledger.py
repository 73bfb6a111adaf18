"""The ledger: which result a claim takes its number from, verdicts of today, defects with their demonstration."""

import json
from pathlib import Path

import bs4
import pytest

from leanvit import claims, ledger, params, record, run

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "params").glob("*/claims.yaml"))
ENTRY = {"paper": "Paper, ICLR 2022", "table": "Table 1", "tag": "S", "kind": "accuracy", "compare": "equal"}
ENTRY |= {"value": 80.0, "unit": "%", "tolerance": {"abs": 1}, "needs": "ImageNet-1k"}
TRUE = {"value": True, "compare": "true", "unit": "", "tolerance": None, "kind": "structural", "needs": "nothing"}


def book(repository, *entries, notebook="1_x"):
    """params/<notebook>/claims.yaml"""
    path = repository.root / "params" / notebook / "claims.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps([{"claim": f"it is {entry['id']}", **ENTRY, **entry} for entry in entries])
    )  # JSON is YAML


def result(repository, measured, tier="smoke", name="1_x", notebook="1_x", **changes):
    """A complete result that measured some claims; claims.check writes what the notebook would."""
    path = repository.root / "outputs" / tier / f"{name}.json"
    entries = claims.load(repository.root / "params" / notebook / "claims.yaml")
    verdicts = [vars(verdict) for verdict in claims.check(entries, measured)]
    values = {field: "x" for field in record.FIELDS}
    values |= {"notebook": notebook, "run": name, "tier": tier, "params_file": f"params/{notebook}/smoke.yaml"}
    values |= {"overrides": {}, "verdicts": verdicts, "hashes": {"notebook": "old"}, **changes}
    record.write_atomic(path, json.dumps(values))


@pytest.fixture
def written(repository):
    """A repository with one notebook whose cells name claims."""
    repository.notebook("1_x", 'measured = {"exact": 1.0}', 'measured |= {f"released_{n}_s": True for n in "ab"}')
    repository.params("1_x")
    return repository


def found(repository, **options):
    """{claim id: its row}"""
    return {row.claim.id: row for row in ledger.rows(repository.root, **options)}


def test_the_best_tier_that_measured_a_claim_counts(written):
    book(written, {"id": "a"}, {"id": "b"}, {"id": "c"}, {"id": "d"})
    result(written, {"a": 80.0, "b": 81.0}, "smoke")
    result(written, {"a": 70.0}, "embedded")
    result(written, {"b": 60.0}, "custom")  # an experiment: no evidence
    result(written, {"c": 79.5}, "paper", "1_x.big")
    rows = found(written)
    assert {name: row.verdict.verdict for name, row in rows.items()} == {
        "a": "differs",  # the embedded tier counts, although the smoke tier would match
        "b": "matches",
        "c": "matches",
        "d": "not run",
    }
    assert [(row.tier, row.run) for row in rows.values()] == [
        ("embedded", "1_x"),
        ("smoke", "1_x"),
        ("paper", "1_x.big"),
        ("", ""),
    ]
    assert "70 against 80 (-12 %)" in rows["a"].comment and rows["d"].comment == "needs: ImageNet-1k"


def test_the_run_that_measured_a_claim_counts_and_the_main_run_first(written):
    book(written, {"id": "a"}, {"id": "b"})
    result(written, {"a": 80.0}, "embedded", "1_x")
    result(written, {"a": 90.0, "b": 80.5}, "embedded", "1_x.more")
    rows = found(written)
    assert (rows["a"].run, rows["b"].run) == ("1_x", "1_x.more")


def test_verdicts_are_those_of_the_present_claims(written):
    """A number measured against an older claims.yaml is held against the present one; what is gone leaves."""
    book(written, {"id": "a", "value": 90.0}, {"id": "gone"}, {"id": "kind"})
    result(written, {"a": record.summary([79.0, 81.0]), "gone": 80.0, "kind": 80.0})
    assert found(written)["a"].verdict.verdict == "differs"
    book(written, {"id": "a"}, {"id": "kind", **TRUE})
    rows = found(written)
    assert rows["a"].verdict.verdict == "matches" and rows["a"].ours == "80 ± 1.4 %"
    assert list(rows) == ["a", "kind"] and rows["kind"].verdict.verdict == "not run"
    assert rows["kind"].comment == "needs: leanvit run params/1_x/smoke.yaml"


def test_what_is_no_number_differs_and_what_was_not_found_is_not_run(written):
    book(written, {"id": "a"}, {"id": "n", "value": None, "tag": "N", "tolerance": None})
    result(written, {"a": float("nan"), "n": 5.0})
    rows = found(written)
    assert rows["a"].verdict.verdict == "differs" and "not a finite number" in rows["a"].comment
    assert rows["n"].published == "not found" and rows["n"].ours == "5 %"
    assert rows["n"].verdict.verdict == "not run" and "no published number" in rows["n"].comment


def test_stale_results_are_named_and_damaged_ones_ignored(written):
    book(written, {"id": "a"}, {"id": "b"})
    job = run.plan(written.root, written.root / "params/1_x/smoke.yaml")
    result(written, {"a": 80.0}, hashes=record.key_hashes(written.root, "1_x", job.parameters))
    result(written, {"b": 80.0}, "embedded")
    (written.root / "outputs" / "paper").mkdir()
    (written.root / "outputs" / "paper" / "1_x.json").write_text('{"notebook": ')
    rows = ledger.rows(written.root)
    assert [row.stale for row in rows] == ["", "notebook and library and parameters changed"]
    assert ledger.stale(rows) == ["stale: embedded/1_x: notebook and library and parameters changed"]
    assert ledger.stale(rows)[0] in ledger.text(rows) and "embedded/1_x (stale)" in rows[1].comment


def test_a_defect_names_what_demonstrates_it(written):
    defect = {"table": "released code", **TRUE}
    book(
        written,
        {"id": "exact", **defect},
        {"id": "released_a_s", **defect},
        {"id": "nowhere", **defect},
        {"id": "plain", **TRUE},
    )
    rows = found(written)
    assert [(row.defect, row.shown, row.cell) for row in rows.values()] == [
        (True, "cell cell-2", "cell-2"),
        (True, "cell cell-3", "cell-3"),  # an id that the cell puts together
        (True, "", ""),
        (False, "", ""),
    ]
    assert "shown by cell cell-2" in rows["exact"].comment


def test_filters(written):
    book(written, {"id": "a"}, {"id": "b", "paper": "Other"})
    book(written, {"id": "g", "paper": "leanvit"}, notebook="0_own")
    result(written, {"a": 80.0})
    assert list(found(written)) == ["a", "b", "g"]  # our own goals last
    assert list(found(written, paper="pap")) == ["a"] and list(found(written, paper="1_X")) == ["a", "b"]
    assert list(found(written, verdict="not run")) == ["b", "g"]
    with pytest.raises(params.ParameterError, match="no paper 'othr' .did you mean Other"):
        ledger.rows(written.root, paper="othr")
    with pytest.raises(params.ParameterError, match="no verdict 'differ' .did you mean differs"):
        ledger.rows(written.root, verdict="differ")


def test_the_page_is_whole_and_nothing_in_it_is_markup(written):
    book(written, {"id": "a", "claim": "a < b & c > d <script>"}, {"id": "b", "table": "Table 2", **TRUE})
    result(written, {"a": 70.0})
    rows = ledger.rows(written.root)
    page = bs4.BeautifulSoup(
        ledger.html(rows, link=lambda row: f"{row.tier}.html" if row.tier else None), "html.parser"
    )
    assert page.script is None
    entries = page.select("table.ledger tbody tr")
    assert [entry["class"] for entry in entries] == [["differs"], ["not-run"]]
    cells = [cell.get_text() for cell in entries[0].find_all("td")]
    assert cells[:5] == ["a < b & c > d <script>", "80 %", "S", "70 %", "differs"]
    assert page.select_one("td.comment a")["href"] == "smoke.html"
    assert [head.get_text() for head in page.find_all("h3")] == ["Table 1", "Table 2"]
    for link in page.select("a[href^='#']"):
        assert page.find(id=link["href"][1:])
    assert ledger.html([]) == "<p>No claims.</p>"
    text = ledger.text(rows)
    assert "differs  [S] a < b & c > d <script>: published 80 %, ours 70 %" in text
    assert "Paper" in text and text.count("not run  [S]") == 1


def test_command(written, monkeypatch, capsys):
    book(written, {"id": "a"}, {"id": "b"})
    result(written, {"a": 80.0})
    monkeypatch.chdir(written.root)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    assert run.main(["claims", "--verdict", "matches"]) == 0
    assert "it is a: published 80 %" in (shown := capsys.readouterr().out) and "it is b" not in shown
    assert run.main(["claims", "--out", "page/ledger.html"]) == 0 and run.main(["claims", "--out", "ledger.txt"]) == 0
    assert "<td class='claim'>it is b</td>" in (written.root / "page" / "ledger.html").read_text()
    assert (written.root / "ledger.txt").read_text() == ledger.text(ledger.rows(written.root))
    assert run.main(["claims", "--paper", "nobody"]) == 2


# ---- ours


@pytest.fixture(scope="module")
def ours():
    """The rows of this repository."""
    return ledger.rows(ROOT)


def test_every_claim_is_in_the_ledger_once(ours):
    asked = [(path.parent.name, claim.id) for path in BOOKS for claim in claims.load(path)]
    assert sorted((row.notebook, row.claim.id) for row in ours) == sorted(asked)
    assert sum(sum(number) for _, *number in ledger.summary(ours)) == len(asked)
    assert set(ledger.LEGEND) == set(claims.TAGS)


def test_every_defect_that_needs_nothing_else_is_demonstrated(ours):
    cells = {}
    for row in ours:
        if not row.defect or (row.claim.needs != "nothing" and "leanvit run" not in row.claim.needs):
            continue
        path = ROOT / "notebooks" / f"{row.notebook}.ipynb"
        if not path.exists():
            continue
        if path not in cells:
            cells[path] = {cell["id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]}
        if row.claim.needs == "nothing" or row.claim.kind == "trend":
            assert row.shown and row.cell in cells[path], row.claim.id
    assert cells


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.parent.name)
def test_structural_claims_that_need_nothing_have_a_verdict_in_the_smoke_tier(path):
    notebook = path.parent.name
    file = path.with_name("smoke.yaml")
    if not file.exists() or not (ROOT / "notebooks" / f"{notebook}.ipynb").exists():
        pytest.skip("no smoke tier yet")
    job = run.plan(ROOT, file)
    kind, why = run.state(ROOT, job, "")
    if kind != "from elsewhere":  # this checkout has no name here: whole and of the present sources
        pytest.skip(f"{kind}: {why or 'no result'}; leanvit run {job.params_file}")
    verdicts = {v["id"]: v for v in json.loads((ROOT / job.result).read_text(encoding="utf-8"))["verdicts"]}
    for claim in claims.load(path):
        if claim.kind == "structural" and claim.needs == "nothing":
            assert verdicts[claim.id]["verdict"] != "not run", claim.id
