"""The site: self-contained pages, resolving links, the best tier first, nothing that needs a script or a network."""

import base64
import json
import os
import re
import textwrap
from pathlib import Path

import bs4
import nbformat
import pytest

from leanvit import record, report, report_api, report_notebook

PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
        "1f15c4890000000d49444154789c6360f8cf500f00048501808b5a2d370000000049454e44ae426082"
    )
).decode()
TEXT = """# LBP-WHT: a *few* bases

Cost $\\frac{R}{64}$ of it.

## The mathematics

$$g_x = W^\\top g_y$$

\\begin{align} a &= b \\\\ c &= d \\end{align}

$\\unknowncommand{x}$

| a | b |
|---|---|
| 1 | 2 |

<script src="https://cdn.example.org/x.js"></script>
<link rel="stylesheet" href="https://cdn.example.org/x.css">
<style>@import "https://cdn.example.org/y.css";</style>

![far away](https://cdn.example.org/x.png)
[the paper](https://arxiv.org/abs/2309.15275)
"""


@pytest.fixture(autouse=True)
def few_rooms(monkeypatch):
    """The reference of three rooms is enough here; tests/test_site.py renders all."""
    few = [room for room in ROOMS if room.name in ("comcat", "comcat_plan", "pareto")]
    monkeypatch.setattr(report_api, "rooms", lambda: few)


READ = report_api.rooms
ROOMS = READ()
ROOT = Path(__file__).resolve().parents[1]


def put(
    root, tier, run, *, notebook=None, source="# Accuracy over FLOPs\nfig", verdicts=("matches", "differs", "not run")
):
    """A result and its executed notebook, as the runner leaves them."""
    table = "<table border='1' class='dataframe'><tr><td>1</td></tr></table>"
    outputs = [
        nbformat.v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"}),
        nbformat.v4.new_output("execute_result", {"text/html": table, "text/plain": "1"}, execution_count=1),
        nbformat.v4.new_output("display_data", {"text/latex": "$x^2$", "text/plain": "x**2"}),
        nbformat.v4.new_output("stream", name="stdout", text="\x1b[31mred\x1b[0m <b>"),
    ]
    cells = [nbformat.v4.new_markdown_cell(TEXT), nbformat.v4.new_code_cell(source, outputs=outputs, execution_count=1)]
    result = {field: {} for field in record.FIELDS} | {
        "notebook": notebook or run,
        "run": run,
        "tier": tier,
        "params_file": f"params/{run}/{tier}.yaml",
        "headline": f"{tier}: 91.2 % & more",
        "parameters": {"lr": 1e-3},
        "verdicts": [{"verdict": verdict} for verdict in verdicts],
        "key": "k",
        "checkout": "c",
        "hashes": {"notebook": "n"},
        "versions": {"python": "3.12", "torch": "2", "timm": "1"},
        "hardware": {"cpu": "Processor", "threads": 2, "gpus": []},
        "commit": {"hash": "0123456789abcdef", "dirty": False},
        "seconds": 300.0,
    }
    folder = root / "outputs" / tier
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{run}.ipynb")
    (folder / f"{run}.json").write_text(json.dumps(result))


@pytest.fixture
def site(tmp_path):
    """A site of two notebooks, one of them in three tiers."""
    put(tmp_path, "smoke", "1_lbp_wht")
    put(tmp_path, "embedded", "1_lbp_wht.again", notebook="1_lbp_wht")  # sorts in front of the main run
    put(tmp_path, "embedded", "1_lbp_wht")
    put(tmp_path, "paper", "1_lbp_wht.efl1_cifar100", notebook="1_lbp_wht")
    put(tmp_path, "smoke", "2_comcat", source="fig", verdicts=())
    (tmp_path / "outputs" / "smoke" / "3_broken.json").write_text('{"notebook": "3_broken"}')
    index = report.build(tmp_path)
    assert index == tmp_path / "outputs" / "site" / "index.html"
    return index.parent


