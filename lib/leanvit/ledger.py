"""The ledger: every published number of params/*/claims.yaml beside ours, on one page; `leanvit claims`, and the site.

Ours comes from the result files under outputs/. Of the runs that measured a claim the best tier counts (paper, gpu,
embedded, smoke), within a tier the notebook's main run; experiments (outputs/custom, outputs/interactive) do not count.
The verdict is that of the present claims.yaml on the number measured then. A claim of the table "released code" is a
defect of the authors' code: its row names what demonstrates it, a cell of the notebook or a function of the library.
"""

import ast
import html as markup
import json
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from leanvit import claims, params, record

TIERS = ("paper", "gpu", "embedded", "smoke")  # the best evidence first
OWN = "leanvit"  # the "paper" of our own goals, which nobody published
LEGEND = {
    "S": "printed by the authors: paper, README, log, figure",
    "A": "abstract",
    "C": "read in the released code or configuration, or observed by running it",
    "D": "derived from formulas and architectures, checked numerically; not printed in this form",
    "T": "printed by others",
    "M": "recalled from memory: a hint, not citable",
    "N": "no published number was found",
}


@dataclass(frozen=True)
class Row:
    """One claim: what was published, what became of it, and what it would take.

    `tier` and `run` name the result that measured it ("" where none did), `stale` says what has changed since; `shown`
    names what demonstrates a defect, `cell` is its cell's id in the notebook (else "").
    """

    notebook: str
    claim: claims.Claim
    verdict: claims.Verdict
    tier: str = ""
    run: str = ""
    stale: str = ""
    shown: str = ""
    cell: str = ""

    @property
    def paper(self) -> str:
        """The paper without its venue."""
        return self.claim.paper.split(",")[0]

    @property
    def defect(self) -> bool:
        """Whether it is about what the authors' code does and its paper does not say."""
        return self.claim.table == "released code"

    @property
    def published(self) -> str:
        """The published value with its unit, e.g. "at least 80 %"."""
        if self.claim.compare == "true":
            return "holds"
        if self.claim.value is None:
            return "not found"
        asked = {"at_least": "at least ", "at_most": "at most "}.get(self.claim.compare, "")
        return f"{asked}{_number(self.claim.value)} {self.claim.unit}".rstrip()

    @property
    def ours(self) -> str:
        """Our value with its spread (one standard deviation over seeds) and unit, "–" where there is none."""
        value, spread = self.verdict.ours, self.verdict.spread
        if value is None:
            return "–"
        if isinstance(value, bool):
            return "holds" if value else "does not hold"
        return f"{_number(value)}{f' ± {spread:.2g}' if spread is not None else ''} {self.claim.unit}".rstrip()

    @property
    def comment(self) -> str:
        """What demonstrates a defect; the result that ours comes from and why it differs; or what it needs."""
        parts = [f"shown by {self.shown}" if self.shown else ""]
        parts.append(f"{self.tier}/{self.run}{' (stale)' if self.stale else ''}" if self.run else "")
        if self.verdict.verdict == "differs" or (self.verdict.ours is not None and self.claim.value is None):
            parts.append(self.verdict.why)
        elif not self.run:
            here = f"leanvit run params/{self.notebook}/smoke.yaml"
            parts.append(f"needs: {here if self.claim.needs == 'nothing' else self.claim.needs}")
        return "; ".join(part for part in parts if part)


def _number(value: float) -> str:
    return f"{value:,.6g}" if isinstance(value, float) and abs(value) < 1e6 else f"{value:,}"


def rows(root: Path, paper: str | None = None, verdict: str | None = None) -> list[Row]:
    """Every claim, by paper (our own goals last) and table, in the order of the files.

    `paper` keeps those whose paper or notebook contains it, `verdict` those with this verdict; `params.ParameterError`
    when there is no such paper or verdict, or a claims file is wrong.
    """
    if verdict is not None and verdict not in claims.VERDICTS:
        hint = params.near(verdict, claims.VERDICTS)
        raise params.ParameterError(f"there is no verdict {verdict!r}{hint}; known are {', '.join(claims.VERDICTS)}")
    found = []
    for file in sorted((root / "params").glob("*/claims.yaml")):
        found += _rows_of(root, file)
    known = sorted({row.paper for row in found} | {row.notebook for row in found})
    if paper is not None and not any(paper.lower() in name.lower() for name in known):
        hint = params.near(paper, known)
        raise params.ParameterError(f"there is no paper {paper!r}{hint}; known are {', '.join(known)}")
    papers = list(dict.fromkeys(row.paper for row in found))
    tables = list(dict.fromkeys((row.paper, row.claim.table) for row in found))
    found.sort(key=lambda row: (row.paper == OWN, papers.index(row.paper), tables.index((row.paper, row.claim.table))))
    return [
        row
        for row in found
        if (paper is None or paper.lower() in row.paper.lower() or paper.lower() in row.notebook.lower())
        and verdict in (None, row.verdict.verdict)
    ]


