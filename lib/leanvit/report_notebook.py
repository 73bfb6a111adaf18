"""An executed notebook as HTML: formulas as MathML, code folded, figures at their size, tables in boxes."""

import base64
import html
import json
import re
import struct

import bs4
import jinja2
import nbformat
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from leanvit.report_frame import Entry


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


def title(notebook: nbformat.NotebookNode) -> str | None:
    """The first heading, as plain text."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (heading := re.search(r"^#\s+(.+)$", cell.source, re.MULTILINE)):
            return re.sub(r"[*`]", "", heading[1])
    return None


def figures(notebook: nbformat.NotebookNode, tag: str | None = None) -> list[tuple[str, str]]:
    """Data URI and alternative text of every PNG figure, or of those whose cell has the tag.

    The alternative text is the cell metadata "alt", else the first comment of the cell, else the heading above it.
    """
    found, heading = [], ""
    for cell in notebook.cells:
        heading = _heading(cell, heading)
        if cell.cell_type == "code" and (tag is None or tag in cell.metadata.get("tags", ())):
            pictures = [output.get("data", {}).get("image/png") for output in cell.outputs]
            found += [(f"data:image/png;base64,{''.join(p.split())}", _alt(cell, heading)) for p in pictures if p]
    return found


def _heading(cell: nbformat.NotebookNode, before: str) -> str:
    headings = re.findall(r"^#+\s+(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else ()
    return headings[-1] if headings else before


def _alt(cell: nbformat.NotebookNode, heading: str) -> str:
    return cell.metadata.get("alt") or _comment(cell.source) or f"Figure: {heading}"


def _comment(source: str) -> str | None:
    return next(iter(re.findall(r"^#\s*(.+)$", source, re.MULTILINE)), None)


def body(notebook: nbformat.NotebookNode) -> tuple[str, list[Entry]]:
    """The cells as HTML without scripts and without the title, and the headings for a table of contents.

    Each cell has the anchor `cell-id=<id>`, each heading its words joined by "-".
    """
    notebook = nbformat.from_dict(json.loads(json.dumps(notebook)))
    heading = ""
    for cell in notebook.cells:
        heading = _heading(cell, heading)
        for output in cell.get("outputs", ()):
            _prepare(output, _alt(cell, heading))
    raw, _ = _Exporter(template_name="basic").from_notebook_node(notebook)
    soup = bs4.BeautifulSoup(raw, "html.parser")
    for tag in soup.find_all(["script", "link", "iframe"]) + soup.select(".prompt"):
        tag.decompose()
    for style in soup.find_all("style", string=re.compile(r"@import|url\(")):
        style.decompose()
    for cell in soup.select(".code_cell"):
        _fold(soup, cell)
    for image in soup.find_all("img"):
        _fit(soup, image)
    for wide in soup.find_all("table"):
        wide.attrs.pop("border", None)
        wide.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    for link in soup.select('a[href$=".ipynb"]'):
        link.unwrap()  # notebooks are no part of the site
    if first := soup.select_one(".text_cell_render h1"):
        first.decompose()  # the page's header has it
    contents = _anchors(soup)
    return str(soup), contents


def _prepare(output: nbformat.NotebookNode, alt: str) -> None:
    data = output.get("data", {})
    if "text/latex" in data and "text/html" not in data:
        data["text/html"] = mathml(data["text/latex"].strip().strip("$"), "block")
    for kind in [kind for kind in data if kind.startswith("image/")]:
        output.setdefault("metadata", {}).setdefault(kind, {})["alt"] = html.escape(alt, quote=True)


def _fold(soup: bs4.BeautifulSoup, cell: bs4.Tag) -> None:
    """The code of a cell behind one line that says what it is."""
    code = cell.select_one(".input")
    source = code.get_text().strip("\n") if code else ""
    if not source.strip():
        return
    classes = cell.get("class", [])
    what = next((name for name in ("injected-parameters", "parameters") if f"celltag_{name}" in classes), None)
    what = {"injected-parameters": "parameters of this run", "parameters": "parameters: defaults"}.get(what, "code")
    comment = None if what != "code" else _comment(source)
    lines = len(source.splitlines())
    summary = soup.new_tag("summary")
    summary.string = f"{comment or what} · {lines} line{'s' if lines > 1 else ''}"
    details = soup.new_tag("details")
    inner = list(code.contents)
    details.append(summary)
    for part in inner:
        details.append(part.extract())
    code.append(details)


def _fit(soup: bs4.BeautifulSoup, image: bs4.Tag) -> None:
    if not image["src"].startswith("data:"):
        image.replace_with(f"[image: {image['alt']}]")  # a page loads nothing from elsewhere
        return
    width = str(image.get("width", ""))
    image.replace_with(picture(image["src"], image["alt"], width))


def picture(uri: str, alt: str, width: str = "") -> bs4.Tag:
    """An embedded figure in a box: `width` CSS pixels wide (without: its pixels), so sharper ones are as large."""
    soup = bs4.BeautifulSoup("", "html.parser")
    image = soup.new_tag("img", attrs={"src": uri, "alt": alt})
    if own := size(uri):  # height and width, so that the text does not jump when the figure is there
        wide = int(width) if width.isdigit() else own[0]
        height = str(own[1] * wide // own[0])
        image.attrs |= {"width": str(wide), "height": height, "style": f"--natural: {wide}px"}
    box = soup.new_tag("div", attrs={"class": "picture-box", "tabindex": "0"})
    box.append(image)
    return box


def size(uri: str) -> tuple[int, int] | None:
    """Width and height in pixels of a PNG in a data URI; None for another kind."""
    kind, _, data = uri.partition(";base64,")
    if kind != "data:image/png":
        return None
    return struct.unpack(">II", base64.b64decode(data[:32])[16:24])


def _anchors(soup: bs4.BeautifulSoup) -> list[Entry]:
    entries: list[Entry] = []
    taken = {tag["id"] for tag in soup.find_all(id=True)}
    for heading in soup.select(".text_cell_render :is(h1, h2, h3)"):
        text = " ".join(heading.get_text().split())
        name = stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
        number = 1
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        heading["id"] = name
        if heading.name != "h1":
            entries.append((int(heading.name[1]), name, text))
    return entries
