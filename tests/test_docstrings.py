"""The docstrings, read from the sources: there, naming what is raised, shapes, units and sources; their examples run.

Each rule gives one line for each thing that it misses. What a class's `__init__`, `__call__` and `forward` take and
raise is told by the docstring of the class (or by their own).
"""

import ast
import doctest
import importlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[1] / "lib" / "leanvit"
SECONDS = 3.0  # of processor time for one example: well under a second, and room for a busy machine

# What everybody meets first has an example in its docstring.
SHOWN = {
    "adapters": ["adapter", "compacter"],
    "baselines": ["bitfit", "detach", "full", "l2_sp", "linear_probe", "merge", "top_blocks", "vera", "wise"],
    "block_expansion": ["attach", "bypass"],
    "claims": ["check"],
    "comcat_cut": ["apply"],
    "comcat_plan": ["make_plan"],
    "comcat_search": ["search"],
    "cost": ["interleaved", "parameters", "peak_memory_bytes", "saved", "saved_bytes", "training_flops"],
    "cuts": ["load", "save"],
    "data": ["load"],
    "distill": ["Distill"],
    "evaluate": [
        "accuracy", "confusion", "mean_average_precision", "mean_per_class", "metric", "pe", "predict", "roc_auc",
        "top1",
    ],
    "export": ["export"],
    "few_shot": ["cheap_search", "search", "split"],
    "forgetting": ["knn_accuracy", "measure"],
    "images": ["few_shot"],
    "kadaptation": ["attach", "merge"],
    "kernels.walsh": ["expand", "project"],
    "lbp_wht": ["attach", "detach"],
    "lora": ["lora", "lora_qv"],
    "models": ["create"],
    "pareto": ["choose", "front"],
    "record": ["summary"],
    "throughput": ["measure"],
    "train": ["Recipe", "fit"],
    "trends": ["less"],
    "uvc": ["search"],
    "uvc_slicing": ["apply", "mask"],
}  # fmt: skip

# The rooms of methods and of what papers measure: they name their source.
SOURCED = (
    "adapters", "baselines", "block_expansion", "comcat", "counts", "elevater", "evaluate", "few_shot", "intrinsic",
    "kadaptation", "kernels.lowrank", "kernels.walsh", "lbp_wht", "lora", "published", "uvc",
)  # fmt: skip
WORK = r"arXiv|specification|\bpapers?\b|\b(?:NeurIPS|ICML|ICLR|AAAI|CVPR|ECCV|ICCV)\b.{0,4}\d{4}"
SOURCE = re.compile(rf"{WORK}|released|published|\b(?:Eq|Section|Table|Alg)[.a-z]* ?\d|\bauthors'|\bELEVATER|\(\d\.\d")
PRODUCTS = (ast.Mult, ast.Div, ast.Pow, ast.MatMult)
FORMULA = 3  # products in a body make it one

QUANTITY = {"duration", "elapsed", "flops", "latency", "macs", "memory", "speed", "throughput", "time", "timeout"}
WORDS = re.compile(r"\b(latency|latencies|wall clock|elapsed|throughput|images a second)\b", re.IGNORECASE)
UNIT = re.compile(
    r"\b(seconds?|milliseconds?|ms|microseconds?|bytes|[KMG]i?B|FLOPs|[kMG]?MACs|multiply-adds|images/s|a second|ratio"
    r"|hours?|minutes?)\b|\d ?s\b"
)
UNIT_NAMES = {"s", "ms", "us", "seconds", "bytes", "mb", "mib", "gb", "ratio"}

CODE = re.compile(r"`([^`]+)`")
SHAPE = re.compile(r"(?:^|[\s:>=])\(((?:[^()]|\([^()]*\))*)\)")  # a size may be `(N + 1)`
SIZE = re.compile(r"[\w.…'^*/+\- ()\[\]%]+")
NO_SIZE = {"images", "labels", "logits", "name", "module", "text", "weight", "bias"}
HANDED = ("forward", "backward", "extra_repr")  # torch's, told by the class
CHECKS = re.compile(r"(check|need|refuse)_|need$")  # functions of the package that are there to raise
Function = ast.FunctionDef | ast.AsyncFunctionDef


