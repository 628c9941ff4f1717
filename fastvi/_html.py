"""How results look in a notebook: HTML without a script, in the colours that are there."""

import html
from collections.abc import Iterable
from typing import NamedTuple


class Remark(NamedTuple):
    """A box beside the numbers: how grave it is, its name, what it says, and what to do."""

    severity: str
    name: str
    said: str
    advice: str


# Both can be read on white and on black, with a contrast above 4.
SEVERITY_COLORS = {"error": "#e0344b", "warning": "#b8720a", "note": "#2a84c6"}
BOX = "margin:6px 0;padding:6px 10px;border-left:4px solid {color}"
HEADING = "font-size:1.15em;font-weight:600;margin:4px 0"
# 80 columns fit; what is narrower scrolls.
PLAIN = "overflow-x:auto;line-height:1.35;margin:6px 0"


def remark_html(remark: Remark) -> str:
    """Return a box; its words are escaped, as a run folder may be anybody's."""
    severity, name, said, advice = map(html.escape, remark)
    color = SEVERITY_COLORS[remark.severity]
    return (
        f'<div class="finding" style="{BOX.format(color=color)}"><b style="color:{color}">'
        f"{severity} · {name}</b><br>{said}<br><i>{advice}</i></div>"
    )


def result_html(
    summary: str,
    heading: str = "",
    lead: str = "",
    remarks: Iterable[Remark] = (),
    figure: str = "",
) -> str:
    """Return a result for a notebook.

    Args:
        summary: Its words, folded away where a heading stands for them.
        heading: The number that a person looks for.
        lead: What it is of.
        remarks: What a reader should know of it.
        figure: SVG or HTML, taken as it is.
    """
    words = f'<pre style="{PLAIN}">{html.escape(summary)}</pre>'
    if not heading:
        return f"<div>{figure}{words}</div>"
    boxes = "".join(map(remark_html, remarks))
    return (
        f'<div><div style="{HEADING}">{html.escape(heading)}</div>'
        f"<div>{html.escape(lead)}</div>{boxes}{figure}"
        f"<details><summary>all of it</summary>{words}</details></div>"
    )
