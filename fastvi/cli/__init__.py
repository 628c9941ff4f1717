"""The command line: `fastvi llc`, `report`, `compare`, `sweep` and `demo`.

A command is a dataclass whose fields are the options (those without a default are positional) and whose docstring is
the help, with a method `run(say)`, which may return an exit status. Adding one is an entry in `COMMANDS`.
"""

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_type_hints

from fastvi import ConfigError, DataError, NonFiniteError, UnavailableError, __version__
from fastvi._optional import MissingExtraError, import_optional
from fastvi.cli.llc import Llc
from fastvi.cli.runs import Compare, Report
from fastvi.cli.sweep import Sweep
from fastvi.demos import DEMOS

COMMANDS: Mapping[str, Any] = {"llc": Llc, "report": Report, "compare": Compare, "sweep": Sweep, "demo": DEMOS}
GROUP_HELP = {"demo": "Complete runs on a laptop: train, estimate, plot, write a folder."}
DESCRIPTION = "Estimate the local learning coefficient of a trained model.\n\n`fastvi --version` shows the version."

UNTOLD_DEFAULTS = (None, False, (), dataclasses.MISSING)  # a help text has nothing to say of these
FAILURE, INTERRUPTED = 2, 130
EXPECTED_ERRORS = (ConfigError, DataError, NonFiniteError, UnavailableError, MissingExtraError, OSError)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments after the program's name; those of the process when left out.

    Returns:
        The exit status: 0; 1 where runs of a sweep failed; 2 after an error, told on one line of stderr; 130 when
        interrupted.
    """
    args = sys.argv[1:] if args is None else list(args)
    if args[:1] == ["--version"]:
        _say(f"fastvi {__version__}")
        return 0
    try:
        status = _parse(args).run(_say)
    except EXPECTED_ERRORS as error:
        sys.stderr.write(f"{_fold('fastvi: error: ' + ' '.join(str(error).split()))}\n")
        return FAILURE
    except KeyboardInterrupt:
        sys.stderr.write("\nfastvi: interrupted\n")
        return INTERRUPTED
    return status if isinstance(status, int) else 0


def _parse(args: Sequence[str]) -> Any:
    """Build the command that the arguments describe; help and wrong options leave through SystemExit."""
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
    """Return the union of the commands as tyro reads it; a mapping among them is a group of commands."""
    members = []
    for name, command in commands.items():
        if isinstance(command, Mapping):
            group = _group(Annotated[_choice(tyro, command), tyro.conf.arg(name="")])
            marker = tyro.conf.subcommand(name, constructor=group, description=GROUP_HELP[name])
            members.append(Annotated[Any, marker])
        else:
            _name_arguments(tyro, command)
            members.append(Annotated[command, tyro.conf.subcommand(name)])
    if len(members) == 1:  # tyro makes no subcommand of a union of one
        members.append(Annotated[None, tyro.conf.Suppress])
    return Union[tuple(members)]  # noqa: UP007  # built at run time


def _name_arguments(tyro: Any, command: Any) -> None:
    """Show arguments by the names that their fields give; a list of lists collects repeated options."""
    hints = get_type_hints(command)
    for field in dataclasses.fields(command):
        hint = "" if any(field.default is default for default in UNTOLD_DEFAULTS) else None
        markers = (tyro.conf.arg(metavar=field.metadata.get("metavar"), help_behavior_hint=hint),)
        if field.metadata.get("repeated"):
            markers += (tyro.conf.UseAppendAction,)
        command.__annotations__[field.name] = Annotated[(hints[field.name], *markers)]


def _group(choice: Any) -> Any:
    def chosen(command):
        return command

    chosen.__annotations__ = {"command": choice}
    return chosen


def _fold(text: str) -> str:
    """Break a line between words where a terminal would break it anywhere."""
    return textwrap.fill(text, shutil.get_terminal_size().columns - 1) if sys.stderr.isatty() else text


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
