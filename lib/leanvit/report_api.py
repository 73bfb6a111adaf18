"""The library's reference for the site: docstrings and signatures of its public names, read from the sources.

Nothing is imported, so a room whose extra is not installed has its page, too. Docstrings are plain text: paragraphs,
lists of "* " or "- ", indented blocks, `code`; "Args:", "Returns:" and "Raises:" with indented entries.
"""

import ast
import functools
import html
import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonConsoleLexer, PythonLexer

from leanvit.report_frame import Entry, document

METHODS = ("lbp_wht", "comcat", "kadaptation", "block_expansion", "uvc", "baselines")  # a room is a method's by prefix
WIDTH = 88  # of a signature on one line
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Room:
    """A module of the package, parsed."""

    name: str  # below leanvit, as "kernels.walsh"
    source: str
    tree: ast.Module

    @property
    def link(self) -> str:
        """Path within the site."""
        return f"api/{self.name or 'leanvit'}.html"

    @property
    def full(self) -> str:
        """The name to import."""
        return f"leanvit.{self.name}".rstrip(".")

    @functools.cached_property
    def lines(self) -> list[str]:
        """The source, line by line."""
        return self.source.splitlines()


def rooms(package: Path | None = None) -> list[Room]:
    """The public modules of a package folder, by default leanvit's own, sorted by name."""
    package = package or Path(__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not any(part.startswith("_") for part in name.split(".")):
            source = path.read_text(encoding="utf-8")
            found.append(Room(name, source, ast.parse(source)))
    return [room for room in found if room.name != "kernels"]  # an empty front


def pages(found: list[Room]) -> dict[str, str]:
    """Every page of the reference by its path within the site: api.html and one a room."""
    where = {room.full: room for room in found}
    return {"api.html": front(found)} | {room.link: page(room, where) for room in found}


# ---- pages


def front(found: list[Room]) -> str:
    """All rooms in three groups, with the first sentence of each."""
    first = {room.name for room in found if any(f"{room.name}_".startswith(f"{name}_") for name in METHODS)}
    kernels = {room.name for room in found if room.name.startswith("kernels.")}
    groups = {
        "The methods": sorted((r for r in found if r.name in first), key=lambda r: (_method(r.name), r.name)),
        "Their kernels": [r for r in found if r.name in kernels],
        "The ground under them": [r for r in found if r.name not in first | kernels],
    }
    lists = "".join(
        f'<h2 id="{_slug(title)}">{title}</h2><ul class="rooms">{"".join(map(_line, members))}</ul>'
        for title, members in groups.items()
        if members
    )
    content = f"""<header><h1>The library</h1>
<p>What each room of <code>leanvit</code> offers: its public functions and classes, with shapes, units and errors. The
rooms named in the first group are those to import; the ones beside them are their parts.</p></header>
<main class="api">{lists}</main>"""
    return document("leanvit: the library", content, here="api.html")


def _method(name: str) -> int:
    return next(number for number, method in enumerate(METHODS) if f"{name}_".startswith(f"{method}_"))


def _line(room: Room) -> str:
    summary = (ast.get_docstring(room.tree) or "").split("\n\n")[0]
    return f'<li><a href="{room.link}">{room.full}</a><span>{_inline(summary)}</span></li>'


def page(room: Room, where: dict[str, Room]) -> str:
    """The reference of one room; names that it hands on from others are listed with a link to their place."""
    nodes = [node for node in room.tree.body if isinstance(node, Function | ast.ClassDef) and _public(node.name)]
    own = "".join(_entry(node, room.lines) for node in nodes)
    entries: list[Entry] = [(2, node.name, node.name) for node in nodes]
    lines = "".join(_passed_on(room, where))
    if lines:
        lines = f'<h2 id="from-other-rooms">From other rooms</h2><ul class="rooms">{lines}</ul>'
        entries.insert(0, (2, "from-other-rooms", "From other rooms"))
    content = f"""<header><h1>{room.full}</h1>{prose(ast.get_docstring(room.tree) or "")}</header>
<main class="api">{lines}{own}</main>"""
    return document(room.full, content, root="../", here="api.html", contents=entries)


def _passed_on(room: Room, where: dict[str, Room]) -> Iterator[str]:
    public = _all(room.tree)
    for node in room.tree.body:
        if not isinstance(node, ast.ImportFrom) or node.module not in where:
            continue
        home = where[node.module]
        for name in (alias.name for alias in node.names if (alias.asname or alias.name) in public):
            doc = next((ast.get_docstring(n) for n in home.tree.body if getattr(n, "name", None) == name), None)
            anchor = f"#{name}" if doc else ""
            summary = f"<span>{_inline((doc or '').split(chr(10) * 2)[0])}</span>"
            address = home.link.removeprefix("api/")
            yield f'<li><a href="{address}{anchor}">{name}</a> <small>{home.full}</small>{summary}</li>'


def _all(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == "__all__" for target in node.targets):
            return set(ast.literal_eval(node.value))
    return set()


# ---- functions and classes


def _entry(node: Function | ast.ClassDef, lines: list[str], inside: str = "") -> str:
    name = f"{inside}.{node.name}" if inside else node.name
    level = "h3" if inside else "h2"
    marks = {_word(decorator) for decorator in node.decorator_list}
    kind = "class" if isinstance(node, ast.ClassDef) else "property" if marks & PROPERTIES else ""
    label = f' <span class="kind">{kind}</span>' if kind else ""
    parts = [f'<section id="{name}"><{level}>{name}{label}</{level}>']
    if isinstance(node, ast.ClassDef):
        members = [n for n in node.body if isinstance(n, Function) and _public(n.name) and ast.get_docstring(n)]
        parts += [_declaration(_class_line(node, lines)), prose(ast.get_docstring(node) or "")]
        parts += [_entry(member, lines, node.name) for member in members]
    else:
        head = "".join(f"@{mark}\n" for mark in ("classmethod", "staticmethod") if mark in marks)
        parts += [] if kind else [_declaration(head + signature(node, lines))]
        parts += [prose(ast.get_docstring(node) or "")]
    return "".join(parts) + "</section>"


PROPERTIES = {"property", "cached_property"}


def _word(decorator: ast.expr) -> str:
    decorator = decorator.func if isinstance(decorator, ast.Call) else decorator
    return decorator.attr if isinstance(decorator, ast.Attribute) else getattr(decorator, "id", "")


def _class_line(node: ast.ClassDef, lines: list[str]) -> str:
    """What a class is built from: the fields of a dataclass or an enumeration with their comments, or __init__."""
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    if "dataclass" in {_word(decorator) for decorator in node.decorator_list} or "NamedTuple" in bases:
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and _public(n.target.id)]
        return "\n".join([f"{head}:", *(line for n in fields for line in lines[n.lineno - 1 : n.end_lineno])])
    start = next((n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None)
    return f"{head}\n{signature(start, lines, node.name)}" if start else head


def signature(node: Function, lines: list[str], name: str | None = None) -> str:
    """`name(arguments) -> what comes back`, one argument a line where one line is too long; without `self`."""
    arguments = _arguments(node.args, lines)
    back = f" -> {_text(node.returns, lines)}" if node.returns and name is None else ""
    line = f"{name or node.name}({', '.join(arguments)}){back}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name or node.name}(", *(f"    {argument}," for argument in arguments), f"){back}"])


