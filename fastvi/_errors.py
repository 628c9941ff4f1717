"""Errors that the package raises on purpose."""


class ConfigError(ValueError):
    """Report a setting that is unknown, of the wrong kind, out of range or at odds with another."""


class DataError(ValueError):
    """Report data or parameters whose structure, shape or dtype cannot be used."""


class NonFiniteError(RuntimeError):
    """Report a NaN or an infinity where the computation cannot go on."""


class UnavailableError(NotImplementedError, ValueError):
    """Report an option whose feature is not part of this release."""


class ErrorNote:
    """Add a note to whatever is raised inside a `with` block.

    The error passes through unchanged.
    """

    def __init__(self, note: str):
        self.note = note

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Add the note."""
        if error is not None:
            error.add_note(self.note)