def rooms() -> dict[str, Path]:
    """Every public module of the package by its name below leanvit; the package itself is "leanvit"."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [p for p in path.relative_to(PACKAGE).with_suffix("").parts if p != "__init__"]
        found[".".join(parts) or "leanvit"] = path
    return {name: path for name, path in found.items() if "._" not in f".{name}"}


ROOMS = rooms()


def public(name: str) -> bool:
    return not name.startswith("_")


class Room:
    """A module, parsed: its public functions, classes and methods with the docstrings that hold for them."""

    def __init__(self, name: str, source: str, inherited: dict[str, dict[str, str]] | None = None):
        self.name, self.tree, self.inherited = name, ast.parse(source), inherited or {}
        self.doc = ast.get_docstring(self.tree) or ""
        self.functions = {n.name: n for n in self.tree.body if isinstance(n, Function)}

    def classes(self) -> Iterator[ast.ClassDef]:
        return (n for n in self.tree.body if isinstance(n, ast.ClassDef) and public(n.name))

    def told(self) -> Iterator[tuple[str, Function, str, ast.ClassDef | None]]:
        """(name, function, docstring, class) of what a user calls."""
        for function in self.functions.values():
            if public(function.name):
                yield function.name, function, ast.get_docstring(function) or "", None
        for class_ in self.classes():
            for method in (m for m in class_.body if isinstance(m, Function)):
                doc = ast.get_docstring(method) or self.of_base(class_, method.name)
                if method.name in HANDED or (method.name.startswith("__") and method.name.endswith("__")):
                    yield f"{class_.name}.{method.name}", method, f"{ast.get_docstring(class_)}\n{doc}", class_
                elif public(method.name):
                    yield f"{class_.name}.{method.name}", method, doc, class_

    def of_base(self, class_: ast.ClassDef, method: str) -> str:
        """The docstring that a method inherits from a class of the package, as inspect.getdoc would find it."""
        bases = [self.inherited.get(ast.unparse(base).split(".")[-1], {}) for base in class_.bases]
        return next((base[method] for base in bases if base.get(method)), "")


Types = set[str]


def raised(body: Iterable[ast.AST], called: Callable[[ast.Call], Types], caught: frozenset[str] = frozenset()) -> Types:
    """Names of the exceptions that statements raise and do not catch; `called` tells what a call raises."""
    found: Types = set()
    for node in body:
        if isinstance(node, ast.Raise) and node.exc is not None and ast.unparse(node.exc) != "NotImplementedError":
            name = _last(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
            found |= {name} if name[:1].isupper() else set()  # `raise error` hands on what it was given
        if isinstance(node, ast.Call):
            found |= called(node)
        if isinstance(node, ast.Try):
            found |= raised(node.body, called, caught | _handled(node))
            found |= raised([*node.handlers, *node.orelse, *node.finalbody], called, caught)
        else:
            found |= raised(ast.iter_child_nodes(node), called, caught)
    return set() if caught & {"Exception", "BaseException"} else found - caught


def _handled(node: ast.Try) -> frozenset[str]:
    """What the handlers of a try keep to themselves."""
    keeping = [h for h in node.handlers if not any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(h))]
    return frozenset(_last(t) for h in keeping for t in ast.walk(h.type or ast.Name("Exception")))


def _last(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def told_by(room: Room, class_: ast.ClassDef | None) -> Callable[[ast.Call], Types]:
    """What a call raises, if it is of a private function of the file or the class, or one of the package's checks."""
    methods = {m.name: m for m in class_.body if isinstance(m, Function)} if class_ else {}

    def called(call: ast.Call) -> Types:
        name, own = _last(call.func), _last(getattr(call.func, "value", ast.Pass())) in ("self", "cls")
        there = room.functions if isinstance(call.func, ast.Name) else methods if own else {}
        found = [there[name]] if not public(name) and name in there else CHECKERS.get(name, [])
        return set().union(*(raised(f.body, lambda call: set()) for f in found))

    return called