def _rows_of(root: Path, file: Path) -> list[Row]:
    notebook, book = file.parent.name, claims.load(file)
    results = _results(root, notebook)
    demonstrations = Demonstrations(root, notebook) if any(claim.table == "released code" for claim in book) else None
    made = []
    for claim in book:
        verdict, origin = claims.check([claim], {})[0], {}
        for (tier, stale), result in results:
            if measured := _verdict_of(claim, result["verdicts"].get(claim.id)):
                verdict, origin = measured, {"tier": tier, "run": result["run"], "stale": stale}
                break
        shown, cell = demonstrations.find(claim.id) if demonstrations and claim.table == "released code" else ("", "")
        made.append(Row(notebook, claim, verdict, **origin, shown=shown, cell=cell))
    return made


def _results(root: Path, notebook: str) -> list[tuple[tuple[str, str], dict[str, Any]]]:
    """((tier, what has changed since), {"run", "verdicts" by id}) of the notebook's complete results, best first."""
    found = []
    for tier in TIERS:
        for path in sorted((root / "outputs" / tier).glob("*.json"), key=lambda path: (len(path.stem), path.stem)):
            result = record.read(path)
            if result is None or result["notebook"] != notebook:
                continue
            verdicts = {verdict["id"]: verdict for verdict in result["verdicts"]}
            found.append(((tier, _stale(root, result)), {"run": result["run"], "verdicts": verdicts}))
    return found


def _stale(root: Path, result: dict[str, Any]) -> str:
    try:
        known = params.declared(root / "notebooks" / f"{result['notebook']}.ipynb")
        asked = params.read_values(root / result["params_file"]) if result["params_file"] else {}
        now = record.key_hashes(root, result["notebook"], params.resolve(known, asked | result["overrides"], ""))
    except (OSError, params.ParameterError):
        return "its notebook or parameters are gone"
    changed = [name for name, value in now.items() if result["hashes"].get(name) != value]
    return f"{' and '.join(changed)} changed" if changed else ""


def _verdict_of(claim: claims.Claim, then: dict[str, Any] | None) -> claims.Verdict | None:
    """The verdict on what a result holds for a claim; None when it did not measure it."""
    if then is None or (then["ours"] is None and then["verdict"] != "differs"):
        return None
    ours = then["ours"]
    if ours is None:  # not a finite number: JSON holds null for it
        ours = float("nan")
    elif then["spread"] is not None:
        ours = {"mean": ours, "std": then["spread"]}
    try:
        return claims.check([claim], {claim.id: ours})[0]
    except TypeError:  # the claim was a number and is a statement now, or the other way round
        return None


class Demonstrations:
    """Where a claim's value is computed: the cell of the notebook that names its id, else the function of the library.

    Ids that are put together (f"released_{name}_s") count when exactly the fixed parts agree.
    """

    def __init__(self, root: Path, notebook: str):
        path = root / "notebooks" / f"{notebook}.ipynb"
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []
        own = [cell for cell in cells if cell["cell_type"] == "code"]
        own = [cell for cell in own if "parameters" not in cell["metadata"].get("tags", [])]
        code = [(cell["id"], "".join(cell["source"])) for cell in own]
        self.cells = [(cell, _ids(source)) for cell, source in code]
        # the rooms that the notebook takes its counts from, and those that they stand on
        package = {file.stem: file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("*.py")}
        rooms = {name for _, source in code for name in re.findall(r"\b(counts\w*)\.\w+\(", source)} & package.keys()
        rooms |= {name for room in rooms for name in re.findall(r"\b(?:counts|shown)_\w+", package[room])}
        self.functions = [
            (f"leanvit.{room}.{node.name}", _ids(ast.unparse(node)))
            for room in sorted(rooms & package.keys())
            for node in ast.parse(package[room]).body
            if isinstance(node, ast.FunctionDef)
        ]
        self.runs = next((cell for cell, source in code if re.search(r"\bcounts\w*\.measured\(", source)), "")

    def find(self, name: str) -> tuple[str, str]:
        """(what demonstrates the claim, in words; the id of the cell), both "" when nothing names it."""
        for exact in (True, False):
            for cell, ids in self.cells:
                if _names(ids, name, exact):
                    return f"cell {cell}", cell
            for function, ids in self.functions:
                if _names(ids, name, exact):
                    return f"{function}()" + (f", run in cell {self.runs}" if self.runs else ""), self.runs
        return "", ""


def _names(ids: list[str], name: str, exact: bool) -> bool:
    if exact:
        return name in ids
    return any(".+" in pattern and re.fullmatch(pattern, name) for pattern in ids)


def _ids(source: str) -> list[str]:
    """Texts, keyword names and (as regular expressions) put-together texts of some source code that may be ids."""
    source = re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)  # what only IPython reads
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+", node.value):
            found.append(node.value)
        elif isinstance(node, ast.keyword) and node.arg:
            found.append(node.arg)
        elif isinstance(node, ast.JoinedStr):
            parts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in node.values]
            if sum(len(part) for part in parts if part != ".+") >= 6:
                found.append("".join(parts))
    return found


