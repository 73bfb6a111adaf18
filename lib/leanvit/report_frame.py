"""What every page of the site shares: the frame around its content, and one style for light, dark, phones and desks."""

import functools
import html
from collections.abc import Sequence

from pygments.formatters import HtmlFormatter

Entry = tuple[int, str, str]  # level of a heading (2 or 3), its id, its text


def document(title: str, content: str, *, root: str = "", here: str = "", contents: Sequence[Entry] = ()) -> str:
    """A whole page of plain HTML and CSS: no script, nothing loaded from elsewhere.

    `content` holds <header> and <main>; `root` leads to the site's folder ("../"); `here` is the address, from that
    folder, of the entry of the bar that this page is; `contents` become a table of contents, beside the text on wide
    screens and folded above it on narrow ones.
    """
    places = {"index.html": "leanvit", "ledger.html": "ledger", "api.html": "library"}
    marks = {here: ' aria-current="page"'}
    bar = "".join(f'<a href="{root}{link}"{marks.get(link, "")}>{name}</a>' for link, name in places.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_style()}</style></head>
<body{' class="with-contents"' if contents else ""}>
<nav class="bar" aria-label="site">{bar}</nav>
{_contents(contents)}<div class="page">
{content}
</div></body></html>
"""


@functools.cache
def _style() -> str:
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{CSS}"


def _contents(entries: Sequence[Entry]) -> str:
    if not entries:
        return ""
    lines = "".join(
        f'<li class="level{level}"><a href="#{name}">{html.escape(text)}</a></li>' for level, name, text in entries
    )
    # a <details> cannot be opened by a media query everywhere yet, so there are two and one is shown
    return f"""<nav class="contents beside" aria-label="contents"><p>Contents</p><ol>{lines}</ol></nav>
<details class="contents above"><summary>Contents</summary><ol>{lines}</ol></details>
"""


CSS = """
:root { color-scheme: light dark; --text: #1d2430; --soft: #5b6675; --page: #fbfbfa; --card: #fff; --line: #dfe3e8;
  --code: #f3f4f2; --link: #0b61a4; --match: #0072b2; --differ: #b34700; --none: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #a2acb9; --page: #14171c; --card: #1c2027;
  --line: #333a44; --code: #20252d; --link: #7db8ea; --match: #56b4e9; --differ: #f0944d; --none: #9aa3af; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; padding: 0 clamp(1rem, 4vw, 3rem) 4rem; max-width: 78rem; background: var(--page);
  color: var(--text); font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: 2px; }
p, li, dd, summary { overflow-wrap: anywhere; }
blockquote { margin: 1rem 0; padding-left: 1rem; border-left: 3px solid var(--line); color: var(--soft); }
h1, h2, h3, h4 { line-height: 1.25; margin: 2.2em 0 .6em; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); margin-top: .4em; }
img { max-width: 100%; height: auto; }
code, pre { font-family: ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace; font-size: .86rem; }
code { background: var(--code); padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere; }
pre { overflow-x: auto; margin: .8rem 0; padding: .7rem 1rem; line-height: 1.45; background: var(--code);
  border-radius: 4px; }
pre code { background: none; padding: 0; overflow-wrap: normal; }
summary { cursor: pointer; }
.also { color: var(--soft); font-size: .88rem; margin: .3em 0; }

