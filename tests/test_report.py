"""The site: self-contained pages, resolving links, the best tier first, nothing that needs a script or a network."""

import base64
import json
import re

import bs4
import nbformat
import pytest

from leanvit import record, report

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
    assert len(soups(site)) == 6
    for path, soup in soups(site).items():
        assert not soup.find_all(["script", "link", "iframe"]), path
        assert all(image["src"].startswith("data:") for image in soup.find_all("img"))
        assert not re.search(r"@import|url\(", "".join(style.text for style in soup.find_all("style")))
        assert not re.search(r"(src|srcset|data)=[\"']?(https?:)?//", path.read_text(encoding="utf-8"))


def test_links_resolve(site):
    for path, soup in soups(site).items():
        for link in soup.find_all("a"):
            target = link["href"]
            assert target.startswith("https://arxiv.org") or (path.parent / target).resolve().is_file(), (path, target)


def test_one_card_a_notebook_with_its_best_tier(site):
    cards = soups(site)[site / "index.html"].find_all("article")
    assert [card.h2.a["href"] for card in cards] == ["embedded/1_lbp_wht.html", "smoke/2_comcat.html"]
    assert cards[0].h2.text == "LBP-WHT: a few bases"
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
    assert "leanvit run params/1_lbp_wht/embedded.yaml" in soup.find("details").text
    assert (
        soup.find("meta", attrs={"name": "viewport"})
        and soup.html["lang"] == "en"
        and soup.title.text.startswith("LBP")
    )


def test_a_notebook_can_choose_the_figure_of_its_card(tmp_path):
    put(tmp_path, "smoke", "1_x")
    path = tmp_path / "outputs" / "smoke" / "1_x.ipynb"
    notebook = nbformat.read(path, 4)
    chosen = nbformat.v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    notebook.cells.append(nbformat.v4.new_code_cell("# The one", outputs=[chosen], metadata={"tags": ["card"]}))
    nbformat.write(notebook, path)
    assert soups(report.build(tmp_path).parent)[tmp_path / "outputs/site/index.html"].img["alt"] == "The one"


def test_alternative_texts(site):
    assert soups(site)[site / "smoke" / "2_comcat.html"].img["alt"] == "Figure: The mathematics"


def test_pages_of_results_that_are_gone_are_removed(site):
    root = site.parents[1]
    (root / "outputs" / "smoke" / "2_comcat.json").unlink()
    report.build(root)
    assert not (site / "smoke" / "2_comcat.html").exists()
    assert "2_comcat" not in (site / "index.html").read_text(encoding="utf-8")


def test_without_results_the_index_says_what_to_do(tmp_path):
    assert "make reproduce" in report.build(tmp_path).read_text(encoding="utf-8")
