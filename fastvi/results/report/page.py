"""One page for a browser: numbers, findings and figures of an estimate in a single file."""

import html
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvi._html import remark_html
from fastvi._numbers import with_error
from fastvi.observables.posterior import PosteriorDraws
from fastvi.results.estimate import NO_FINDINGS, LLCEstimate
from fastvi.results.report.panels import PANELS, panel_figure
from fastvi.results.report.posterior import plot_draws, plot_influence
from fastvi.results.report.svg import inline_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches. Letters are then 7 pixels high on a phone's 360, and 13 in a column of 560.
SIZE_ON_PAGES = (5.4, 3.4)
# Losses of a data set whose influences are drawn: of more, an entry is less than a pixel, and their
# matrix takes a minute. Half leaves out sets that can be read, double takes four times as long.
MOST_SHOWN = 1000
TRACES_AND_RANKS = (
    "Walkers that agree run together, and the ranks of each are uniform: a line that stays off 1 "
    "is of a walker that has stayed somewhere."
)
INFLUENCE = (
    "Influences within {!r}, like examples side by side: blocks on the diagonal are examples that "
    "the posterior learns together."
)
PROFILE = (
    "A slope of 0 is an llc that does not depend on the localizer; hollow cells are those in which "
    "it decides."
)
DIFFERENCES = "Each estimate less the one before; hollow marks have the errors of both added."
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<h1>{heading}</h1>
<p class="lead">{lead}</p>
<nav>{contents}</nav>
{sections}
</main>
</body>
</html>
"""
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #222; --dim: #555; --grid: #e8e8e8;
  --box: #f6f6f6; --link: #00629b; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #e4e4e4; --dim: #a8a8a8;
  --grid: #3a3d42; --box: #22252a; --link: #6cb6ee; } }
body { margin: 0; color: var(--ink); background: var(--page); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: break-word; }
a { color: var(--link); }
nav a { margin-right: 16px; display: inline-block; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 32px 0 8px; border-bottom: 1px solid var(--grid); }
.lead { color: var(--dim); margin: 0 0 8px; }
.figures { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; }
.value:hover { fill: currentColor; }
figcaption { color: var(--dim); font-size: 14px; padding-left: 12px; }
table { border-collapse: collapse; font-size: 14px; }
td { padding: 2px 16px 2px 0; vertical-align: top; }
td:first-child { color: var(--dim); }
td:last-child { overflow-wrap: anywhere; }
pre { font-size: 13px; white-space: pre-wrap; background: var(--box); padding: 12px; }
.finding { background: var(--box); }
"""


