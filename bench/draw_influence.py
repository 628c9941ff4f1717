"""Draw docs/figures/influence.png, of the example on the page of draws.

python -m bench.draw_influence
"""

import pathlib
import re

from fastvi.results.report.posterior import plot_influence

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def main() -> None:
    """Run the page's own code, and draw what it finds."""
    page = (DOCS / "posterior-draws.md").read_text(encoding="utf-8")
    namespace: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[:2]:
        exec(compile(block, "posterior-draws.md", "exec"), namespace)  # noqa: S102
    plot_influence(namespace["influence"]).savefig(DOCS / "figures/influence.png", dpi=110)


if __name__ == "__main__":
    main()