# ---- what is shown


def summary(found: Iterable[Row]) -> list[tuple[str, int, int, int]]:
    """(paper, matches, differs, not run), a paper each."""
    return [
        (paper, *claims.counts([row.verdict for row in group]).values())
        for paper, group in groupby(found, lambda row: row.paper)
    ]


def tables(found: Iterable[Row]) -> list[tuple[str, str, list[Row]]]:
    """(paper, table, its rows)."""
    return [(*key, list(group)) for key, group in groupby(found, lambda row: (row.paper, row.claim.table))]


def stale(found: Iterable[Row]) -> list[str]:
    """A line for each result that numbers come from although notebook, library or parameters have changed since."""
    seen = {f"{row.tier}/{row.run}": row.stale for row in found if row.stale}
    return [f"stale: {result}: {why}" for result, why in sorted(seen.items())]


def text(found: list[Row]) -> str:
    """The page as plain text."""
    width = max((len(paper) for paper, *_ in summary(found)), default=5)
    lines = [f"{'paper':<{width}}  {'match':>7} {'differ':>7} {'not run':>7}"]
    lines += [f"{paper:<{width}}  {a:>7} {b:>7} {c:>7}" for paper, a, b, c in summary(found)]
    lines += ["", "How sure a published number is:", *(f"  [{tag}] {words}" for tag, words in LEGEND.items())]
    lines += ["", *stale(found)] if stale(found) else []
    for paper, table, group in tables(found):
        lines += ["", f"{paper}: {table}", "-" * len(f"{paper}: {table}")]
        for row in group:
            numbers = f"published {row.published}, ours {row.ours}"
            line = f"{row.verdict.verdict:<8} [{row.claim.tag}] {row.claim.claim}: {numbers}"
            short = row.verdict.verdict == "matches" and not row.defect
            lines += [f"{line}  ({row.comment})"] if short else [line, f"{'':12} {row.comment}"]
    return "\n".join(lines) + "\n"


def html(found: list[Row], link: Callable[[Row], str | None] = lambda row: None) -> str:
    """The page as a fragment of HTML without styles or scripts: summary, legend, then a section for each paper with a
    table for each of its tables. `link(row)` is the address of the page of its result, None for none.
    """
    if not found:
        return "<p>No claims.</p>"
    escape = markup.escape
    number = "".join(
        f"<tr><th scope='row'><a href='#{_anchor(paper)}'>{escape(paper)}</a></th><td>{a}</td><td>{b}</td><td>{c}</td>"
        "</tr>"
        for paper, a, b, c in summary(found)
    )
    legend = "".join(f"<dt>{tag}</dt><dd>{escape(words)}</dd>" for tag, words in LEGEND.items())
    parts = [
        "<div class='scroll' tabindex='0'><table class='ledger-summary'><thead><tr><th>paper</th><th>match</th>"
        f"<th>differ</th><th>not run</th></tr></thead><tbody>{number}</tbody></table></div>",
        f"<details><summary>How sure a published number is</summary><dl>{legend}</dl></details>",
    ]
    if lines := stale(found):
        parts.append(f"<ul class='stale'>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>")
    for paper, group in groupby(tables(found), lambda entry: entry[0]):
        sections = "".join(_table(table, its, link) for _, table, its in group)
        parts.append(f"<section><h2 id='{_anchor(paper)}'>{escape(paper)}</h2>{sections}</section>")
    return "\n".join(parts)


def _table(name: str, group: list[Row], link: Callable[[Row], str | None]) -> str:
    escape = markup.escape
    cells = []
    for row in group:
        verdict = row.verdict.verdict
        comment, address = escape(row.comment), link(row)
        if address:
            comment = f"<a href='{escape(address, quote=True)}'>{comment or 'result'}</a>"
        kind = verdict.replace(" ", "-") + (" defect" if row.defect else "")
        tag = f"<abbr title='{escape(LEGEND[row.claim.tag], quote=True)}'>{row.claim.tag}</abbr>"
        cells.append(
            f"<tr class='{kind}' id='{escape(row.notebook)}-{escape(row.claim.id)}'><td class='claim'>"
            f"{escape(row.claim.claim)}</td><td>{escape(row.published)}</td><td>{tag}</td><td>{escape(row.ours)}</td>"
            f"<td class='verdict {verdict.replace(' ', '-')}'>{verdict}</td><td class='comment'>{comment}</td></tr>"
        )
    heads = "".join(f"<th>{head}</th>" for head in ("claim", "published", "sure", "ours", "verdict", "from, or needs"))
    return (
        f"<details open><summary><h3>{escape(name)}</h3></summary><div class='scroll' tabindex='0'>"
        f"<table class='ledger'><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(cells)}</tbody></table></div></details>\n"
    )


def _anchor(paper: str) -> str:
    return re.sub(r"\W+", "-", paper.lower()).strip("-")