def _arguments(given: ast.arguments, lines: list[str]) -> list[str]:
    positional = given.posonlyargs + given.args
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    words = [_argument(*pair, lines) for pair in zip(positional, defaults, strict=True)]
    if given.posonlyargs:
        words.insert(len(given.posonlyargs), "/")
    if positional and positional[0].arg in ("self", "cls"):
        words = words[1:]
    if given.vararg:
        words.append(f"*{_argument(given.vararg, None, lines)}")
    elif given.kwonlyargs:
        words.append("*")
    words += [_argument(*pair, lines) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return words + ([f"**{_argument(given.kwarg, None, lines)}"] if given.kwarg else [])


def _argument(argument: ast.arg, default: ast.expr | None, lines: list[str]) -> str:
    kind = f": {_text(argument.annotation, lines)}" if argument.annotation else ""
    if default is None:
        return f"{argument.arg}{kind}"
    return f"{argument.arg}{kind} = {_text(default, lines)}" if kind else f"{argument.arg}={_text(default, lines)}"


def _text(node: ast.expr, lines: list[str]) -> str:
    """As it is written (1e-3, not 0.001), on one line; ast.get_source_segment would split the file each time."""
    first, last = node.lineno - 1, node.end_lineno - 1
    text = [line.encode() for line in lines[first : last + 1]]  # columns are those of bytes
    text[-1] = text[-1][: node.end_col_offset]
    text[0] = text[0][node.col_offset :]
    return " ".join(b" ".join(text).decode().split())


def _public(name: str) -> bool:
    return not name.startswith("_")


# ---- text


def prose(text: str) -> str:
    """A docstring as HTML."""
    blocks: list[tuple[str, list[str]]] = []  # "text", "item", "code" or "section", and its lines
    gap = True
    for line in inspect.cleandoc(text).splitlines():
        if not line:
            gap = True
            continue
        kind, lines = blocks[-1] if blocks else ("", [])
        new = _kind(line, kind, lines, gap)
        if new == kind and (new == "code" or not gap) and not line.startswith(BULLETS) and not SECTION.fullmatch(line):
            lines += ["", line] if gap else [line]
        else:
            blocks.append((new, [line]))
        gap = False
    groups = itertools.groupby(blocks, key=lambda block: block[0])
    return "".join(_group(kind, [lines for _, lines in members]) for kind, members in groups)


BULLETS = ("* ", "- ")
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):")


