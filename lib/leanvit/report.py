"""outputs/ as a static site: an index with one card a notebook, and every rendered notebook; opens offline.

    leanvit report      ->  outputs/site/index.html

Pages are self-contained: figures embedded, formulas turned into MathML, no script and nothing loaded from elsewhere. A
figure's alternative text is the cell metadata "alt", else the first comment of its cell, else the heading above it.
"""

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bs4
import jinja2
import nbformat
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from leanvit import claims, record

TIERS = ("embedded", "gpu", "paper", "smoke")  # the best evidence first
MARKS = {"matches": "match", "differs": "differ", "not run": "not run"}


def build(root: Path) -> Path:
    """Render every complete result of outputs/ and the index; returns the path of the index."""
    site = root / "outputs" / "site"
    pages = find_pages(root)
    for page in pages:
        record.write_atomic(site / page.link, render(page))
    for old in [
        path for path in site.rglob("*.html") if path.relative_to(site).as_posix() not in {p.link for p in pages}
    ]:
        if old.name != "index.html":
            old.unlink()
    record.write_atomic(site / "index.html", index(pages))
    return site / "index.html"


@dataclass(frozen=True)
class Page:
    """An executed notebook with its result."""

    tier: str
    notebook: nbformat.NotebookNode
    result: dict[str, Any]

    @property
    def link(self) -> str:
        """Path within the site."""
        return f"{self.tier}/{self.result['run']}.html"

    @property
    def title(self) -> str:
        """The first heading, as plain text."""
        for cell in self.notebook.cells:
            if cell.cell_type == "markdown" and (heading := re.search(r"^#\s+(.+)$", cell.source, re.MULTILINE)):
                return re.sub(r"[*`]", "", heading[1])
        return self.result["notebook"]

    @property
    def figure(self) -> tuple[str, str] | None:
        """Data URI and alternative text of the figure whose cell has the tag `card`, or of the first; None without."""
        soup = bs4.BeautifulSoup(body(self.notebook), "html.parser")
        image = soup.select_one(".celltag_card img") or soup.find("img")
        return (image["src"], image["alt"]) if image else None


def find_pages(root: Path) -> list[Page]:
    """All complete results with their executed notebooks: by notebook, best tier and a tier's main run first."""
    pages = []
    for tier in TIERS:
        for path in sorted((root / "outputs" / tier).glob("*.json")):
            executed = path.with_suffix(".ipynb")
            result = json.loads(path.read_text(encoding="utf-8"))
            if executed.exists() and not record.incomplete(result):
                pages.append(Page(tier, nbformat.read(executed, as_version=4), result))
    return sorted(pages, key=lambda page: (page.result["notebook"], TIERS.index(page.tier), len(page.result["run"])))


# ---- a notebook


class _Renderer(IPythonRenderer):
    """Markdown with formulas as MathML, which browsers show without a script."""

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def multiline_math(self, text: str) -> str:
        return mathml(text.removeprefix("$$").removesuffix("$$"), "block")

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


class _Exporter(HTMLExporter):
    @jinja2.pass_context
    def markdown2html(self, context, source):
        """Markdown of a cell or an output, its attached images embedded."""
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = _Renderer(escape=False, attachments=attachments, exclude_anchor_links=True)
        return MarkdownWithMath(renderer=renderer).render(source)

    def default_filters(self):
        """Those of nbconvert, with ours in place of its Markdown."""
        yield from super().default_filters()
        yield ("markdown2html", self.markdown2html)


def mathml(tex: str, display: str) -> str:
    """A formula as MathML; as its source in <code> where the converter does not know a command."""
    tex = re.sub(r"(begin|end)\{(aligned|equation|gathered)\*?\}", r"\1{align*}", tex.strip())
    try:
        markup = convert(tex, display=display)
    except Exception:  # the converter has no common error class, and a page must not fail for a formula
        markup = ""
    if not markup or re.search(r"<m[a-z]+>(\\|&</)", markup):
        markup = f"<code>{html.escape(tex)}</code>"
    return f"<div class='formula'>{markup}</div>" if display == "block" else markup


def body(notebook: nbformat.NotebookNode) -> str:
    """The cells as HTML: alternative texts set, wide things in boxes that scroll, no script."""
    notebook = nbformat.from_dict(json.loads(json.dumps(notebook)))
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+\s+(.+)$", cell.source, re.MULTILINE)
            heading = headings[-1] if headings else heading
            continue
        alt = cell.metadata.get("alt") or next(iter(re.findall(r"^#\s*(.+)$", cell.source, re.MULTILINE)), None)
        for output in cell.outputs:
            _prepare(output, alt or f"Figure: {heading}")
    raw, _ = _Exporter(template_name="basic").from_notebook_node(notebook)
    soup = bs4.BeautifulSoup(raw, "html.parser")
    for tag in soup.find_all(["script", "link", "iframe"]):
        tag.decompose()
    for prompt in soup.select(".prompt"):
        prompt.decompose()
    for style in soup.find_all("style", string=re.compile(r"@import|url\(")):
        style.decompose()
    for image in soup.find_all("img"):
        if not image["src"].startswith("data:"):
            image.replace_with(f"[image: {image['alt']}]")  # a page loads nothing from elsewhere
            continue
        image["loading"] = "lazy"
        image.attrs.pop("width", None), image.attrs.pop("height", None)
    for wide in soup.find_all("table"):
        wide.attrs.pop("border", None)
        wide.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    return str(soup)


