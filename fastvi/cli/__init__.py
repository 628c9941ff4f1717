"""The command line: `fastvi llc`, `report`, `compare`, `sweep` and `demo`.

A command is a dataclass whose fields are the options (those without a default are positional) and
whose docstring is the help, with a method `run(say)`, which returns an exit status, or None where
all it does is to print. Adding one is an entry in `COMMANDS`.
"""

import contextlib
import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_type_hints

from fastvi._compilation import use_compilation_cache
from fastvi._errors import ConfigError, DataError, NonFiniteError, UnavailableError
from fastvi._modes import jax_setting
from fastvi._optional import MissingExtraError, import_optional
from fastvi._version import __version__
from fastvi.cli.keeping import Terminated
from fastvi.cli.llc import Llc
from fastvi.cli.runs import Compare, Report
from fastvi.cli.sweep import Sweep
from fastvi.demos import DEMOS
from fastvi.demos.base import Say
from fastvi.results.terminal import flush_streams, is_terminal, warn, write_text

COMMANDS: Mapping[str, Any] = {
    "llc": Llc,
    "report": Report,
    "compare": Compare,
    "sweep": Sweep,
    "demo": DEMOS,
}
GROUP_HELP = {"demo": "Complete runs on a laptop: train, estimate, plot, write a folder."}
# Lines of 80 letters at most: tyro breaks none of a description.
DESCRIPTION = """\
Estimate the LLC of a trained model, its error, and whether to believe it.

1. `fastvi demo digits` trains a small classifier and writes a page.
2. For your model: `def target(): return loss_fn, params, data` in mymodel.py.
3. `fastvi llc mymodel:target` estimates. Read its findings first, then the llc.
4. `fastvi compare runs/*` puts runs side by side; `fastvi sweep` makes many.

`fastvi COMMAND --help` lists options; `fastvi --version` shows the version."""

# Defaults that a help text does not tell: the option's own description says what happens then.
UNTOLD_DEFAULTS = (None, False, (), dataclasses.MISSING)
# Exit statuses; a shell gives the last two to processes ended by SIGINT (Ctrl-C) and SIGTERM.
FAILURE, INTERRUPTED, TERMINATED = 2, 130, 143
# Errors that are told on one line. Any other is a fault of fastvi, whose traceback is wanted.
EXPECTED_ERRORS = (
    ConfigError,
    DataError,
    NonFiniteError,
    UnavailableError,
    MissingExtraError,
    OSError,
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    What cannot be printed does not end a command: its work is written to its folder first.

    Args:
        args: Arguments after the program's name; those of the process when left out.

    Returns:
        The exit status: 0; 1 where runs of a sweep failed, a run could not be written where it was
        asked for, or nothing was done but to print and that failed; 2 after an error, told on one
        line of stderr; 130 when interrupted; 143 when asked to terminate by SIGTERM.
    """
    args = sys.argv[1:] if args is None else list(args)
    path = [*sys.path]
    try:
        return _run(args)
    finally:
        # A target's folder is on the path while its command runs.
        sys.path[:] = path
        flush_streams()


def _run(args: Sequence[str]) -> int:
    printer = Printer()
    # Before tyro is imported: the version can be told without the extra.
    if args[:1] == ["--version"]:
        printer(f"fastvi {__version__}")
        return 0
    try:
        command = _parse(args)
        keep_programs()
        try:
            status = command.run(printer)
        # The model's own code may call sys.exit, which is not the exit of this command.
        except SystemExit as stop:
            raise DataError(
                f"the model called sys.exit({stop.code!r}) before there was an estimate."
            ) from stop
    except EXPECTED_ERRORS as error:
        warn(_fold("fastvi: error: " + " ".join(str(error).split())))
        return FAILURE
    except KeyboardInterrupt as stop:
        warn("\nfastvi: " + ": ".join(("interrupted", *stop.args)).removesuffix(": "))
        return INTERRUPTED
    except Terminated as stop:
        warn("\nfastvi: " + ": ".join(("terminated", *stop.args)).removesuffix(": "))
        return TERMINATED
    if printer.lost is not None:
        warn(f"fastvi: warning: stdout cannot be written: {printer.lost}")
    return int(printer.lost is not None) if status is None else status


def keep_programs() -> None:
    """Take compiled programs from a folder, unless somebody does without or has named another."""
    is_on, folder = map(jax_setting, ("jax_enable_compilation_cache", "jax_compilation_cache_dir"))
    if is_on and not folder:
        # without a home, or on a full disk, they are compiled
        with contextlib.suppress(OSError, RuntimeError):
            use_compilation_cache()


class Group:
    """A group of commands, of which one was chosen."""

    command: Any

    def run(self, say: Say) -> int | None:
        """Run the chosen command."""
        return self.command.run(say)


class Printer:
    """Print line by line while that is possible; `lost` says why no longer."""

    lost: str | None = None

    def __call__(self, line: str) -> None:
        """Print a line."""
        if self.lost is None:
            self.lost = write_text(sys.stdout, f"{line}\n")


def _parse(args: Sequence[str]) -> Any:
    """Build the command that the arguments describe.

    Help and wrong options leave through SystemExit.
    """
    tyro = import_optional("tyro", extra="cli", distribution="tyro", purpose="the command line")
    return tyro.cli(
        _choice(tyro, COMMANDS),
        prog="fastvi",
        description=DESCRIPTION,
        args=args,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.PositionalRequiredArgs,
            tyro.conf.DisallowNone,
            tyro.conf.FlagCreatePairsOff,
        ),
    )


def _choice(tyro: Any, commands: Mapping[str, Any]) -> Any:
    """Return the union of the commands as tyro reads it.

    A mapping among them is a group of commands.
    """
    members = []
    for name, command in commands.items():
        if isinstance(command, Mapping):
            inner = Annotated[_choice(tyro, command), tyro.conf.arg(name="")]
            marker = tyro.conf.subcommand(name, description=GROUP_HELP[name])
            group = dataclasses.make_dataclass(name, [("command", inner)], bases=(Group,))
            members.append(Annotated[group, marker])
        else:
            described = _with_described_arguments(tyro, command)
            members.append(Annotated[described, tyro.conf.subcommand(name)])
    # tyro makes no subcommand of a union of one.
    if len(members) == 1:
        members.append(Annotated[None, tyro.conf.Suppress])
    return Union[tuple(members)]  # noqa: UP007  # built at run time


def _with_described_arguments(tyro: Any, command: Any) -> type:
    """Derive the command whose annotations tell tyro how to show and collect each argument.

    Arguments are shown by the names that their fields give; a list of lists collects repeated
    options. The command itself stays as it is, since its module must import without tyro.
    """
    hints, annotations = get_type_hints(command), {}
    for field in dataclasses.fields(command):
        # By identity: 0 equals False, and is to be told.
        hint = "" if any(field.default is default for default in UNTOLD_DEFAULTS) else None
        markers = (tyro.conf.arg(metavar=field.metadata.get("metavar"), help_behavior_hint=hint),)
        # Without it a repeated option would replace what it gave before.
        if field.metadata.get("repeated"):
            markers += (tyro.conf.UseAppendAction,)
        annotations[field.name] = Annotated[(hints[field.name], *markers)]
    namespace = {
        "__annotations__": annotations,
        "__doc__": command.__doc__,
        "__module__": command.__module__,
    }
    return type(command.__name__, (command,), namespace)


def _fold(text: str) -> str:
    """Break a line between words where a terminal would break it anywhere."""
    return (
        textwrap.fill(text, shutil.get_terminal_size().columns - 1)
        if is_terminal(sys.stderr)
        else text
    )
