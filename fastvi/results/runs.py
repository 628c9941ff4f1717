"""Run folders: an estimate with its settings, figure and page, and where it came from."""

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastvi._errors import ConfigError
from fastvi._optional import import_optional
from fastvi.config import VIConfig
from fastvi.config import rules as checks
from fastvi.results import files
from fastvi.results.claim import ORIGIN_FILE, RUN, Claim
from fastvi.results.estimate import LLCEstimate
from fastvi.results.report.page import write_report
from fastvi.results.report.plots import plot_traces
from fastvi.results.report.style import import_matplotlib
from fastvi.results.report.tensorboard import write_events
from fastvi.results.saved import RESULT_FILE, TRACES_FILE
from fastvi.results.terminal import warn

CONFIG_FILE, FIGURE_FILE, REPORT_FILE = "config.yaml", "traces.png", "report.html"
EVENTS_FOLDER = Path("diagnostics") / "tb"
VERSION = 4  # of run.json; raised where its entries change their meaning
FIGURE_DPI = 150  # a panel is then some 900 pixels wide
CONTENTS = {
    RESULT_FILE: "values, errors, spectrum, findings",
    TRACES_FILE: "every step of every chain, and the log weights",
    CONFIG_FILE: "settings of the fit, for --config",
    FIGURE_FILE: "the traces and the spectrum as a figure",
    REPORT_FILE: "all of it as a page for a browser",
    ORIGIN_FILE: "the command's own settings",
}
WAY_OUT = (
    "Name the model and its settings instead of the folder, or restore the folder from a copy."
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What an estimate was made of, beside the configuration.

    `target` is `module:function`, or None for a demo. `params` names a checkpoint whose parameters
    take the place of the target's; it is None where they are its own. `part` holds a name and the
    patterns of the parameters that vary, as `select_part` takes them; it is None where all do.

    Raises:
        ConfigError: If a value is impossible.
    """

    target: str | None
    seed: int
    localization: float
    nbeta: float | None
    num_chains: int | None
    params: str | None = None
    part: dict[str, list[str]] | None = None

    def __post_init__(self) -> None:
        """Check the values, and read numbers that YAML takes for strings."""
        if self.target is not None:
            check_target(self.target)
        if self.params is not None and not (isinstance(self.params, str) and self.params):
            raise ConfigError(
                f"params must name a checkpoint, PATH or PATH:PART; got {self.params!r}."
            )
        if self.part is not None and not _is_part(self.part):
            raise ConfigError(
                "a part must be a name and a list of patterns, such as "
                f"{{'embeddings': ['embed/**']}}; got {self.part!r}."
            )
        checked = {
            "seed": checks.integer("seed", self.seed, "for example 0", minimum=0),
            "localization": checks.nonnegative(
                "localization", self.localization, "for example 1.0"
            ),
            # The estimate chooses these two where they are None.
            "nbeta": None
            if self.nbeta is None
            else checks.positive("nbeta", self.nbeta, "leave it out for n / log n"),
            "num_chains": None
            if self.num_chains is None
            else checks.integer("num_chains", self.num_chains, "for example 4"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _is_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and len(part) == 1
        and all(
            isinstance(name, str) and isinstance(one, list) and one for name, one in part.items()
        )
        and all(isinstance(pattern, str) for one in part.values() for pattern in one)
    )


def check_target(target: Any) -> str:
    """Return a target of the form `module:function`, or raise ConfigError."""
    # The target of a run.json may be of any type.
    module, _, function = target.partition(":") if isinstance(target, str) else ("", "", "")
    is_path = module.endswith(".py") or "/" in module
    if (
        is_path
        or not function.isidentifier()
        or not all(part.isidentifier() for part in module.split("."))
    ):
        raise ConfigError(
            "TARGET must be module:function, whose function returns (loss_fn, params, data), or a "
            f"run folder; got {target!r}."
            + (" Write a.b:f for the function f of the file a/b.py." if is_path else "")
        )
    return target


class RunRecord(NamedTuple):
    """What a run folder remembers.

    `fingerprint` is what the target computed, None where nobody looked.
    """

    origin: Origin
    fingerprint: dict[str, Any] | None


def check_packages(config: VIConfig | None = None) -> None:
    """Raise MissingExtraError unless the packages that write a run folder are installed.

    Args:
        config: Asks for events or not; none are asked for when left out.
    """
    import_matplotlib()
    import_optional("yaml", extra="cli", distribution="PyYAML", purpose=f"writing {CONFIG_FILE}")
    if config is not None and config.tensorboard:
        import_optional(
            "tensorboardX", extra="tensorboard", distribution="tensorboardX", purpose="TensorBoard"
        )


def write_run(
    result: LLCEstimate,
    folder: str | os.PathLike[str],
    origin: Origin,
    settings: Any = None,
    fingerprint: dict[str, Any] | None = None,
    *,
    check: Callable[[], object] | None = None,
) -> Path:
    """Write a run folder; files of an earlier run are replaced.

    All files are finished beside their places first. Then the marks of the earlier run are
    withdrawn, and those of this one come last: a kill at any moment leaves the earlier run, this
    one, or one that says it is not complete.

    Args:
        result: The estimate.
        folder: The folder.
        origin: What it was made of.
        settings: The configuration as it was asked for; that of the result when left out.
        fingerprint: What the target computed.
        check: Called before anything of an earlier run is touched; raises where nothing may be.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with files.staged(folder) as staging:
        result.save(staging)
        (result.config if settings is None else settings).to_yaml(staging / CONFIG_FILE)
        # Everything that may fail is finished before anything of an earlier run is touched.
        plot_traces(result).savefig(staging / FIGURE_FILE, dpi=FIGURE_DPI)
        write_report(result, staging / REPORT_FILE)
        if result.config.tensorboard:
            write_events(result, staging / EVENTS_FOLDER)
        # These two are read again; a traces.npz is tied to its result.json by a digest there.
        digests = {
            name: files.digest_bytes((staging / name).read_bytes())
            for name in (RESULT_FILE, CONFIG_FILE)
        }
        record = {"fingerprint": fingerprint, "digests": digests, **dataclasses.asdict(origin)}
        if check is not None:
            check()
        _mark(folder, complete=False, **record)
        _replace_events(staging / EVENTS_FOLDER, folder / EVENTS_FOLDER)
        files.publish(
            staging, folder, (TRACES_FILE, CONFIG_FILE, FIGURE_FILE, REPORT_FILE, RESULT_FILE)
        )
        _mark(folder, complete=True, **record)
    # of the run that is complete now; what cannot be removed says nothing wrong
    shutil.rmtree(folder / files.PROGRESS, ignore_errors=True)
    return folder


def _mark(folder: Path, **record: Any) -> None:
    content = files.json_bytes({"format": RUN, "version": VERSION, **record})
    files.replace_file(folder / ORIGIN_FILE, content)


def _replace_events(new: Path, place: Path) -> None:
    """Put the events of this run, if it has some, where those of an earlier one are."""
    # rmtree refuses a link, and what it names may be somebody else's.
    if place.is_symlink():
        place.unlink()
    elif place.is_dir():
        shutil.rmtree(place)
    if new.is_dir():
        place.parent.mkdir(exist_ok=True)
        os.replace(new, place)


class WrittenRun(NamedTuple):
    """Where a run was written, None where it could not be.

    And what went wrong, None where nothing did.
    """

    folder: Path | None
    trouble: str | None


def write_run_somewhere(
    result: LLCEstimate,
    folder: Path,
    origin: Origin,
    settings: Any = None,
    fingerprint: dict[str, Any] | None = None,
    *,
    check: Callable[[], object] | None = None,
) -> WrittenRun:
    """Write a run folder, or where that fails one in the place for temporary files.

    The work is done by now. `check` is that of `write_run`.
    """
    try:
        written = write_run(result, folder, origin, settings, fingerprint, check=check)
        return WrittenRun(written, None)
    # A lease that was lost is one too.
    except OSError as error:
        trouble = f"the run could not be written to {folder} ({files.first_line(error)})"
    try:
        refuge = Path(tempfile.mkdtemp(prefix="fastvi-"))
        return WrittenRun(
            write_run(result, refuge, origin, settings, fingerprint),
            f"{trouble}. It is in {refuge} instead: move it before it is cleaned away.",
        )
    except OSError as error:
        return WrittenRun(
            None,
            f"{trouble}, nor to a temporary folder ({files.first_line(error)}): what is printed "
            "is all.",
        )


def write_and_print(
    result: LLCEstimate,
    claim: Claim,
    origin: Origin,
    settings: Any = None,
    fingerprint: dict[str, Any] | None = None,
    *,
    say: Callable[[str], None],
    began: float,
    quiet: bool = False,
    more: str = "",
) -> int:
    """Write a run, then tell it: the number is kept before anything is printed.

    Args:
        result: The estimate.
        claim: The folder, held.
        origin: What it was made of.
        settings: The configuration as it was asked for.
        fingerprint: What the target computed.
        say: Prints a line.
        began: When the command began, by `time.perf_counter`.
        quiet: Whether to tell the estimate alone, on one line.
        more: Words after the summary.

    Returns:
        The exit status: 1 where the folder could not be written.
    """
    kept = WrittenRun(None, None)
    # Written first: a terminal that is gone cannot keep a run from its folder.
    try:
        kept = write_run_somewhere(
            result, claim.folder, origin, settings, fingerprint, check=claim.lease.check
        )
    # An error of another kind, in a figure for example, does not take the number with it.
    finally:
        if quiet:
            say(f"llc {result.llc_text}  {kept.folder or '-'}")
        else:
            say(f"\n{result.summary()}{more}")
    if kept.trouble is not None:
        warn(f"fastvi: warning: {kept.trouble}")
    if kept.folder is not None and not quiet:
        say(f"\ndone in {time.perf_counter() - began:.0f} s; written:")
        for line in listing(kept.folder):
            say(line)
    return 0 if kept.trouble is None else 1


def read_record(folder: str | os.PathLike[str]) -> RunRecord:
    """Read and check what a run folder remembers, and that its files are those of the run.

    Raises:
        DataError: If the run is not complete, or a file is missing, damaged or of another run.
    """
    folder = Path(folder)
    path = folder / ORIGIN_FILE
    found = files.read_object(path, f"{folder} is not a run folder. {WAY_OUT}")
    files.check_format(path, found, RUN, VERSION, WAY_OUT)
    if found.get("complete") is not True:
        raise files.damaged(
            path, "says that the run was not written to its end", f"Run it again. {WAY_OUT}"
        )
    names = [field.name for field in dataclasses.fields(Origin)]
    expected = {"format", "version", "complete", "fingerprint", "digests", *names}
    if found.keys() != expected:
        raise files.damaged(
            path, f"lacks or has too many of {sorted(found.keys() ^ expected)}", WAY_OUT
        )
    digests, fingerprint = found["digests"], found["fingerprint"]
    if not isinstance(digests, dict) or not (fingerprint is None or isinstance(fingerprint, dict)):
        raise files.damaged(path, "has digests or a fingerprint of the wrong type", WAY_OUT)
    try:
        origin = Origin(**{name: found[name] for name in names})
    except ConfigError as error:
        raise files.damaged(path, f"has an impossible value: {error}", WAY_OUT) from error
    # A file that was put here from elsewhere would be taken for what the run computed.
    for name in (RESULT_FILE, CONFIG_FILE):
        if files.digest_bytes(files.read_bytes(folder / name, WAY_OUT)) != digests.get(name):
            raise files.damaged(
                folder / name, f"is not the file of the run that {ORIGIN_FILE} tells of", WAY_OUT
            )
    return RunRecord(origin, fingerprint)


def read_settings(folder: Path) -> VIConfig:
    """Read the configuration of a run folder.

    Raises:
        DataError: If it is damaged.
    """
    try:
        return VIConfig.create(folder / CONFIG_FILE)
    except ConfigError as error:
        raise files.damaged(folder / CONFIG_FILE, f"cannot be used: {error}", WAY_OUT) from error


def listing(folder: Path) -> list[str]:
    """Name what a run folder holds, line by line."""
    width = max(len(str(folder / name)) for name in CONTENTS)
    return [f"  {folder / name!s:<{width}}   {what}" for name, what in CONTENTS.items()]
