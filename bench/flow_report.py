"""Tables of the flows: speed and nats beside FlowJAX, and the flow family beside known answers."""

import csv

from bench.harness import RESULTS
from bench.tables import number, tabulate


def latest(table, *keys):
    """Return the last row for each value of the keys, in the order in which these first came."""
    path = RESULTS / f"{table}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list({tuple(row[key] for key in keys): row for row in csv.DictReader(file)}.values())


def speed():
    """Milliseconds and seconds of compilation beside FlowJAX."""
    rows = {
        (row["dim"], row["operation"], row["method"]): row
        for row in latest("flows", "dim", "operation", "method")
    }
    lines = []
    for (dim, operation, method), peer in rows.items():
        if method == "fastvi":
            continue
        # the peer's ratios are those to the fastvi of its own run
        own = float(peer["ms"]) / float(peer["speed_of_fastvi"])
        compile_s = float(peer["compile_s"]) * float(peer["compile_of_fastvi"])
        cells = (
            own,
            peer["ms"],
            peer["speed_of_fastvi"],
            compile_s,
            peer["compile_s"],
            peer["compile_of_fastvi"],
        )
        lines.append([method, dim, f"`{operation}`", *map(number, cells)])
    header = [
        "peer",
        "dim",
        "operation",
        "fastvi ms",
        "peer ms",
        "times as fast",
        "compile s",
        "peer s",
        "ratio",
    ]
    return tabulate(header, lines)


def density():
    """Held-out nats."""
    rows = latest("flow_density", "data", "method")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {
        (row["data"], row["method"]): f"{float(row['nats']):.3f} ± {float(row['nats_se']):.3f}"
        for row in rows
    }
    data = dict.fromkeys(row["data"] for row in rows)
    return tabulate(
        ["", *methods],
        [[name, *(found.get((name, method), "") for method in methods)] for name in data],
    )


def bias():
    """The llc of both families where the truth is known."""
    rows = {
        (row["posterior"], row["family"]): row for row in latest("flow_bias", "posterior", "family")
    }
    lines = []
    for posterior in dict.fromkeys(name for name, _ in rows):
        mfa, flow = rows[posterior, "mfa"], rows[posterior, "flow"]
        values = [f"{float(row['llc']):.3f} ± {float(row['sem']):.3f}" for row in (mfa, flow)]
        ends = map(number, (flow["bias_of_mfa"], flow["asked_bias"], flow["khat"]))
        lines.append([posterior, flow["d"], f"{float(flow['truth']):.3f}", *values, *ends])
    return tabulate(
        [
            "posterior",
            "d",
            "truth",
            "`mfa`",
            "`flow`",
            "bias, flow over mfa",
            "asked",
            "k̂ of `flow`",
        ],
        lines,
    )


def quadratic():
    """A regular minimum, by backend and template."""
    rows = latest("flow_quadratic", "backend", "template", "d_latent")
    lines = [
        [
            row["backend"],
            row["template"],
            row["d_latent"],
            number(row["error_percent"]),
            row["steps"],
            number(row["fge"]),
        ]
        for row in rows
    ]
    return tabulate(["backend", "template", "d_latent", "error, %", "steps", "FGE"], lines)


def seeds():
    """Chains of few steps from many seeds."""
    columns = ("truth", "least", "median", "greatest")
    lines = [
        [
            row["posterior"],
            row["seeds"],
            row["not_finite"],
            *(number(row[name]) for name in columns),
        ]
        for row in latest("flow_seeds", "posterior")
    ]
    return tabulate(["posterior", "seeds", "not finite", *columns], lines)


TABLES = {
    "flow-speed": speed,
    "density": density,
    "bias": bias,
    "quadratic": quadratic,
    "seeds": seeds,
}
