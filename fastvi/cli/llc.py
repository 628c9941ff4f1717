"""`fastvi llc`: estimate on somebody's model, and keep the run."""

import dataclasses
import time
from pathlib import Path

from fastvi.api import estimate_llc
from fastvi.cli.target import load, parse_settings, resolve, settle_localization
from fastvi.config import VIConfig
from fastvi.demos.base import Say
from fastvi.result import LLCEstimate, with_error
from fastvi.runs import Origin, check_packages, listing, write_run


@dataclasses.dataclass(frozen=True)
class Llc:
    """Estimate the learning coefficient of your model and write a run folder.

    Attributes:
        target: module:function returning (loss_fn, params, data), or a run folder to redo.
        config: YAML file with settings of the fit.
        set: Settings that override it, for example --set M=16 r=4.
        out: Folder for the results; runs/NAME when left out.
        seed: Seed of everything random.
        localization: Strength gamma of the Gaussian that ties w to w*; 1 when left out.
        nbeta: n times the inverse temperature; n / log n when left out.
        num_chains: Independent fits; chosen when left out.
        quiet: Print the estimate alone, on one line.
    """

    target: str = dataclasses.field(metadata={"metavar": "TARGET"})
    config: Path | None = None
    set: tuple[tuple[str, ...], ...] = dataclasses.field(
        default=(), metadata={"metavar": "NAME=VALUE [NAME=VALUE ...]", "repeated": True}
    )
    out: Path | None = None
    seed: int | None = None
    localization: float | None = None
    nbeta: float | None = None
    num_chains: int | None = None
    quiet: bool = False

    def run(self, say: Say) -> LLCEstimate:
        """Load, estimate, tell, write."""
        began = time.perf_counter()
        check_packages()
        target, before, config = resolve(self.target)
        config = VIConfig.create(
            self.config if self.config is not None else config,
            **parse_settings([pair for pairs in self.set for pair in pairs]),
        )
        config.check_available()
        origin, config = self._origin(target, before, config), config.replace(gamma=None)
        folder = self.out or _default_folder(self.target, redo=before is not None)
        tell = _silent if self.quiet else say
        tell(f"target         {target}")
        problem = load(target)
        result = estimate_origin(problem, origin, config, progress=not self.quiet)
        tell("")
        tell(result.summary())
        write_run(result, folder, origin, config)
        tell("")
        tell(f"done in {time.perf_counter() - began:.0f} s; written:")
        for line in listing(folder):
            tell(line)
        if self.quiet:
            say(f"llc {with_error(result.llc, result.llc_sem)}  {folder}")
        return result

    def _origin(self, target: str, before: Origin | None, config: VIConfig) -> Origin:
        base = before or Origin(target, 0, 1.0, None, None)
        return Origin(
            target=target,
            seed=base.seed if self.seed is None else self.seed,
            localization=settle_localization(self.localization, config, base.localization),
            nbeta=base.nbeta if self.nbeta is None else self.nbeta,
            num_chains=base.num_chains if self.num_chains is None else self.num_chains,
        )


def estimate_origin(problem, origin: Origin, config: VIConfig, *, progress: bool) -> LLCEstimate:
    """Estimate as an origin and a configuration say."""
    return estimate_llc(
        *problem,
        key=origin.seed,
        nbeta=origin.nbeta,
        localization=origin.localization,
        num_chains=origin.num_chains,
        config=config,
        progress=progress,
    )


def _default_folder(target: str, *, redo: bool) -> Path:
    if redo:
        folder = Path(target)
        return folder.with_name(f"{folder.resolve().name}-redo")
    return Path("runs") / target.replace(":", "-")


def _silent(line: str) -> None:
    del line
