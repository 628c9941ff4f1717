"""What the demos share: options, and the run folder."""

import abc
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastvi._errors import ConfigError
from fastvi._optional import import_optional
from fastvi._typing import Batch, PyTree
from fastvi.api import estimate_llc
from fastvi.config import VIConfig
from fastvi.diagnostics.plots import import_matplotlib, plot_traces
from fastvi.result import RESULT_FILE, TRACES_FILE, LLCEstimate

CONFIG_FILE, FIGURE_FILE = "config.yaml", "traces.png"
FIGURE_DPI = 150
CONTENTS = {
    RESULT_FILE: "values, errors, spectrum, findings",
    TRACES_FILE: "every step of every chain, and the log weights",
    CONFIG_FILE: "settings of the fit, for --config",
    FIGURE_FILE: "the traces and the spectrum as a figure",
}

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractDemo(abc.ABC):
    """Options of every demo; a demo adds its own, and `run`.

    Attributes:
        out: Folder for the results, made if need be; files of an earlier run in it are replaced.
        seed: Seed of everything random.
        localization: Strength gamma of the Gaussian that ties w to w*.
        num_chains: Independent fits; 4 when left out, 1 where a correction follows.
        steps: Largest number of steps, 5000 when left out; the fit stops by itself when the ELBO is flat.
        batch_size: Examples per minibatch of the fit, 256 when left out.
        lr: Peak learning rate of the fit, 0.01 when left out.
        correction: Whether to go on from q to the posterior's own value, "auto" when left out.
        config: YAML file with any settings of the fit; the four options above override it.
    """

    out: Path
    seed: int = 0
    localization: float = 1.0
    num_chains: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    correction: Literal["none", "auto", "importance", "mcmc"] | None = None
    config: Path | None = None

    @abc.abstractmethod
    def run(self, say: Say) -> LLCEstimate:
        """Run the demo, telling `say` line by line, and write the run folder.

        Raises:
            ConfigError: If an option is impossible.
            MissingExtraError: If a package is missing.
        """

    def prepare(self) -> VIConfig:
        """Check options, packages and folder, before anything takes long."""
        import_matplotlib()
        import_optional("yaml", extra="cli", distribution="PyYAML", purpose=f"writing {CONFIG_FILE}")
        check(0 <= self.seed < 2**32, "seed", "an integer from 0 to 2**32 - 1", self.seed)
        check(self.num_chains is None or self.num_chains >= 1, "num_chains", "1 or more", self.num_chains)
        check(0 <= self.localization < float("inf"), "localization", "a number from 0", self.localization)
        given = {name: getattr(self, name) for name in ("steps", "batch_size", "lr", "correction")}
        settings = VIConfig.create(self.config, **{k: v for k, v in given.items() if v is not None})
        settings.check_available()
        self.out.mkdir(parents=True, exist_ok=True)
        return settings

    def estimate(self, loss_fn: Callable[..., Any], params: PyTree, data: Batch, config: VIConfig) -> LLCEstimate:
        """Estimate the learning coefficient with these options."""
        return estimate_llc(
            loss_fn,
            params,
            data,
            key=self.seed,
            localization=self.localization,
            config=config,
            num_chains=self.num_chains,
        )

    def write(self, result: LLCEstimate, say: Say, began: float) -> None:
        """Write the run folder and list what it holds."""
        folder = result.save(self.out)
        result.config.to_yaml(folder / CONFIG_FILE)
        plot_traces(result).savefig(folder / FIGURE_FILE, dpi=FIGURE_DPI)
        say("")
        say(f"done in {time.perf_counter() - began:.0f} s; written:")
        width = max(len(str(folder / name)) for name in CONTENTS)
        for name, what in CONTENTS.items():
            say(f"  {folder / name!s:<{width}}   {what}")
        say(f"read again with fastvi.LLCEstimate.load({str(folder)!r})")


def check(holds: bool, name: str, rule: str, value: Any) -> None:
    """Raise ConfigError unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} must be {rule}; got {value!r}.")