def _prepare(output: nbformat.NotebookNode, alt: str) -> None:
    data = output.get("data", {})
    if "text/latex" in data and "text/html" not in data:
        data["text/html"] = mathml(data["text/latex"].strip().strip("$"), "block")
    for kind in [kind for kind in data if kind.startswith("image/")]:
        output.setdefault("metadata", {}).setdefault(kind, {})["alt"] = html.escape(alt, quote=True)


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
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    values = "".join(
        f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in result["parameters"].items()
    )
    content = f"""<header><p><a href="../index.html">← all notebooks</a></p>
<p class="headline">{html.escape(result["headline"])}</p>{_verdicts(result)}
<details><summary>How this was made</summary><dl>{rows}</dl><h4>Parameters</h4><dl>{values}</dl></details></header>
<main class="notebook">{body(page.notebook)}</main>"""
    return _document(page.title, content)


# ---- the index


def index(pages: list[Page]) -> str:
    """One card a notebook: its best tier, and links to the others."""
    cards = []
    for name in dict.fromkeys(page.result["notebook"] for page in pages):
        best, *others = [page for page in pages if page.result["notebook"] == name]
        cards.append(_card(best, others))
    intro = "Vision transformers, cheap to adapt and cheap to run: what published methods really do, number by number."
    content = f"""<header><h1>leanvit</h1><p>{intro}</p></header>
<main class="cards">{"".join(cards) or "<p>No results yet: <code>make reproduce</code> makes them.</p>"}</main>"""
    return _document("leanvit: results", content)


def _card(page: Page, others: list[Page]) -> str:
    figure = page.figure
    picture = f'<img src="{figure[0]}" alt="{html.escape(figure[1], quote=True)}">' if figure else ""
    links = " · ".join(f'<a href="{other.link}">{html.escape(_short(other))}</a>' for other in others)
    also = f"<p class='also'>also: {links}</p>" if others else ""
    return f"""<article><a class="picture" href="{page.link}" tabindex="-1" aria-hidden="true">{picture}</a>
<div><h2><a href="{page.link}">{html.escape(page.title)}</a></h2>
<p class="headline">{html.escape(page.result["headline"])}</p>{_verdicts(page.result)}
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


# ---- the page


def _document(title: str, content: str) -> str:
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{light}
@media (prefers-color-scheme: dark) {{ {dark} }}
{CSS}</style></head>
<body>
{content}
</body></html>
"""


CSS = """
:root { color-scheme: light dark; --text: #1d2430; --soft: #5b6675; --page: #fbfbfa; --card: #fff; --line: #dfe3e8;
  --code: #f3f4f2; --link: #0b61a4; --match: #0072b2; --differ: #b34700; --none: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #a2acb9; --page: #14171c; --card: #1c2027;
  --line: #333a44; --code: #20252d; --link: #7db8ea; --match: #56b4e9; --differ: #f0944d; --none: #9aa3af; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 78rem; background: var(--page);
  color: var(--text); font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: 2px; }
blockquote { margin: 1rem 0; padding-left: 1rem; border-left: 3px solid var(--line); color: var(--soft); }
h1, h2, h3, h4 { line-height: 1.25; margin: 2.2em 0 .6em; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); margin-top: .4em; }
img { max-width: 100%; height: auto; }
code, pre { font-family: ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace; font-size: .86rem; }
code { background: var(--code); padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere; }
.headline { font-size: 1.1rem; font-weight: 600; margin: .3em 0 .8em; overflow-wrap: anywhere; }
.verdicts { display: flex; flex-wrap: wrap; gap: .5rem; list-style: none; margin: 0 0 .8rem; padding: 0; }
.verdicts li { border: 1px solid var(--none); color: var(--none); border-radius: 999px; padding: 0 .7rem;
  font-size: .85rem; }
.verdicts .none { opacity: .6; }
.verdicts .matches { border-color: var(--match); color: var(--match); }
.verdicts .differs { border-color: var(--differ); color: var(--differ); }
.also { color: var(--soft); font-size: .88rem; margin: .3em 0; }

.cards { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr));
  margin-top: 2rem; }
.cards article { background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden;
  display: flex; flex-direction: column; }
.cards article > div { padding: 1rem 1.2rem 1.1rem; }
.cards h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
.cards h2 a:not(:hover) { text-decoration: none; }
.cards .picture { background: #fff; display: block; border-bottom: 1px solid var(--line); }
.cards .picture:empty { display: none; }
.cards .picture img { display: block; width: 100%; height: 13rem; object-fit: contain; padding: .6rem; }

body:has(.notebook) { max-width: 66rem; }
header { border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
header details { color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.input_area .highlight { background: var(--code); border-left: 3px solid var(--line); border-radius: 4px; }
.input_area pre { overflow-x: auto; margin: 0; padding: .7rem 1rem; line-height: 1.45; }
.highlight pre { background: none; }
.text_cell_render pre { overflow-x: auto; background: var(--code); padding: .7rem 1rem; border-radius: 4px; }
.text_cell_render pre code { background: none; padding: 0; overflow-wrap: normal; }
.code_cell { margin: 1rem 0 1.4rem; }
.output_area { margin: .7rem 0; }
.output_area pre { overflow-x: auto; margin: 0; padding: .2rem 1rem; line-height: 1.4; }
.output_stderr { color: var(--soft); }
.output_png, .output_jpeg, .output_svg { overflow-x: auto; }
.output_png img, .output_jpeg img, .output_svg img { background: #fff; border-radius: 6px; }
.scroll, .formula { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; width: max-content; max-width: 60rem; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { min-width: 3rem; } .dataframe td { text-align: right; } .dataframe tbody th { font-weight: 400; color: var(--soft);
} thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; } .ansi-red-fg { color: var(--differ); }
.ansi-green-fg { color: #2a7f4f; } .ansi-bold { font-weight: 600; }
"""
