"""Estimates of several parts of the weights, side by side."""

import dataclasses
from collections.abc import Iterator, Mapping

from fastvi._html import result_html
from fastvi.results.estimate import LLCEstimate
from fastvi.results.terminal import aligned


@dataclasses.dataclass(frozen=True, eq=False)
class PartEstimates(Mapping[str, LLCEstimate]):
    """The estimate of each part, by its name: a mapping; `print(parts.summary())`.

    Attributes:
        estimates: By name, in the order in which the parts were given.
    """

    estimates: dict[str, LLCEstimate]

    def __getitem__(self, name: str) -> LLCEstimate:
        """Return the estimate of a part."""
        return self.estimates[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the parts."""
        return iter(self.estimates)

    def __len__(self) -> int:
        """Count the parts."""
        return len(self.estimates)

    @property
    def llc(self) -> dict[str, float]:
        """The learning coefficient of each part."""
        return {name: one.llc for name, one in self.estimates.items()}

    @property
    def llc_sem(self) -> dict[str, float]:
        """The standard error of each."""
        return {name: one.llc_sem for name, one in self.estimates.items()}

    @property
    def sample_gradients(self) -> float:
        """All work together: one example's gradient is 1, its loss 1/3, its HVP 2."""
        return sum(one.sample_gradients for one in self.estimates.values())

    @property
    def seconds(self) -> float:
        """Time of all estimates together."""
        return sum(one.timings.total for one in self.estimates.values())

    def _repr_html_(self) -> str:
        """Return it for a notebook."""
        return result_html(self.summary())

    def summary(self) -> str:
        """Return a table: dimension, llc, llc in a dimension, work and findings of each part."""
        head = ("part", "d", "llc", "llc / d", "sample gradients", "findings")
        rows = [head, *(_row(name, one) for name, one in self.estimates.items())]
        compiling = sum(one.timings.compile for one in self.estimates.values())
        total = f"{self.sample_gradients:,.0f} sample gradients in {self.seconds:.1f} s"
        return "\n".join([aligned(rows), f"{total}; about {compiling:.1f} s of it compiling"])


def _row(name: str, estimate: LLCEstimate) -> tuple[str, ...]:
    findings = ", ".join(finding.name for finding in estimate.health) or "none"
    return (
        name,
        f"{estimate.dim:,}",
        estimate.llc_text,
        f"{estimate.llc / estimate.dim:.3g}",
        f"{estimate.sample_gradients:,.0f}",
        findings,
    )
