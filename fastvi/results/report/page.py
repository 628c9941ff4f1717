"""One page for a browser: numbers, findings and figures of an estimate in a single file."""

import base64
import html
import math
import os
from pathlib import Path
from typing import Any

from fastvi.observables.posterior import PosteriorDraws
from fastvi.results.estimate import NO_FINDINGS, LLCEstimate, with_error
from fastvi.results.findings import Finding
from fastvi.results.report.panels import PANELS, render
from fastvi.results.report.posterior import plot_draws, plot_influence
from fastvi.results.report.style import as_png

REPORT_DPI = 110  # a panel is then 704 pixels wide, for columns of 440 and more
SEVERITY_COLORS = {"error": "#b00020", "warning": "#a65b00", "note": "#00629b"}
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
<h2>Findings</h2>
{findings}
<h2>Figures</h2>
<div class="figures">
{figures}
</div>
{more}<h2>Numbers</h2>
<table>{numbers}</table>
<h2>Summary</h2>
<pre>{summary}</pre>
<h2>Settings</h2>
<table>{settings}</table>
</main>
</body>
</html>
"""
STYLE = """
body { margin: 0; color: #222; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 32px 0 8px; border-bottom: 1px solid #ddd; }
.lead { color: #555; margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px; }
figure { margin: 0; }
figure img { width: 100%; height: auto; }
figcaption { color: #555; font-size: 14px; padding-left: 12px; }
table { border-collapse: collapse; font-size: 14px; }
td { padding: 2px 16px 2px 0; vertical-align: top; }
td:first-child { color: #555; }
pre { font-size: 13px; overflow-x: auto; background: #f6f6f6; padding: 12px; }
.finding { margin: 8px 0; padding: 8px 12px; border-left: 4px solid; background: #f8f8f8; }
.finding b { text-transform: uppercase; font-size: 12px; letter-spacing: 0.04em; }
"""


def write_report(
    result: LLCEstimate,
    path: str | os.PathLike[str],
    *,
    draws: PosteriorDraws | None = None,
    profile: Any = None,
    comparison: Any = None,
) -> Path:
    """Write an estimate as one HTML file: no script, no network, images inside.

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
    # Words of an estimate are escaped: a run folder may be anybody's.
    page = PAGE.format(
        title=f"llc {value}",
        style=STYLE,
        heading=f"Local learning coefficient {value}",
        lead=html.escape(
            f"{result.provenance}. d = {result.dim:,}, n = {result.n_data:,}, nβ = "
            f"{result.nbeta:.4g}, localization = {result.localization:.4g}."
        ),
        findings=_findings(result),
        figures="\n".join(
            _figure(name, result) for name, panel in PANELS.items() if panel.applies(result)
        ),
        more=_section("Draws of the posterior", draws, _draw_figures(draws))
        + _section("Temperature and localization", profile, _own_figure(profile, PROFILE))
        + _section("Differences", comparison, _own_figure(comparison, DIFFERENCES)),
        numbers=_rows(_numbers(result)),
        summary=html.escape(result.summary()),
        settings=_rows({name: str(value) for name, value in result.config.to_dict().items()}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _findings(result: LLCEstimate) -> str:
    if not result.health:
        return f"<p>{html.escape(NO_FINDINGS.capitalize())}.</p>"
    return "\n".join(map(_finding, result.health))


def _finding(finding: Finding) -> str:
    color = SEVERITY_COLORS[finding.severity]
    name, said, cause, fix = map(
        html.escape, (finding.name, finding.observed, finding.cause, finding.next_step)
    )
    return (
        f'<div class="finding" style="border-color: {color}"><b style="color: '
        f'{color}">{finding.severity} · '
        f"{name}</b><br>{said} {cause}<br><i>{fix}</i></div>"
    )


def _figure(name: str, result: LLCEstimate) -> str:
    return _image(name, render(name, result, REPORT_DPI), PANELS[name].reading)


def _image(name: str, png: bytes, reading: str) -> str:
    # Images are inside the page: it stays whole when it is mailed or moved.
    encoded = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{html.escape(name)}" src="data:image/png;base64,{encoded}">'
    return f"<figure>{image}<figcaption>{html.escape(reading)}</figcaption></figure>"


def _section(heading: str, said: Any, figures: str) -> str:
    """Return a part of the page about what has a summary; nothing where there is none."""
    if said is None:
        return ""
    summary = html.escape(said.summary())
    return f'<h2>{heading}</h2>\n<div class="figures">\n{figures}\n</div>\n<pre>{summary}</pre>\n'


def _draw_figures(draws: PosteriorDraws | None) -> str:
    if draws is None:
        return ""
    figures = [_image("draws", as_png(plot_draws(draws), REPORT_DPI), TRACES_AND_RANKS)]
    for name, losses in draws.losses.items():
        if math.prod(losses.shape[2:]) <= MOST_SHOWN:
            figure = plot_influence(draws.influence(name))
            figures.append(_image(name, as_png(figure, REPORT_DPI), INFLUENCE.format(name)))
    return "\n".join(figures)


def _own_figure(said: Any, reading: str) -> str:
    return "" if said is None else _image("figure", as_png(said.plot(), REPORT_DPI), reading)


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