def holds_tensor(annotation: ast.expr | None) -> bool:
    """A Tensor, or something made of Tensors; not a function of Tensors."""
    if annotation is None:
        return False
    text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    text = re.sub(r"Callable\[\[.*?\], .*?\]", "", str(text))
    return re.search(r"\bTensor\b", text) is not None


def tensors(function: Function) -> list[str]:
    """Names of the parameters that hold Tensors."""
    a = function.args
    given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    return [argument.arg for argument in given if holds_tensor(argument.annotation)]


def says_shape(doc: str) -> bool:
    """A shape in backticks, as `(B, N, C)`, `x (B, N, d)` or `()`, or the word that any will do."""
    if re.search(r"\b(any|the same) shapes?\b|\bscalars?\b", doc):
        return True
    for code in CODE.findall(doc):
        for inside in SHAPE.findall(" ".join(code.split())):
            sizes = [size.strip() for size in inside.split(",")]
            if inside.strip() and "," not in inside:
                continue
            if all(SIZE.fullmatch(s) for s in sizes if s) and not NO_SIZE & set(sizes):
                return True
    return False


# ---- the rules


def undocumented(room: Room) -> Iterator[str]:
    """Modules, classes, functions and methods without a docstring; what overrides a documented one inherits its."""
    if not room.doc:
        yield "the module has no docstring"
    for class_ in room.classes():
        if not ast.get_docstring(class_):
            yield f"{class_.name} has no docstring"
    for name, method, doc, class_ in room.told():
        if not doc.strip() and not (class_ and method.name in HANDED):
            yield f"{name} has no docstring"


def unnamed_errors(room: Room) -> Iterator[str]:
    """What a function, a private one that it calls, or a check that it makes raises and its docstring does not name."""
    for name, function, doc, class_ in room.told():
        types = raised(function.body, told_by(room, class_))
        for kind in sorted(t for t in types if not re.search(rf"\b{t}\b", doc)):
            yield f"{name} raises {kind} and does not say so"


def unshaped(room: Room) -> Iterator[str]:
    """Functions of Tensors whose docstring gives no shape, or does not name each of several Tensors."""
    for name, function, doc, _ in room.told():
        taken = tensors(function)
        if (taken or holds_tensor(function.returns)) and not says_shape(doc):
            yield f"{name} takes or gives a Tensor and gives no shape in backticks"
        elif len(taken) > 1 and not function.name.startswith("__") and function.name not in HANDED:
            for parameter in (t for t in taken if not re.search(rf"\b{t}\b", doc)):
                yield f"{name} takes the Tensor {parameter} and says nothing of it"


def without_unit(room: Room) -> Iterator[str]:
    """Quantities named by a function, a parameter or a docstring's words without their unit."""
    for name, function, doc, _ in room.told():
        arguments = [*function.args.args, *function.args.kwonlyargs]
        measured = [function.name] if ast.unparse(function.returns or ast.Name("")) not in ("bool", "str") else []
        for word in [*measured, *(a.arg for a in arguments if _number(a.annotation))]:
            parts = set(word.lower().split("_"))
            known = UNIT.search(doc) or (parts & {"flops", "macs"} and UNIT.search(room.doc))  # the room's convention
            if parts & QUANTITY and not parts & UNIT_NAMES and not known:
                yield f"{name}: {word} is a quantity and the docstring gives no unit"
        text = re.sub(r"^(>>>|\.\.\.) .*$", "", doc, flags=re.MULTILINE)
        if (found := WORDS.search(text)) and not UNIT.search(text) and not set(function.name.split("_")) & UNIT_NAMES:
            yield f"{name}: the docstring speaks of {found[0]} and gives no unit"


def _number(annotation: ast.expr | None) -> bool:
    return annotation is not None and re.search(r"\b(int|float)\b", ast.unparse(annotation)) is not None


