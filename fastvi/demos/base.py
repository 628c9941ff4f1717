"""What the demos share: options, and the run folder."""

import abc
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastvi._errors import ConfigError
from fastvi._typing import Batch, PyTree
from fastvi.api.estimate import estimate_llc
from fastvi.config import VIConfig
from fastvi.results.claim import claimed
from fastvi.results.estimate import LLCEstimate
from fastvi.results.runs import Origin, check_packages, write_and_print

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractDemo(abc.ABC):
    """Options of every demo; a demo adds its own, and `run`.

    Attributes:
        out: Folder for the results, new, empty or of an earlier run, whose files are replaced.
        seed: Seed of everything random.
        localization: Strength gamma of the Gaussian that ties w to w*.
        num_chains: Independent fits; 4 when left out, 1 where walkers follow.
        steps: Most steps of the fit; chosen when left out.
        batch_size: Examples per minibatch of the fit; chosen when left out.
        lr: Peak learning rate of the fit, 0.01 when left out.
        method: How the posterior is averaged over, "auto" when left out.
        config: YAML file with any settings of the fit; the four options above override it.
    """

    out: Path
    seed: int = 0
    localization: float = 1.0
    num_chains: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    method: Literal["auto", "sample", "reweight", "variational"] | None = None
    config: Path | None = None

    def run(self, say: Say) -> int:
        """Run the demo in a folder that is claimed first, telling `say` line by line, and write it.

        Returns:
            The exit status.

        Raises:
            ConfigError: If an option or the folder is impossible.
            MissingExtraError: If a package is missing.
        """
        began = time.perf_counter()
        # Before the folder is claimed, so that a wrong option leaves none behind.
        self.check_options()
        config = self.prepare()
        with claimed(self.out) as claim:
            result, more = self.produce(config, say)
            origin = Origin(None, self.seed, self.localization, None, self.num_chains)
            status = write_and_print(result, claim, origin, say=say, began=began, more=more)
        # A run that was written elsewhere is not read from here.
        if status == 0:
            say(f"read again with fastvi.LLCEstimate.load({str(self.out)!r})")
        return status

    @abc.abstractmethod
    def check_options(self) -> None:
        """Raise ConfigError where an option of the demo's own is impossible."""

    @abc.abstractmethod
    def produce(self, config: VIConfig, say: Say) -> tuple[LLCEstimate, str]:
        """Return the estimate, and what there is to tell beside its summary."""

    def prepare(self) -> VIConfig:
        """Check options and packages, before anything takes long."""
        check_packages()
        check(0 <= self.seed < 2**32, "seed", "an integer from 0 to 2**32 - 1", self.seed)
        check(
            self.num_chains is None or self.num_chains >= 1,
            "num_chains",
            "1 or more",
            self.num_chains,
        )
        check(
            0 <= self.localization < float("inf"),
            "localization",
            "a number from 0",
            self.localization,
        )
        given = {name: getattr(self, name) for name in ("steps", "batch_size", "lr", "method")}
        # None is what was not given, and does not override the file.
        settings = VIConfig.create(self.config, **{k: v for k, v in given.items() if v is not None})
        settings.check_available()
        check_packages(settings)
        return settings

    def estimate(
        self, loss_fn: Callable[..., Any], params: PyTree, data: Batch, config: VIConfig
    ) -> LLCEstimate:
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


def check(holds: bool, name: str, rule: str, value: Any) -> None:
    """Raise ConfigError unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} must be {rule}; got {value!r}.")
