"""outputs/ as a static site that opens offline: an index, every rendered notebook, the ledger, the library's reference.

    leanvit report      ->  outputs/site/index.html

Pages are self-contained: figures embedded, formulas turned into MathML, no script and nothing loaded from elsewhere.
The figure of a notebook's card is that of the cell tagged `card`, else its first; figures of cells tagged `front` stand
large on the index. A page is rendered anew when its notebook, its result or the rooms of the report have changed.
"""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from leanvit import claims, ledger, params, record, report_api, report_frame, report_notebook
from leanvit.report_frame import document

TIERS = ("embedded", "gpu", "paper", "smoke")  # the best evidence first
MARKS = {"matches": "match", "differs": "differ", "not run": "not run"}
INTRO = """leanvit makes vision transformers cheap to adapt and cheap to run: a small PyTorch library that works in
place on any timm model. Five published methods are written anew from their mathematics, each in a notebook that runs
headless on what is inside the package, or on real images and weights. A ledger puts every published number that could
be found beside ours, and says which match, which differ, and which could not be run here."""


def build(root: Path) -> Path:
    """Render every complete result of outputs/, the ledger, the reference and the index; returns the index's path.

    Raises `OSError` when the site cannot be written, `ValueError` for a result that is not JSON and for wrong claims.
    """
    site = root / "outputs" / "site"
    pages = find_pages(root)
    for page in pages:
        target = site / page.link
        if _stale(target, page.sources):
            record.write_atomic(target, render(page))
    rest = report_api.pages(report_api.rooms())
    rest["ledger.html"] = ledger_page(root, pages)
    rest["index.html"] = index(pages, citation(root))
    for link, text in rest.items():
        record.write_atomic(site / link, text)
    kept = {page.link for page in pages} | set(rest)
    for old in [path for path in site.rglob("*.html") if path.relative_to(site).as_posix() not in kept]:
        old.unlink()
    return site / "index.html"


def _stale(target: Path, sources: Iterable[Path]) -> bool:
    own = [Path(module.__file__) for module in (report_frame, report_notebook)] + [Path(__file__)]
    return not target.exists() or any(path.stat().st_mtime >= target.stat().st_mtime for path in (*sources, *own))


@dataclass(frozen=True)
class Page:
    """An executed notebook with its result, and the two files they stand in."""

    tier: str
    notebook: nbformat.NotebookNode
    result: dict[str, Any]
    sources: tuple[Path, ...]

    @property
    def link(self) -> str:
        """Path within the site."""
        return f"{self.tier}/{self.result['run']}.html"

    @property
    def title(self) -> str:
        """The first heading, as plain text."""
        return report_notebook.title(self.notebook) or self.result["notebook"]

    @property
    def headline(self) -> str:
        """That of the result, without the verdicts: their numbers stand beside it."""
        return re.sub(r"; \d+ of \d+ published numbers .*", "", self.result["headline"])


def find_pages(root: Path) -> list[Page]:
    """All complete results with their executed notebooks: by notebook, best tier and a tier's main run first."""
    pages = []
    for tier in TIERS:
        for path in sorted((root / "outputs" / tier).glob("*.json")):
            executed = path.with_suffix(".ipynb")
            if executed.exists() and (result := record.read(path)):
                pages.append(Page(tier, nbformat.read(executed, as_version=4), result, (path, executed)))
    return sorted(pages, key=lambda page: (page.result["notebook"], TIERS.index(page.tier), len(page.result["run"])))


def render(page: Page) -> str:
    """The whole page of a notebook."""
    result = page.result
    hardware, versions = result["hardware"], result["versions"]
    gpus = ", ".join(gpu["name"] for gpu in hardware["gpus"])
    facts = {
        "tier": page.tier,
        "time": _time(result["seconds"]),
        "on": f"{hardware['cpu']}, {hardware['threads']} threads" + (f", {gpus}" if gpus else ""),
        "with": f"Python {versions['python']}, torch {versions['torch']}, timm {versions['timm']}",
        "commit": (result["commit"]["hash"] or "none")[:10] + (" (changed)" if result["commit"]["dirty"] else ""),
        "repeat": f"leanvit run {result['params_file']}",
    }
    body, contents = report_notebook.body(page.notebook)
    made = f"{_list(facts)}<h4>Parameters</h4>{_list(result['parameters'])}"
    title, headline = html.escape(page.title), html.escape(page.headline)
    content = f"""<header><h1>{title}</h1><p class="headline">{headline}</p>{_verdicts(result)}
<details><summary>How this was made</summary>{made}</details></header>
<main class="notebook">{body}</main>"""
    return document(page.title, content, root="../", contents=contents)


def _list(facts: dict[str, Any]) -> str:
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl>{rows}</dl>"