def without_source(room: Room) -> Iterator[str]:
    """In rooms of methods: the module, and functions that are a formula, name a paper, an equation, a specification."""
    if not any(f"{room.name}_".startswith(f"{prefix}_") for prefix in SOURCED):
        return
    if not re.search(WORK, room.doc):
        yield "the module names no source (paper, arXiv number, specification, equation)"
    for name, function, doc, class_ in room.told():
        operators = [n.op for n in ast.walk(function) if isinstance(n, ast.BinOp) and not _text(n)]
        formula = sum(isinstance(o, PRODUCTS) for o in operators) >= FORMULA and function.name != "__init__"
        named = re.search(rf"\b{function.name}\b", room.doc)
        known = f"{ast.get_docstring(class_) if class_ else ''}\n{doc}"
        if formula and not named and not SOURCE.search(known):
            yield f"{name} is a formula and names no source"


def _text(operation: ast.BinOp) -> bool:
    """A path, or text repeated."""
    sides = (operation.left, operation.right)
    return any(isinstance(s, ast.JoinedStr) or isinstance(getattr(s, "value", None), str) for s in sides)


def without_example(room: Room) -> Iterator[str]:
    """What `SHOWN` lists and has no example, and examples that would not be run."""
    nodes = {n.name: n for n in room.tree.body if isinstance(n, Function | ast.ClassDef)}
    for name in SHOWN.get(room.name, []):
        if name not in nodes:
            yield f"{name} is listed in SHOWN and is not there"
        elif ">>> " not in (ast.get_docstring(nodes[name]) or ""):
            yield f"{name} has no example"
    docs = [ast.get_docstring(n) or "" for n in ast.walk(room.tree) if isinstance(n, Function | ast.ClassDef)]
    if any("+SKIP" in doc for doc in [room.doc, *docs]):
        yield "an example is skipped"


RULES = (undocumented, unnamed_errors, unshaped, without_unit, without_source, without_example)


def problems(room: Room) -> list[str]:
    """What all rules miss in a room."""
    return [problem for rule in RULES for problem in rule(room)]


def documented_methods() -> dict[str, dict[str, str]]:
    """The docstrings of all classes' methods by the name of the class."""
    found: dict[str, dict[str, str]] = {}
    for path in ROOMS.values():
        for class_ in (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.ClassDef)):
            methods = (m for m in class_.body if isinstance(m, Function))
            found.setdefault(class_.name, {}).update({m.name: ast.get_docstring(m) or "" for m in methods})
    return found


def checkers() -> dict[str, list[Function]]:
    """The package's functions that check what they are given."""
    found: dict[str, list[Function]] = {}
    for path in ROOMS.values():
        for function in ast.parse(path.read_text("utf-8")).body:
            if isinstance(function, Function) and CHECKS.match(function.name):
                found.setdefault(function.name, []).append(function)
    return found


INHERITED, CHECKERS = documented_methods(), checkers()


@pytest.mark.parametrize("name", ROOMS)
def test_docstrings(name):
    missed = problems(Room(name, ROOMS[name].read_text("utf-8"), INHERITED))
    assert not missed, f"{name}:\n  " + "\n  ".join(missed)


def test_every_room_listed_exists():
    assert set(SHOWN) <= set(ROOMS)
    for prefix in SOURCED:
        assert any(f"{name}_".startswith(f"{prefix}_") for name in ROOMS), prefix


# ---- examples


@pytest.fixture(scope="module")
def imported():
    """What takes seconds to import, so that no example pays for it."""
    names = ("matplotlib.pyplot", "peft", "timm", "torch._dynamo", "torchvision")
    return [importlib.import_module(name) for name in names]


def examples(name: str) -> list[doctest.DocTest]:
    """The examples of a room; each starts from nothing, so that a reader can copy it."""
    if ">>> " not in ROOMS[name].read_text("utf-8"):
        return []
    module = importlib.import_module("leanvit" if name == "leanvit" else f"leanvit.{name}")
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(module, globs={"__name__": "example"}) if test.examples]