def soups(site):
    """Every page, parsed."""
    return {path: bs4.BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site):
    assert len(soups(site)) == 11  # five results, index, ledger, the reference with its three rooms
    for path, soup in soups(site).items():
        assert not soup.find_all(["script", "link", "iframe"]), path
        assert all(image["src"].startswith("data:") for image in soup.find_all("img"))
        assert not re.search(r"@import|url\(", "".join(style.text for style in soup.find_all("style")))
        assert not re.search(r"(src|srcset|data)=[\"']?(https?:)?//", path.read_text(encoding="utf-8"))


def test_links_resolve(site):
    for path, soup in soups(site).items():
        for link in soup.find_all("a"):
            target = link["href"].partition("#")[0]
            known = target.startswith("https://arxiv.org") or path.parent.name == "api"  # test_site.py has all rooms
            assert known or (path.parent / target).resolve().exists(), (path, target)


def test_one_card_a_notebook_with_its_best_tier(site):
    cards = soups(site)[site / "index.html"].find_all("article")
    assert [card.h3.a["href"] for card in cards] == ["embedded/1_lbp_wht.html", "smoke/2_comcat.html"]
    assert cards[0].h3.text == "LBP-WHT: a few bases"
    assert [link["href"] for link in cards[0].select(".also a")] == [
        "embedded/1_lbp_wht.again.html",
        "paper/1_lbp_wht.efl1_cifar100.html",
        "smoke/1_lbp_wht.html",
    ]
    assert [item.text for item in cards[0].select(".verdicts li")] == ["1 match", "1 differ", "1 not run"]
    assert not cards[1].select(".verdicts")
    assert cards[0].select_one(".headline").text == "embedded: 91.2 % & more"
    assert "embedded tier, 5 min" in cards[0].text
    assert cards[0].img["alt"] == "Accuracy over FLOPs"


def test_a_page_shows_its_notebook_and_how_it_was_made(site):
    soup = soups(site)[site / "embedded" / "1_lbp_wht.html"]
    assert len(soup.find_all("math")) == 4  # inline, display, align, the LaTeX output
    assert soup.find("code", string="\\unknowncommand{x}")  # what the converter does not know stays readable
    tables = soup.find_all("table")
    assert len(tables) == 2 and all("scroll" in table.parent["class"] for table in tables)
    assert "red <b>" in soup.select_one(".output_stdout").text
    assert "[image: far away]" in soup.text
    assert "leanvit run params/1_lbp_wht/embedded.yaml" in soup.header.details.text
    assert (
        soup.find("meta", attrs={"name": "viewport"})
        and soup.html["lang"] == "en"
        and soup.title.text.startswith("LBP")
    )


def tagged(root, *tags, alt=None):
    """smoke/1_x with a second figure whose cell has these tags; the path of the notebook."""
    put(root, "smoke", "1_x", verdicts=())
    path = root / "outputs" / "smoke" / "1_x.ipynb"
    notebook = nbformat.read(path, 4)
    chosen = nbformat.v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    metadata = {"tags": list(tags)} | ({"alt": alt} if alt else {})
    notebook.cells.append(nbformat.v4.new_code_cell("# The one", outputs=[chosen], metadata=metadata))
    nbformat.write(notebook, path)
    return path


def test_a_notebook_can_choose_the_figure_of_its_card(tmp_path):
    tagged(tmp_path, "card")
    assert soups(report.build(tmp_path).parent)[tmp_path / "outputs/site/index.html"].img["alt"] == "The one"


def test_figures_that_matter_stand_large_on_the_index(tmp_path, site):
    tagged(tmp_path, "front", alt='Up is "better"')
    soup = soups(report.build(tmp_path).parent)[tmp_path / "outputs/site/index.html"]
    (figure,) = soup.find_all("figure")
    assert figure.img["alt"] == 'Up is "better"' and figure.a["href"] == "smoke/1_x.html"
    assert figure.figcaption.text.startswith('Up is "better"') and figure.img["width"] == "1"


def test_the_index_says_what_this_is_and_leads_on(site):
    soup = soups(site)[site / "index.html"]
    assert len(re.split(r"\.\s", soup.select_one(".lead").text)) == 3
    assert {"ledger.html", "api.html"} <= {link["href"] for link in soup.select("header a")}
    assert not soup.find("figure") and not soup.find(id="cite")  # nothing chosen, no CITATION.cff in this root


