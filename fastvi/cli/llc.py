"""`fastvi llc`: estimate on somebody's model, and keep the run."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastvi.api.arguments import choose_localization
from fastvi.api.estimate import estimate_llc
from fastvi.api.series import identify_data, observe_loss_of, observed_data
from fastvi.cli.devices import devices_of
from fastvi.cli.keeping import keeping
from fastvi.cli.target import (
    ModelArguments,
    Resolved,
    absolute,
    load,
    parse_settings,
    resolve,
    restrict_to_parts,
)
from fastvi.config import VIConfig
from fastvi.demos.base import Say
from fastvi.results.claim import claimed
from fastvi.results.estimate import LLCEstimate
from fastvi.results.runs import Origin, check_packages, write_and_print
from fastvi.results.terminal import warn
from fastvi.target.identity import differing


@dataclasses.dataclass(frozen=True)
class Llc:
    """Estimate the learning coefficient of your model and write a run folder.

    Attributes:
        target: module:function returning (loss_fn, params, data), or a run folder to redo.
        config: YAML file with settings of the fit.
        set: Settings that override it, for example --set M=16 r=4.
        out: Folder for the results, new, empty or of an earlier run; runs/NAME when left out.
        seed: Seed of everything random.
        localization: Strength gamma of the Gaussian that ties w to w*; 1 when left out.
        nbeta: n times the inverse temperature; n / log n when left out.
        num_chains: Independent fits; chosen when left out.
        time_limit: Seconds after which it ends with what it has, and the error of that.
        params: Checkpoint with parameters in place of the target's, PATH or PATH:PART.
        trust: Run the code that a run folder names.
        quiet: Print the estimate alone, on one line.
        mesh: Devices that divide walkers, and the examples of a batch: 8, or 4x2.
        distributed: Run beside other processes: "auto" on a cluster, or HOST:PORT,I/N.
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
    time_limit: float | None = None
    params: str | None = None
    trust: bool = False
    quiet: bool = False
    mesh: str | None = dataclasses.field(default=None, metadata={"metavar": "W[xD]"})
    distributed: str | None = dataclasses.field(default=None, metadata={"metavar": "WHERE"})

    def run(self, say: Say) -> int:
        """Claim a folder, load, estimate, write, tell."""
        began = time.perf_counter()
        # Whatever can be refused is refused before the folder is made and the model loaded.
        check_packages()
        resolved = resolve(self.target, trust=self.trust)
        asked = parse_settings([pair for pairs in self.set for pair in pairs])
        config = VIConfig.create(
            self.config if self.config is not None else resolved.config, **asked
        )
        config.check_available()
        config.check_asked(asked)
        check_packages(config)
        # gamma is kept in the origin alone: it is the localization under another name.
        origin, config = self._origin(resolved, config), config.replace(gamma=None)
        walkers = config.filled.sampler.walkers
        with (
            devices_of(self.mesh, self.distributed, walkers) as is_first,
            contextlib.ExitStack() as stack,
        ):
            claim = None
            if is_first:
                where = self.out or _default_folder(self.target, redo=resolved.before is not None)
                claim = stack.enter_context(claimed(where))
            tell = say if is_first and not self.quiet else _silent
            tell(f"target         {resolved.target}")
            if origin.params is not None:
                tell(f"parameters     {origin.params}")
            if origin.part is not None:
                tell(f"part           {', '.join(origin.part)}")
            problem = load(resolved.target, origin.params)
            if origin.part is not None:
                (problem,) = restrict_to_parts(problem, origin.part).values()
            fingerprint = observe_problem(problem, config)
            if resolved.before is not None and is_first:
                _tell_changes(fingerprint, resolved.before.fingerprint)
            result = estimate_origin(
                problem,
                origin,
                config,
                # the progress of one process is kept
                claim.folder if claim is not None and self.distributed is None else None,
                progress=is_first and not self.quiet,
                tell=lambda line: tell(f"progress       {line}"),
                time_limit=self.time_limit,
            )
            if claim is None:
                return 0
            return write_and_print(
                result, claim, origin, config, fingerprint, say=say, began=began, quiet=self.quiet
            )

    def _origin(self, resolved: Resolved, config: VIConfig) -> Origin:
        # The options given now override those of the run that is done again.
        before = resolved.before
        base = Origin(resolved.target, 0, 1.0, None, None) if before is None else before.origin
        return Origin(
            target=resolved.target,
            seed=base.seed if self.seed is None else self.seed,
            localization=choose_localization(self.localization, config, base.localization),
            nbeta=base.nbeta if self.nbeta is None else self.nbeta,
            num_chains=base.num_chains if self.num_chains is None else self.num_chains,
            params=base.params if self.params is None else absolute(self.params),
            part=base.part,
        )


def estimate_origin(
    problem: ModelArguments,
    origin: Origin,
    config: VIConfig,
    folder: Path | None,
    *,
    progress: bool,
    tell: Callable[[str], None],
    time_limit: float | None = None,
) -> LLCEstimate:
    """Estimate as an origin and a configuration say, and go on from progress in a run folder.

    Without a folder nothing is kept.
    """
    with contextlib.nullcontext() if folder is None else keeping(folder, tell) as kept:
        return estimate_llc(
            *problem,
            key=origin.seed,
            nbeta=origin.nbeta,
            localization=origin.localization,
            num_chains=origin.num_chains,
            config=config,
            progress=progress,
            # Data that can be read only once are another sample next time.
            resume_from=None if isinstance(problem.data, Iterator) else kept,
            time_limit=time_limit,
        )


def observe_problem(problem: ModelArguments, config: VIConfig) -> dict[str, Any]:
    """Say in a few numbers what a target computes.

    Parameters, data, and the loss at w* and near it.

    Raises:
        DataError: If loss, parameters or data cannot be used.
    """
    data = observed_data(problem.data, config)
    return {**identify_data(data), **observe_loss_of(problem.loss_fn, problem.params, data, config)}


def _silent(line: str) -> None:
    """Tell nothing."""


def _tell_changes(now: dict[str, Any], before: dict[str, Any] | None) -> None:
    names = [] if before is None else differing(now, before)
    if names:
        warn(
            "fastvi: warning: the target computes something else than in that run: "
            f"{', '.join(names)} differ"
        )


def _default_folder(target: str, *, redo: bool) -> Path:
    if redo:
        folder = Path(target)
        # Resolved, for "." and ".." have no name of their own.
        whole = folder.resolve()
        return (whole if folder.name in ("", "..") else folder).with_name(f"{whole.name}-redo")
    return Path("runs") / target.replace(":", "-")