.bar { display: flex; gap: 1.2rem; padding: .9rem 0; font-size: .92rem; }
.bar a { text-decoration: none; color: var(--soft); padding: .2rem 0; }
.bar a:first-child { font-weight: 700; color: var(--text); }
.bar a:hover, .contents a:hover { text-decoration: underline; }
.bar [aria-current] { border-bottom: 2px solid var(--link); color: var(--text); }
header { border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
header details { color: var(--soft); font-size: .9rem; }
.headline { font-size: 1.1rem; font-weight: 600; margin: .3em 0 .8em; overflow-wrap: anywhere; }
.verdicts { display: flex; flex-wrap: wrap; gap: .5rem; list-style: none; margin: 0 0 .8rem; padding: 0; }
.verdicts li { border: 1px solid var(--none); color: var(--none); border-radius: 999px; padding: 0 .7rem;
  font-size: .85rem; }
.verdicts .none { opacity: .6; }
.verdicts .matches { border-color: var(--match); color: var(--match); }
.verdicts .differs { border-color: var(--differ); color: var(--differ); }

.contents ol { list-style: none; margin: 0; padding: 0; }
.contents li { margin: .4rem 0; line-height: 1.35; } .contents .level3 { padding-left: 1rem; }
.contents a { color: var(--soft); text-decoration: none; }
.contents.above { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; margin: 0 0 1.2rem; }
.contents.above li { padding-block: .2rem; }
.contents.beside { display: none; font-size: .87rem; }
.contents.beside p { font-weight: 600; margin: 0 0 .6rem; }
.with-contents { max-width: 66rem; }
@media (min-width: 70rem) {
  .with-contents { max-width: 82rem; display: grid; grid-template-columns: 13.5rem minmax(0, 1fr); column-gap: 3rem; }
  .with-contents > .bar { grid-column: 1 / -1; }
  .contents.above { display: none; }
  .contents.beside { display: block; position: sticky; top: 1rem; align-self: start; max-height: calc(100vh - 2rem);
    overflow-y: auto; }
}

.cards { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.cards article { background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden;
  display: flex; flex-direction: column; }
.cards article > div { padding: 1rem 1.2rem 1.1rem; display: flex; flex-direction: column; flex: 1; }
.cards h3 { font-size: 1.12rem; margin: 0 0 .5rem; }
.cards h3 a:not(:hover) { text-decoration: none; }
.cards .headline { font-size: .95rem; font-weight: 400; flex: 1; }
.cards .picture { background: #fff; display: block; border-bottom: 1px solid var(--line); }
.cards .picture:empty { display: none; }
.cards .picture img { display: block; width: 100%; height: 11rem; object-fit: contain; padding: .6rem; }
.lead { font-size: 1.1rem; max-width: 46rem; }
.figures figure { margin: 0 0 2.6rem; } .figures figcaption { color: var(--soft); margin-top: .5rem; }
.references { padding-left: 1.2rem; max-width: 52rem; } .references li { margin: .4rem 0; }

dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 30rem) { dl { display: block; } dd { margin: 0 0 .4rem 1rem; } }
.input details { border-left: 3px solid var(--line); padding-left: .8rem; }
.input summary { color: var(--soft); font-size: .85rem; padding: .15rem 0; }
.input .highlight { background: none; } .input pre { margin: .3rem 0; }
.highlight .err { border: 0; color: inherit; background: none; }
.highlight pre, .text_cell_render pre { background: var(--code); }
.code_cell { margin: 1rem 0 1.4rem; }
.output_area { margin: .7rem 0; }
.output_area pre { margin: 0; padding: .2rem 0; line-height: 1.4; background: none; }
.output_stderr { color: var(--soft); }
.scroll, .formula { overflow-x: auto; margin: .8rem 0; }
.scroll { overflow-y: auto; max-height: min(85vh, 60rem); border: 1px solid var(--line); border-radius: 6px;
  width: fit-content; max-width: 100%;
  /* a shadow at the side where a wide table goes on; it scrolls away with the page's colour over it */
  --shade: color-mix(in srgb, var(--soft) 30%, transparent);
  background: linear-gradient(to right, var(--page) 40%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--page) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat scroll; }
.picture-box { overflow-x: auto; } .picture-box img { background: #fff; border-radius: 6px; }
/* a wide figure shrunk to a phone could not be read: it keeps its size, up to a point, and moves in its box */
@media (max-width: 40rem) { .picture-box img { max-width: none; width: max(100%, min(var(--natural), 38rem)); } }
@media (prefers-color-scheme: dark) { .picture-box img, .cards .picture { filter: brightness(.93); } }
table { border-collapse: collapse; width: max-content; max-width: 60rem; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
td { min-width: 3rem; } .dataframe td { text-align: right; }
.dataframe tbody th { font-weight: 400; color: var(--soft); }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
.scroll thead { position: sticky; top: 0; background: var(--page); }
.ledger td { overflow-wrap: anywhere; min-width: 4rem; } .ledger td.claim { min-width: 12rem; max-width: 17rem; }
.ledger td.comment { min-width: 12rem; max-width: 20rem; }
@media (max-width: 40rem) { .ledger td.claim { min-width: 9rem; max-width: 11rem; } }
.ledger .verdict { font-weight: 600; white-space: nowrap; }
.ledger h3 { display: inline; font-size: 1rem; } .ledger summary { margin: .8rem 0 .3rem; }
.ledger .scroll table, .ledger-summary { max-width: none; }
td.matches { color: var(--match); } td.differs { color: var(--differ); } td.not-run { color: var(--none); }
.ansi-red-fg { color: var(--differ); } .ansi-green-fg { color: #2a7f4f; } .ansi-bold { font-weight: 600; }

.rooms { display: grid; gap: .2rem 1.5rem; list-style: none; margin: 0; padding: 0; }
.rooms li { padding: .35rem 0; border-bottom: 1px solid var(--line); }
.rooms a { font-weight: 600; } .rooms span { color: var(--soft); display: block; }
.api section { margin: 2.4rem 0; } .api section section { margin: 1.4rem 0 1.4rem 1.2rem; }
.api h2, .api h3 { margin: 0 0 .5rem; font-size: 1.1rem; } .api h3 { font-size: 1rem; }
.api .signature pre { border-left: 3px solid var(--link); }
.api .kind { color: var(--soft); font-weight: 400; font-size: .85rem; }
.api > h2 { margin: 2.4rem 0 .6rem; } .api p { max-width: 52rem; }
.api .part { font-weight: 600; margin: .8rem 0 0; } .part + p { margin: .15rem 0 0; }
@media (max-width: 30rem) { .api section section { margin-left: 0; } }
@media print { .bar, .contents { display: none !important; } .scroll { max-height: none; } }
"""