def _kind(line: str, before: str, lines: list[str], gap: bool) -> str:
    if SECTION.fullmatch(line) or (before == "section" and line.startswith("    ")):
        return "section"
    if line.startswith(BULLETS) or (before == "item" and line.startswith("  ") and not gap):
        return "item"
    doctest = line.startswith(">>> ") or (before == "code" and not gap and lines[0].startswith(">>> "))
    return "code" if doctest or line.startswith("    ") else "text"


def _group(kind: str, members: list[list[str]]) -> str:
    if kind == "section":
        return "".join(map(_section, members))
    if kind == "code":
        return "".join(_code(inspect.cleandoc("\n" + "\n".join(lines))) for lines in members)
    if kind == "item":
        items = (f"<li>{_inline(' '.join(lines)[2:])}</li>" for lines in members)
        return f"<ul>{''.join(items)}</ul>"
    return "".join(f"<p>{_inline(' '.join(lines))}</p>" for lines in members)


def _section(lines: list[str]) -> str:
    title, *lines = lines
    entries = re.split(r"\n(?=\S)", inspect.cleandoc("\n" + "\n".join(lines)))
    named = [re.fullmatch(r"(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*): (.*)", entry, re.DOTALL) for entry in entries]
    if all(named):
        text = "".join(f"<dt><code>{name[1]}</code></dt><dd>{_inline(name[2])}</dd>" for name in named)
        return f'<p class="part">{title}</p><dl>{text}</dl>'
    return f'<p class="part">{title}</p><p>{_inline(" ".join(entries))}</p>'


def _inline(text: str) -> str:
    """Text with `code` marked and arXiv numbers linked."""
    parts = re.split(r"`([^`]+)`", " ".join(text.split()))
    out = []
    for number, part in enumerate(parts):
        part = html.escape(part, quote=False)
        link = r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>'
        out.append(f"<code>{part}</code>" if number % 2 else re.sub(r"\barXiv[ :](\d{4}\.\d{4,5})", link, part))
    return "".join(out)


def _code(text: str) -> str:
    if text.lstrip().startswith(">>> "):
        return highlight(text, PythonConsoleLexer(), HtmlFormatter())
    try:
        ast.parse(text)
    except SyntaxError:  # a formula, a command, a table
        return f"<pre>{html.escape(text, quote=False)}</pre>"
    return highlight(text, PythonLexer(), HtmlFormatter())


def _declaration(text: str) -> str:
    return f'<div class="signature">{highlight(text, PythonLexer(), HtmlFormatter())}</div>'


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