def test_how_to_cite_comes_from_the_citation_file():
    soup = bs4.BeautifulSoup(report.citation(ROOT), "html.parser")
    assert soup.pre.text.startswith("@software{leanvit,\n  title = {{leanvit")
    assert [link["href"] for link in soup.find_all("a")] == [
        f"https://arxiv.org/abs/{number}"
        for number in ("2309.15275", "2305.17235", "2203.16329", "2404.17245", "2203.08243")
    ]


def test_the_headline_of_a_card_leaves_the_verdicts_to_their_numbers(tmp_path):
    put(tmp_path, "smoke", "1_x")
    (page,) = report.find_pages(tmp_path)
    page.result["headline"] = "57 % at 3 MFLOPs; 2 of 3 published numbers match, 1 differs, 0 not run"
    assert page.headline == "57 % at 3 MFLOPs"


def test_code_is_folded_and_outputs_are_not(site):
    soup = soups(site)[site / "embedded" / "1_lbp_wht.html"]
    (folded,) = soup.select(".code_cell details")
    assert folded.summary.text == "Accuracy over FLOPs · 2 lines" and "fig" in folded.pre.text
    assert not folded.has_attr("open") and not folded.find("img") and soup.select(".code_cell img")


def test_contents_are_the_headings(site):
    soup = soups(site)[site / "embedded" / "1_lbp_wht.html"]
    for contents in soup.select(".contents"):
        assert [(link["href"], link.text) for link in contents.find_all("a")] == [
            ("#the-mathematics", "The mathematics")
        ]
    assert soup.find(id="the-mathematics").name == "h2"
    assert [heading.text for heading in soup.find_all("h1")] == ["LBP-WHT: a few bases"]


def test_figures_keep_the_size_they_were_drawn_for():
    assert report_notebook.picture(f"data:image/png;base64,{PIXEL}", "a").img["width"] == "1"
    sharp = report_notebook.picture(f"data:image/png;base64,{PIXEL}", "a", "7").img
    assert (sharp["width"], sharp["height"]) == ("7", "7")
    assert not report_notebook.picture("data:image/svg+xml;base64,AAAA", "a").img.has_attr("width")


def test_a_page_is_rendered_again_only_when_something_changed(tmp_path):
    path = tagged(tmp_path)
    page = report.build(tmp_path).parent / "smoke" / "1_x.html"
    page.write_text("as it was")
    now = path.stat().st_mtime
    os.utime(page, (now + 1000, now + 1000))
    report.build(tmp_path)
    assert page.read_text() == "as it was"
    os.utime(path, (now + 2000, now + 2000))
    report.build(tmp_path)
    assert "The one" in page.read_text(encoding="utf-8")


def test_alternative_texts(site):
    assert soups(site)[site / "smoke" / "2_comcat.html"].img["alt"] == "Figure: The mathematics"


def test_a_damaged_result_costs_its_own_page_alone(tmp_path, site):
    before = len(report.find_pages(tmp_path))
    (tmp_path / "outputs" / "smoke" / "9_damaged.json").write_text('{"notebook": ')
    (tmp_path / "outputs" / "smoke" / "9_damaged.ipynb").write_text("{}")
    assert len(report.find_pages(tmp_path)) == before > 0


def test_examples_of_a_session_are_coloured_as_such():
    shown = report_api._code(">>> pe(0.5, 100)\n0.49")
    assert '<span class="gp">&gt;&gt;&gt; </span>' in shown and '<span class="go">0.49</span>' in shown


def test_pages_of_results_that_are_gone_are_removed(site):
    root = site.parents[1]
    (root / "outputs" / "smoke" / "2_comcat.json").unlink()
    report.build(root)
    assert not (site / "smoke" / "2_comcat.html").exists()
    assert "2_comcat" not in (site / "index.html").read_text(encoding="utf-8")


def test_without_results_the_index_says_what_to_do(tmp_path):
    assert "make reproduce" in report.build(tmp_path).read_text(encoding="utf-8")


