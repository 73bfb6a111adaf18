"""Parameters of a notebook: declared in its `parameters` cell, set by YAML files and `-p`, checked before a run.

A declaration is one typed and commented line, its range (if any) in brackets at the end of the comment:

    lr: float = 1e-3  # peak learning rate [> 0]
    bases: str = "LP_L1-4"  # which Walsh bases [one of LP_L1-2|LP_L1-4|LP_L1-8]
    shots: list[int] = [5, 20]  # images per class [1..64]

Types: bool, int, float, str, list[...] of these, and `... | None`. YAML is read as version 1.2, where `1e-3` is a
number; duplicate keys, anchors and deep nesting are refused. What becomes a file or a folder is declared with the range
`[a plain name]`: it holds no path, so that nothing is written outside of outputs/. Every problem ends in a
ParameterError that names the file, the key, the value and what is right.
"""

import ast
import difflib
import io
import json
import math
import re
import reprlib
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent

WORDS = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "text"}
PLAIN_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)
MAX_DEPTH = 20  # of lists and mappings in each other
MAX_CHARACTERS = 1_000_000  # of a file


class ParameterError(ValueError):
    """A parameter, or the file or cell that holds it, is wrong; the text is meant for the person who wrote it."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell. `kind` is bool, int, float or str; `low`/`high` bound numbers (low may be
    exclusive).
    """

    name: str
    kind: str
    default: Any
    help: str = ""
    is_list: bool = False
    optional: bool = False
    low: float | None = None
    low_open: bool = False
    high: float | None = None
    choices: tuple[str, ...] = ()
    plain_name: bool = False

    def wanted(self) -> str:
        """What a right value looks like, in words."""
        text = WORDS[self.kind]
        if self.plain_name:
            text = "a plain name (letters, digits, _ . + -), no path"
        elif self.choices:
            text = "one of " + ", ".join(self.choices)
        elif self.high is not None:
            text += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            text += f" {'>' if self.low_open else '>='} {self.low:g}"
        if self.is_list:
            text = f"a list, each item {text}"
        return text + (", or null" if self.optional else "")

    def convert(self, value: Any) -> Any:
        """The value in its declared type (an int becomes a float where a float is declared); `ValueError` when it is
        wrong.
        """
        if value is None and self.optional:
            return None
        if self.is_list:
            if not isinstance(value, list | tuple):
                raise ValueError
            return [self._item(item) for item in value]
        return self._item(value)

    def _item(self, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and self.kind in ("int", "float") and abs(value) >= 2**63:
            raise ValueError("and of 64 bits")
        if self.kind == "float" and whole:
            value = float(value)
        if type(value).__name__ != self.kind:
            raise ValueError
        if self.kind == "str" and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError("and of whole characters, not halves of surrogate pairs")
        if self.plain_name and not PLAIN_NAME.fullmatch(value):
            raise ValueError
        if self.choices and str(value) not in self.choices:
            raise ValueError
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        if self.low is not None and (value < self.low or (self.low_open and value == self.low)):
            raise ValueError
        if self.high is not None and value > self.high:
            raise ValueError
        return value


def near(name: str, known) -> str:
    """' (did you mean ...?)' when something known is spelt alike, else ''."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.55)
    return f" (did you mean {close[0]}?)" if close else ""


class _Tree(Composer):
    """Documents without aliases, which can stand for more values than there is memory, and of bounded depth."""

    level = 0

    def compose_node(self, parent, index):
        event = self.parser.peek_event()
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            raise ComposerError(problem="anchors (&) and aliases (*) are not read", problem_mark=event.start_mark)
        if self.level == MAX_DEPTH:
            raise ComposerError(problem=f"more than {MAX_DEPTH} levels deep", problem_mark=event.start_mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


def _load(text: str) -> Any:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Tree
    return yaml.load(text)


def read_yaml(path: Path) -> Any:
    """The document in `path`, YAML 1.2, safe types only; `ParameterError`, which is a `ValueError`, for bad syntax,
    duplicate keys, anchors and unreadable files.
    """
    try:
        return _load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParameterError(
            f"{path}: no such file{near(path, sorted(map(str, path.parent.glob('*.yaml'))))}"
        ) from None
    except DuplicateKeyError as error:
        key = re.search(r'duplicate key "(.*?)"', error.problem or "")
        raise ParameterError(
            f"{path}: line {error.problem_mark.line + 1}: the key {key[1] if key else '?'} stands twice; keep one"
        ) from None
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ParameterError(f"{path}:{line} not valid YAML: {error.problem or error.context}") from None
    except Exception as error:  # numbers and dates that Python cannot hold have errors of their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ParameterError(f"{path}: cannot be read: {first}") from None


def read_values(path: Path) -> dict[str, Any]:
    """The mapping name → value in a parameters file; `ParameterError` for an empty file or a list ({} says: all
    defaults).
    """
    values = read_yaml(path)
    if values is None:
        raise ParameterError(f"{path}: is empty; it must hold 'name: value' lines, or {{}} for all the defaults")
    if not isinstance(values, dict):
        raise ParameterError(f"{path}: holds {_shown(values)}; it must hold 'name: value' lines")
    return {str(name): value for name, value in values.items()}


def parse_value(text: str) -> Any:
    """A value from the command line, read as in YAML: 1e-3, true, null, [1, 2], text.

    What is not YAML, or too long for it (a `ValueError`), stays text.

    >>> from leanvit import params
    >>> [params.parse_value(word) for word in ("1e-3", "[1, 2]", "text")]
    [0.001, [1, 2], 'text']
    """
    try:
        return _load(text)
    except Exception:
        return text  # not YAML, so it can only be meant as text; the type check has the last word


def declared(notebook: Path) -> dict[str, Parameter]:
    """The parameters that the cell tagged `parameters` of a notebook declares, by name, in order.

    Raises `ParameterError` where there is no such notebook, not exactly one such cell, or a wrong declaration.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
        sources = ["".join(cell["source"]) for cell in tagged]
    except FileNotFoundError:
        known = sorted(p.stem for p in notebook.parent.glob("*.ipynb"))
        raise ParameterError(f"{notebook}: no such notebook{near(notebook.stem, known)}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ParameterError(f"{notebook}: not a notebook: {error}") from None
    if len(sources) != 1:
        raise ParameterError(f"{notebook}: has {len(sources)} cells tagged 'parameters'; it must have exactly one")
    return parse_cell(sources[0], str(notebook))


def parse_cell(source: str, where: str) -> dict[str, Parameter]:
    """The declarations in the source of a parameters cell; `ParameterError` names the first that is wrong.

    >>> from leanvit import params
    >>> known = params.parse_cell("lr: float = 1e-3  # peak learning rate [> 0]", "a notebook")
    >>> known["lr"].default, known["lr"].wanted()
    (0.001, 'a number > 0')
    """
    try:
        statements = ast.parse(source).body
        comments = {
            token.start[0]: token.string.lstrip("# ").rstrip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
    except SyntaxError as error:
        raise ParameterError(f"{where}: parameters cell, line {error.lineno}: {error.msg}") from None
    except (ValueError, tokenize.TokenError, RecursionError, MemoryError) as error:  # a zero byte, a thousand brackets
        raise ParameterError(f"{where}: parameters cell: {error or 'nested too deeply'}") from None
    found = {}
    for statement in statements:
        line = (ast.get_source_segment(source, statement) or "").splitlines()[0]
        is_declaration = (
            isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value
        )
        if not is_declaration:
            raise ParameterError(f"{where}: parameters cell: '{line}' must read 'name: type = default  # help'")
        name = statement.target.id
        try:
            default = ast.literal_eval(statement.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise ParameterError(f"{where}: parameters cell: the default of {name} must be a plain value") from None
        found[name] = _parameter(
            name, ast.unparse(statement.annotation), default, comments.get(statement.end_lineno, ""), where
        )
    return found


def _parameter(name: str, annotation: str, default: Any, comment: str, where: str) -> Parameter:
    shape = re.fullmatch(r"(?:(list)\[)?(bool|int|float|str)\]?( \| None)?", annotation)
    if not shape or (annotation.count("[") != bool(shape[1])):
        raise ParameterError(
            f"{where}: parameters cell: {name} has the type {annotation}; not bool, int, float, str, list[…], … | None"
        )
    kind = shape[2]
    text, bounds = comment, {}
    if bracket := re.fullmatch(r"(.*?)\s*\[([^\[\]]+)\]", comment):
        text, bounds = bracket[1], _bounds(bracket[2])
    parameter = Parameter(name, kind, default, text, is_list=bool(shape[1]), optional=bool(shape[3]), **bounds)
    try:
        default = parameter.convert(default)
    except ValueError:
        raise ParameterError(
            f"{where}: parameters cell: the default of {name} is {_shown(default)}; it must be {parameter.wanted()}"
        ) from None
    return Parameter(**{**vars(parameter), "default": default})


def _bounds(text: str) -> dict[str, Any]:
    """The meaning of a bracket: '> 0', '>= 0', '0..1', 'one of a|b'; {} for a bracket that only is part of the help."""
    number = r"(-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)"
    if text == "a plain name":
        return {"plain_name": True}
    if text.startswith("one of "):
        return {"choices": tuple(choice.strip() for choice in text.removeprefix("one of ").split("|"))}
    if match := re.fullmatch(rf"(>=?)\s*{number}", text):
        return {"low": float(match[2]), "low_open": match[1] == ">"}
    if match := re.fullmatch(rf"{number}\.\.{number}", text):
        return {"low": float(match[1]), "high": float(match[2])}
    return {}


def resolve(known: dict[str, Parameter], given: dict[str, Any], where: str) -> dict[str, Any]:
    """All parameters with their values: `given` over the defaults, each checked; `ParameterError` lists every problem
    at once.

    >>> from leanvit import params
    >>> known = params.parse_cell("steps: int = 10  # of the training [> 0]", "a notebook")
    >>> params.resolve(known, {"steps": 20}, "here")
    {'steps': 20}
    >>> params.resolve(known, {"step": 20}, "here")
    Traceback (most recent call last):
    leanvit.params.ParameterError: here: step = 20 (an integer): there is no such parameter (did you mean steps?)
    """
    problems = []
    values = {name: parameter.default for name, parameter in known.items()}
    for name, value in given.items():
        if name not in known:
            name = name if len(name) <= 80 and name.isprintable() else _SHORT.repr(name)
            hint = near(name, known) or f"; known are {', '.join(known)}"
            problems.append(f"{where}: {name} = {_shown(value)}: there is no such parameter{hint}")
            continue
        try:
            values[name] = known[name].convert(value)
        except ValueError as error:
            about = f" ({known[name].help})" if known[name].help else ""
            right = f"{known[name].wanted()} {error}".strip()
            problems.append(f"{where}: {name} = {_shown(value)}: must be {right}{about}")
    if problems:
        raise ParameterError("\n".join(problems))
    return values


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def _shown(value: Any) -> str:
    """A value with its kind, so that '1' and 1 can be told apart in a message."""
    kinds = {
        str: "text",
        bool: "a truth value",
        int: "an integer",
        float: "a number",
        list: "a list",
        dict: "a mapping",
    }
    if value is None:
        return "null"
    try:
        text = _SHORT.repr(value)
    except ValueError:  # an integer that Python does not write in decimal digits
        text = "a number of thousands of digits"
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return f"{text} ({kinds.get(type(value), type(value).__name__)})"
