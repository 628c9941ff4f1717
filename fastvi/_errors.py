"""Errors that the package raises on purpose."""


class ConfigError(ValueError):
    """Report a setting that is unknown, of the wrong kind, out of range or at odds with another."""


class DataError(ValueError):
    """Report data or parameters whose structure, shape or dtype cannot be used."""


class NonFiniteError(RuntimeError):
    """Report a NaN or an infinity where the computation cannot go on."""


class UnavailableError(NotImplementedError, ValueError):
    """Report an option whose feature is not part of this release."""