# ---- the reference

SOURCE = """
    from leanvit.other import Shared, hidden
    __all__ = ["Shared", "f", "Box"]

    def f(model, /, x: int, *rest: float, rate: float = 1e-3, name="a < b", **more) -> dict[str, int]:
        \"\"\"What it does, by `f(x)`, arXiv 2309.15275.

        * one
          goes on
        * two

            y = W^T x

        Args:
            x: how many,
                at most 3.
            rate, name: the rest.

        Returns:
            A number.

        >>> 1 + 1
        2
        \"\"\"

    def _private(): ...

    @dataclass(frozen=True)
    class Box:
        \"\"\"A box.\"\"\"

        width: int  # cm
        depth: int = 2

        @property
        def area(self) -> int:
            \"\"\"In cm².\"\"\"

        @classmethod
        def make(cls, a_long_argument: list[int] | None = None, another_long_argument: str = "something") -> "Box":
            \"\"\"Makes one.\"\"\"
"""


@pytest.fixture
def reference(tmp_path):
    """The pages of a small package, parsed."""
    (tmp_path / "one.py").write_text(textwrap.dedent(SOURCE), encoding="utf-8")
    (tmp_path / "other.py").write_text('"""Another."""\nclass Shared:\n    """Used by two."""\n', encoding="utf-8")
    (tmp_path / "_hidden.py").write_text("")
    pages = report_api.pages(READ(tmp_path))
    return {link: bs4.BeautifulSoup(page, "html.parser") for link, page in pages.items()}


def test_the_reference_has_what_is_public(reference):
    assert set(reference) == {"api.html", "api/one.html", "api/other.html"}
    page = reference["api/one.html"]
    assert [section["id"] for section in page.find_all("section")] == ["f", "Box", "Box.area", "Box.make"]
    assert "_private" not in page.text
    shared = page.find("a", string="Shared")
    assert shared["href"] == "other.html#Shared" and "Used by two." in shared.parent.text
    assert not page.find("a", string="hidden")


def test_the_reference_writes_signatures_as_the_source_does(reference):
    page = reference["api/one.html"]
    assert page.find(id="f").pre.text.splitlines() == [
        "f(",
        "    model,",
        "    /,",
        "    x: int,",
        "    *rest: float,",
        "    rate: float = 1e-3,",
        '    name="a < b",',
        "    **more,",
        ") -> dict[str, int]",
    ]
    assert page.find(id="Box").pre.text.splitlines() == ["class Box:", "    width: int  # cm", "    depth: int = 2"]
    made = page.find(id="Box.make").pre.text
    assert made.startswith("@classmethod\nmake(\n    a_long_argument: list[int] | None = None,") and "cls" not in made
    assert not page.find(id="Box.area").pre and "In cm²." in page.find(id="Box.area").text


def test_the_reference_reads_docstrings(reference):
    section = reference["api/one.html"].find(id="f")
    assert [item.text for item in section.find_all("li")] == ["one goes on", "two"]
    assert section.p.code.text == "f(x)" and section.p.a["href"] == "https://arxiv.org/abs/2309.15275"
    assert [pre.text.strip() for pre in section.find_all("pre")[1:]] == ["y = W^T x", ">>> 1 + 1\n2"]
    pairs = zip(section.find_all("dt"), section.find_all("dd"), strict=True)
    assert [(dt.text, dd.text) for dt, dd in pairs] == [("x", "how many, at most 3."), ("rate, name", "the rest.")]
    assert [part.text for part in section.select(".part")] == ["Args:", "Returns:"]
    assert section.select(".part")[1].find_next("p").text == "A number."


def test_the_reference_groups_rooms(site):
    soup = soups(site)[site / "api.html"]
    assert [heading.text for heading in soup.find_all("h2")] == ["The methods", "The ground under them"]
    assert [link.text for link in soup.select(".rooms a")] == [
        "leanvit.comcat",
        "leanvit.comcat_plan",
        "leanvit.pareto",
    ]
    assert all(len(page) > 500 for page in report_api.pages(ROOMS[:3]).values())