@pytest.mark.parametrize("name", ROOMS)
def test_examples(name, imported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    found, written = examples(name), []
    missed = set(SHOWN.get(name, [])) - {example.name.rpartition(".")[2] for example in found}
    assert not missed, f"doctest does not find the examples of {missed}"
    for example in found:
        torch.manual_seed(0)
        start = time.thread_time()  # others may use the processor, too
        runner.run(example, out=written.append)
        took = time.thread_time() - start
        assert took < SECONDS, f"the example of {example.name} takes {took:.1f} s"
    assert runner.summarize(verbose=False).failed == 0, "".join(written)


# ---- the rules can fail

BAD = '''
"""A room of arXiv 2305.17235."""
from torch import Tensor
def quiet(): pass
def unnamed(x: int):
    """Do it."""
    if x: raise ValueError("x")
    _deeper(x)
def _deeper(x):
    raise params.ParameterError("x")
def checked(model):
    """Do it."""
    surgery.refuse_adapted(model, "checked")
def caught():
    """Do it."""
    try:
        raise KeyError("x")
    except KeyError:
        pass
def handed_on():
    """Do it."""
    try:
        raise KeyError("x")
    except KeyError:
        raise
def both(x: Tensor, y: Tensor) -> float:
    """A number of `x (B, N)`."""
def flat(x: Tensor) -> float:
    """A number of (images, labels): `(images, labels)`, `f(a, b)`."""
def step_time(timeout: float):
    """How long the model's step takes."""
def square(a, b, c):
    """The area."""
    return a * b * c / 2
class Layer(nn.Module):
    """A layer."""
    def __init__(self):
        raise TypeError("x")
    def forward(self, x: Tensor) -> Tensor:
        return x
    def size(self): return 1
def search():
    """No example."""
'''

GOOD = '''
"""A room of arXiv 2305.17235."""
from torch import Tensor
def named(x: int):
    """Do it. Raises `ValueError` for 1, `ParameterError` for 2."""
    if x: raise ValueError("x")
    _deeper(x)
def _deeper(x):
    raise params.ParameterError("x")
def loss(x: Tensor) -> Tensor:
    """The mean of `x (B, N, d)`."""
def saved_bytes(timeout_s: float):
    """What is saved."""
def square(a, b, c):
    """The area (Eq. 7)."""
    return a * b * c / 2
class Layer(nn.Module):
    """A layer on `(..., d)`. Raises `TypeError` always."""
    def __init__(self):
        raise TypeError("x")
    def forward(self, x: Tensor) -> Tensor:
        return x
def search():
    """An example.

    >>> 1 + 1
    2
    """
'''


def test_rules_find_what_is_missing():
    assert problems(Room("uvc", BAD)) == [
        "quiet has no docstring",
        "Layer.size has no docstring",
        "unnamed raises ParameterError and does not say so",
        "unnamed raises ValueError and does not say so",
        "checked raises ValueError and does not say so",
        "handed_on raises KeyError and does not say so",
        "Layer.__init__ raises TypeError and does not say so",
        "both takes the Tensor y and says nothing of it",
        "flat takes or gives a Tensor and gives no shape in backticks",
        "Layer.forward takes or gives a Tensor and gives no shape in backticks",
        "step_time: step_time is a quantity and the docstring gives no unit",
        "step_time: timeout is a quantity and the docstring gives no unit",
        "square is a formula and names no source",
        "search has no example",
    ]
    assert problems(Room("uvc", GOOD)) == []
    assert problems(Room("uvc", BAD.replace("of arXiv 2305.17235", "of work")))[-3].startswith("the module names no")
    assert problems(Room("uvc", "")) == [
        "the module has no docstring",
        "the module names no source (paper, arXiv number, specification, equation)",
        "search is listed in SHOWN and is not there",
    ]
    assert "an example is skipped" in problems(Room("x", '"""M.\n\n>>> 1  # doctest: +SKIP\n"""'))