def write_report(
    result: LLCEstimate,
    path: str | os.PathLike[str],
    *,
    draws: PosteriorDraws | None = None,
    profile: Any = None,
    comparison: Any = None,
) -> Path:
    """Write an estimate as one HTML file: no script, no network, figures inside.

    It is light or dark as the browser is, and points of its figures say their values.

    Args:
        result: The estimate; one that `LLCEstimate.load` read will do.
        path: The file; its folder is made if need be.
        draws: From `sample_posterior`: traces and ranks of walkers, and the influences within each
            data set of at most `MOST_SHOWN` losses.
        profile: An `LLCProfile` from `fastvi.profile`: llc over temperature and localization.
        comparison: An `LLCComparison` from `fastvi.compare`: differences with errors.

    Returns:
        The path.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    path = Path(path)
    value = result.llc_text
    sections = {
        "Findings": _findings(result),
        "Figures": _figures(
            _figure(name, panel_figure(name, result, SIZE_ON_PAGES), panel.reading)
            for name, panel in PANELS.items()
            if panel.applies(result)
        ),
        **_said("Draws of the posterior", draws, _draw_figures(draws)),
        **_said("Temperature and localization", profile, _own_figure(profile, PROFILE)),
        **_said("Differences", comparison, _own_figure(comparison, DIFFERENCES)),
        "Numbers": f"<table>{_rows(_numbers(result))}</table>",
        "Summary": f"<pre>{html.escape(result.summary())}</pre>",
        "Settings": f"<table>{_rows(_settings(result))}</table>",
    }
    # Words of an estimate are escaped: a run folder may be anybody's.
    page = PAGE.format(
        title=f"llc {value}",
        style=STYLE,
        heading=f"Local learning coefficient {value}",
        lead=html.escape(
            f"{result.provenance}. d = {result.dim:,}, n = {result.n_data:,}, nβ = "
            f"{result.nbeta:.4g}, localization = {result.localization:.4g}."
        ),
        contents="".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections),
        sections="\n".join(
            f'<h2 id="{_anchor(name)}">{name}</h2>\n{body}' for name, body in sections.items()
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _findings(result: LLCEstimate) -> str:
    if not result.health:
        return f"<p>{html.escape(NO_FINDINGS.capitalize())}.</p>"
    return "\n".join(remark_html(finding.remark) for finding in result.health)


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _figures(figures: Iterable[str]) -> str:
    return '<div class="figures">\n' + "\n".join(figures) + "\n</div>"


def _figure(name: str, figure: "Figure", reading: str) -> str:
    # Figures are inside the page: it stays whole when it is mailed or moved.
    caption = f"<figcaption>{html.escape(reading)}</figcaption>"
    return f"<figure>{inline_svg(figure, name)}{caption}</figure>"


def _said(heading: str, said: Any, figures: Iterable[str]) -> dict[str, str]:
    """Return a part of the page about what has a summary; nothing where there is none."""
    if said is None:
        return {}
    return {heading: f"{_figures(figures)}\n<pre>{html.escape(said.summary())}</pre>"}


def _draw_figures(draws: PosteriorDraws | None) -> Iterator[str]:
    if draws is None:
        return
    yield _figure("draws", plot_draws(draws), TRACES_AND_RANKS)
    for name, losses in draws.losses.items():
        if math.prod(losses.shape[2:]) <= MOST_SHOWN:
            figure = plot_influence(draws.influence(name))
            yield _figure(name, figure, INFLUENCE.format(name))


def _own_figure(said: Any, reading: str) -> Iterator[str]:
    if said is not None:
        yield _figure("figure", said.plot(), reading)


def _settings(result: LLCEstimate) -> dict[str, str]:
    return {name: str(value) for name, value in result.config.to_dict().items()}


def _numbers(result: LLCEstimate) -> dict[str, str]:
    numbers = {
        "llc": result.llc_text,
        **(_numbers_of_q(result) if result.has_fit else {}),
        "loss at w*": f"{result.init_loss:.6g} nats",
        "work": f"{result.work.total_fge:.0f} full-gradient equivalents",
        "time": f"{result.timings.total:.1f} s, of which {result.timings.compile:.1f} s compiling",
    }
    if result.has_fit:
        numbers["factorisations that took a ridge"] = str(result.work.n_cholesky_ridge)
    details = {} if result.correction is None else result.correction._asdict()
    # Of draws of q, which a walk has not.
    if not result.has_fit:
        del details["khat"]
    stage = "correction" if result.has_fit else "walk"
    return numbers | {
        f"{stage}: {name}": _text(value) for name, value in details.items() if value is not None
    }


def _numbers_of_q(result: LLCEstimate) -> dict[str, str]:
    khat, word, effective = result.importance
    return {
        "llc of q alone": with_error(result.llc_vi, result.llc_vi_sem),
        "elbo": f"{result.elbo:.4f} nats",
        "k-hat": f"{khat:.3g} ({word}); {effective:.3g} effective of "
        f"{result.log_weights.size} draws of q",
    }


def _text(value: object) -> str:
    if isinstance(value, tuple):
        said = (f"{what} {_text(was)}, bound {_text(bound)}" for what, was, bound in value)
        return "; ".join(said) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rows(values: dict[str, str]) -> str:
    return "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>"
        for name, text in values.items()
    )
