"""A page of HTML out of parts that are escaped where they are put together: no template, nothing to load."""

import re
from collections.abc import Iterable, Sequence
from html import escape

PALETTE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5c6670; --line: #d5dade; --paper: #ffffff; --card: #f5f7f8;
  --mark: #0072b2; --other: #c04a00; --faint: #8fa3b3;
  --c0: #c74ffd; --c1: #12a166; --c2: #e137ac; --c3: #0000fa; --c4: #2c020f; --c5: #1b0957; --c6: #968f00;
  --c7: #781c03; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb6; --line: #3a424a; --paper: #14181c;
  --card: #1d2328; --mark: #56b4e9; --other: #f0a030; --faint: #6d8699;
  --c0: #c83d27; --c1: #6a4dff; --c2: #9c5c82; --c3: #3aff8c; --c4: #9cccea; --c5: #f9ce13; --c6: #ffffee;
  --c7: #b58aff; } }
"""
# the lines of charts are after Okabe and Ito (2008): blue and vermillion or orange, with ink and grey
# of what is painted in charts: files of pictures take it, too
LOOKS = """
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); } .label { fill: var(--soft); }
.title { font-size: 12px; font-weight: bold; } .heading { font-size: 15px; font-weight: bold; }
.axis { stroke: var(--line); stroke-width: 1; fill: none; } .frame { stroke: var(--line); stroke-width: 1; fill: none; }
.grid { stroke: var(--line); stroke-width: 1; fill: none; stroke-dasharray: 2 3; }
.line { stroke: var(--mark); stroke-width: 1.5; fill: none; } .many { stroke-width: 1; } .last { opacity: .3; }
.front { stroke: var(--other); stroke-width: 1.5; fill: none; stroke-dasharray: 5 4; }
.limit { stroke: var(--other); stroke-width: 1.2; fill: none; stroke-dasharray: 4 3; }
.range { stroke: var(--mark); stroke-width: 1.5; fill: none; opacity: .45; }
.leader { stroke: var(--soft); stroke-width: .8; fill: none; } svg .name { font-size: 12px; }
.bar { fill: var(--mark); } .dense { fill: var(--faint); }
.gone { stroke: var(--other); stroke-width: 1.6; fill: none; }
.close { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 3 2; }
.round { stroke-width: 9; stroke-linecap: round; } .square { stroke-width: 9; stroke-linecap: square; fill: none; }
.cross { stroke-width: 4; stroke-linecap: round; fill: none; } .filled { stroke-width: 0; }
.dot { stroke: var(--mark); } .base { stroke: var(--ink); } .plan { stroke: var(--other); } .small { stroke-width: 5; }
.energy { stroke: var(--ink); } .raw { stroke: var(--mark); stroke-width: 2.5; opacity: .45; }
"""
LOOKS += "".join(f".c{at} {{ fill: var(--c{at}); stroke: var(--c{at}); }} " for at in range(8)) + "\n"
STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p, figcaption, li { max-width: 46rem; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
a { color: var(--mark); } nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; } thead th { background: var(--card); white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.name, th.name { overflow-wrap: anywhere; min-width: 8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .7rem; background: var(--card); border-radius: 6px; break-inside: avoid; }
svg { display: block; width: 100%; max-width: 30rem; height: auto; }
.whole { white-space: nowrap; } .lead code { font: inherit; font-weight: 600; }
.lead { font-size: 1.15rem; line-height: 1.45; margin: .4rem 0 1rem; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: 1rem;
  margin: 0; }
.figures > div { background: var(--card); border-radius: 6px; padding: .8rem 1rem; border-top: 3px solid var(--mark); }
.figures dt { font-size: .9rem; } .figures dd { font-size: 1.75rem; line-height: 1.2; font-weight: 600;
  font-variant-numeric: tabular-nums; } .figures dd + dd { font-size: .9rem; line-height: 1.45; font-weight: 400;
  color: var(--soft); margin-top: .3rem; }
.figures .missing { color: var(--soft); font-weight: 400; }
.switch > input { position: absolute; opacity: 0; pointer-events: none; } .switch > figure { display: none; }
.switch svg { max-width: none; } .switch .narrow { display: none; } svg .name { paint-order: stroke;
  stroke: var(--card); stroke-width: 3px; stroke-linejoin: round; }
.tabs { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem; margin: .2rem 0 .7rem; }
.tabs span { color: var(--soft); font-size: .9rem; } .tabs label { border: 1px solid var(--line); border-radius: 6px;
  padding: .4rem .8rem; font-size: .9rem; cursor: pointer; }
CHOSEN
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 11rem), 1fr)); gap: .8rem; }
.maps figure { padding: .5rem; } .maps figure.gone { outline: 1.5px dashed var(--other); }
.maps figcaption { overflow-wrap: anywhere; }
.map path { opacity: .85; }
.keys { display: flex; flex-wrap: wrap; gap: .1rem 1rem; list-style: none; padding: 0; font-size: .9rem; }
.keys li { display: flex; align-items: center; gap: .3rem; overflow-wrap: anywhere; }
.keys svg { width: 1rem; flex: none; }
pre { background: var(--card); padding: .7rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; } pre, code { font: .85rem/1.45 ui-monospace, monospace; } code { overflow-wrap: anywhere; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--mark); padding: .2rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; } .warning { border-left: 3px solid var(--other); padding-left: .7rem; }
@media (max-width: 60rem) { .switch .narrow { display: block; } .switch .wide { display: none; }
  .switch svg { max-width: 34rem; } }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  thead { position: absolute; clip-path: inset(50%); } table, tbody, tr, th, td { display: block; }
  tbody tr { padding: .5rem .7rem; border-bottom: 1px solid var(--line); } tbody tr:last-child { border-bottom: 0; }
  tbody tr > * { border: 0; padding: .1rem 0; }
  td.number, td.name { display: flex; gap: 1rem; justify-content: space-between; text-align: right; }
  td.number { white-space: normal; } td.number:empty, td.name:empty { display: none; }
  td::before { content: attr(data-label); color: var(--soft); text-align: left; white-space: nowrap; } }
@media print { .switch > figure { display: block; margin-bottom: .8rem; } .tabs { display: none; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; } figure, pre, tr { break-inside: avoid; } }
"""
CHOSEN = "\n".join(
    f".switch > input:nth-of-type({at}):checked ~ figure:nth-of-type({at}) {{ display: block; }}\n"
    f".switch > input:nth-of-type({at}):checked ~ .tabs label:nth-of-type({at}) {{ background: var(--mark); "
    "color: var(--paper); border-color: var(--mark); }\n"
    f".switch > input:nth-of-type({at}):focus-visible ~ .tabs label:nth-of-type({at}) {{ outline: 2px solid "
    "var(--other); outline-offset: 2px; }"
    for at in range(1, 5)
)
STYLE = PALETTE + LOOKS + STYLE.replace("CHOSEN", CHOSEN)
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""