def ledger_page(root: Path, pages: list[Page]) -> str:
    """Every published number beside ours, with links to the notebooks that were rendered."""
    anchors = {page.link: {cell.get("id") for cell in page.notebook.cells} for page in pages}

    def address(row: ledger.Row) -> str | None:
        link = f"{row.tier}/{row.run}.html"
        if link not in anchors:
            return None
        return f"{link}#cell-id={row.cell}" if row.cell in anchors[link] else link

    found = ledger.html(ledger.rows(root), link=address)
    headings = re.findall(r"""<h2 id=["']([^"']+)["']>([^<]+)</h2>""", found)
    contents = [(2, name, html.unescape(text)) for name, text in headings]
    content = f"""<header><h1>The ledger</h1>
<p>Every published number of the five papers that could be found, beside ours; what is not run says what it would take.
</p></header>
<main class="ledger">{found}</main>"""
    return document("leanvit: the ledger", content, here="ledger.html", contents=contents)


# ---- the index


def index(pages: list[Page], cite: str = "") -> str:
    """What this is; one card a notebook with its best tier and links to the others; the figures that matter."""
    groups = [[page for page in pages if page.result["notebook"] == name] for name in _names(pages)]
    cards = "".join(_card(best, others) for best, *others in groups)
    figures = "".join(map(_figures, (best for best, *_ in groups)))
    if figures:
        figures = f'<h2 id="figures">The figures that matter</h2><div class="figures">{figures}</div>'
    content = f"""<header><h1>leanvit</h1><p class="lead">{INTRO}</p>
<p>Every number: <a href="ledger.html">the ledger</a>. Every function: <a href="api.html">the library</a>.</p></header>
<main><h2 id="notebooks">The notebooks</h2>
<div class="cards">{cards or "<p>No results yet: <code>make reproduce</code> makes them.</p>"}</div>
{figures}{cite}</main>"""
    return document("leanvit", content, here="index.html")


def _names(pages: list[Page]) -> list[str]:
    return list(dict.fromkeys(page.result["notebook"] for page in pages))


def _figures(page: Page) -> str:
    where = f'<a href="{page.link}">{html.escape(page.title)}</a>'
    return "".join(
        f"<figure>{report_notebook.picture(uri, alt)}<figcaption>{html.escape(alt)} ({where})</figcaption></figure>"
        for uri, alt in report_notebook.figures(page.notebook, "front")
    )


def _card(page: Page, others: list[Page]) -> str:
    found = report_notebook.figures(page.notebook, "card") or report_notebook.figures(page.notebook)
    picture = f'<img src="{found[0][0]}" alt="{html.escape(found[0][1], quote=True)}">' if found else ""
    links = " · ".join(f'<a href="{other.link}">{html.escape(_short(other))}</a>' for other in others)
    also = f"<p class='also'>also: {links}</p>" if others else ""
    return f"""<article><a class="picture" href="{page.link}" tabindex="-1" aria-hidden="true">{picture}</a>
<div><h3><a href="{page.link}">{html.escape(page.title)}</a></h3>
<p class="headline">{html.escape(page.headline)}</p>{_verdicts(page.result)}
<p class="also">{page.tier} tier, {_time(page.result["seconds"])}</p>{also}</div></article>
"""


def _short(page: Page) -> str:
    rest = page.result["run"].removeprefix(page.result["notebook"]).lstrip(".")
    return f"{page.tier} {rest.replace('_', ' ')}".strip()


def _verdicts(result: dict[str, Any]) -> str:
    if not result["verdicts"]:
        return ""
    number = claims.counts(result["verdicts"])
    pills = "".join(
        f"<li class='{verdict.replace(' ', '-') if number[verdict] else 'none'}'><b>{number[verdict]}</b> {word}</li>"
        for verdict, word in MARKS.items()
    )
    return f"<ul class='verdicts' aria-label='published claims against ours'>{pills}</ul>"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def citation(root: Path) -> str:
    """How to cite, from CITATION.cff: this software as BibTeX, the papers with their links; empty without the file."""
    file = root / "CITATION.cff"
    if not file.exists():
        return ""
    data = params.read_yaml(file)
    fields = {"title": f"{{{data['title']}}}", "author": _authors(data["authors"], " and ")}
    fields |= {"version": data["version"], "note": f"{data['license']} licence"}
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    bibtex = html.escape("\n".join(["@software{leanvit,", *lines, "}"]))
    papers = "".join(map(_paper, data.get("references", ())))
    return f"""<h2 id="cite">How to cite</h2><p>{html.escape(data["message"])}</p>
<pre>{bibtex}</pre><ul class="references">{papers}</ul>"""


def _paper(paper: dict[str, Any]) -> str:
    who, title, where = (html.escape(text) for text in (_authors(paper["authors"], ", "), paper["title"], paper["url"]))
    venue = html.escape(f"{paper['collection-title']} {paper['year']}")
    return f'<li>{who}: <cite>{title}</cite>, {venue}, <a href="{where}">{where.partition("//")[2]}</a></li>'


def _authors(people: list[dict[str, str]], between: str) -> str:
    return between.join(p.get("name") or f"{p['given-names']} {p['family-names']}" for p in people)
