"""A profile of the digits network beside as many estimates from scratch: work and agreement.

python -m bench.profile              prints the table
python -m bench.profile --figure     also draws docs/figures/profile.png
BENCH_KEEP=1 python -m bench.profile writes a row for each cell to bench/results/profile.csv
"""

import argparse
import pathlib

import numpy as np

import fastvi
from bench.harness import as_text, record
from fastvi.demos import digits

ERROR = 0.05  # of each cell, relative
FIGURE = pathlib.Path(__file__).parents[1] / "docs" / "figures" / "profile.png"


def cold(loss_fn, params, data, nbeta, localization, key):
    """Estimate one cell from scratch."""
    return fastvi.estimate_llc(
        loss_fn,
        params,
        data,
        nbeta=nbeta,
        localization=localization,
        error=ERROR,
        method="sample",
        sampler={"start": "fit"},
        key=key,
        progress=False,
    )


def rows_of(profile, estimates):
    """Set each cell beside the estimate from scratch."""
    rows = []
    for row, column in np.ndindex(profile.llc.shape):
        other = estimates[row, column]
        sem = np.hypot(profile.llc_sem[row, column], other.llc_sem)
        rows.append(
            {
                "name": "digits",
                "nbeta": profile.nbetas[row],
                "localization": profile.localizations[column],
                "llc": profile.llc[row, column],
                "sem": profile.llc_sem[row, column],
                "fge": profile.fge[row, column],
                "cold_llc": other.llc,
                "cold_sem": other.llc_sem,
                "cold_fge": other.work.total_fge,
                "z": (profile.llc[row, column] - other.llc) / sem,
                "findings": " ".join(one.name for one in profile.health[row][column]),
                "cold_findings": " ".join(one.name for one in other.health),
            }
        )
    return rows


def main() -> None:
    """Run both, compare, and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", action="store_true")
    options = parser.parse_args()
    loss_fn, params, data = digits.target()
    nbeta = len(data[1]) / np.log(len(data[1]))
    own = cold(loss_fn, params, data, nbeta, 1.0, 0)
    profile = fastvi.profile(own, progress=False)
    print(profile.summary(), flush=True)
    if options.figure:
        profile.plot().savefig(FIGURE, dpi=110)
    estimates = {}
    for number, (row, column) in enumerate(np.ndindex(profile.llc.shape), 1):
        cell = profile.nbetas[row], profile.localizations[column]
        estimates[row, column] = cold(loss_fn, params, data, *cell, number)
    rows = rows_of(profile, estimates)
    print(as_text(rows))
    scores = np.array([row["z"] for row in rows])
    work = sum(row["cold_fge"] for row in rows)
    print(f"profile {profile.total_fge:,.0f} FGE with its estimate; from scratch {work:,.0f} FGE")
    print(f"z: root mean square {np.sqrt(np.mean(scores**2)):.2f}, worst {abs(scores).max():.2f}")
    record("profile", rows)


if __name__ == "__main__":
    main()