VOID = ("input",)


class Html(str):
    """Text that is markup already; any other text is escaped where it is put into a page."""


def tag(element: str, *inside: object, **attributes: object) -> Html:
    """Return an element; ``class_`` is ``class``, ``aria_label`` is ``aria-label``, None leaves an attribute out.

    One of `VOID` has no end.
    """
    words = [element]
    for name, value in attributes.items():
        if value is not None:
            words.append(f'{name.rstrip("_").replace("_", "-")}="{escape(str(value))}"')
    return Html(f"<{' '.join(words)}>" + ("" if element in VOID else f"{joined(inside)}</{element}>"))


def joined(parts: Iterable[object]) -> Html:
    """Return parts one after the other; what is no markup is escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts if part is not None))


def prose(text: str) -> Html:
    """Return a sentence with what stands between backticks as code."""
    return joined(tag("code", part) if at % 2 else unbroken(part) for at, part in enumerate(text.split("`")))


def unbroken(text: str) -> Html:
    """Return a text in which no interval in brackets is broken between two lines."""
    parts = re.split(r"(\[[^\[\]]{1,30}\])", text)
    return joined(tag("span", part, class_="whole") if at % 2 else part for at, part in enumerate(parts))


def details(summary: str, *inside: object) -> Html:
    """Return what is shown on request."""
    return tag("details", tag("summary", summary), *inside)


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, names: int = 1) -> Html:
    """Return a table that scrolls sideways where it is too wide; ``names`` columns from the left hold no figures."""
    kinds = ["name" if at < names else "number" for at in range(len(columns))]
    heads = (tag("th", text, role="columnheader", class_=kind) for text, kind in zip(columns, kinds, strict=True))
    body = []
    for row in rows:
        cells = [tag("th", row[0], role="rowheader", class_="name")]
        for text, kind, cell in list(zip(columns, kinds, row, strict=True))[1:]:
            inside = tag("span", unbroken(str(cell))) if cell != "" else None
            cells.append(tag("td", inside, role="cell", class_=kind, data_label=text))
        body.append(tag("tr", *cells, role="row"))
    parts = (tag("thead", tag("tr", *heads, role="row"), role="rowgroup"), tag("tbody", *body, role="rowgroup"))
    whole = tag("table", *parts, role="table", aria_label=caption)  # roles: as blocks, on a phone, they would lose them
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Return names with what they are."""
    return tag("dl", *(joined([tag("dt", name), tag("dd", value)]) for name, value in pairs if value not in (None, "")))


def document(title: str, *inside: object) -> str:
    """Return the whole page."""
    return f"{HEAD}{tag('title', title)}\n{tag('style', Html(STYLE))}\n</head>\n{tag('body', *inside)}\n</html>\n"
