"""Fast variational inference on the local posterior of a trained model, and its local learning coefficient."""

from fastvi._errors import ConfigError, DataError, NonFiniteError, UnavailableError
from fastvi.api.curve import LLCCurve, llc_curve
from fastvi.api.estimate import estimate_llc
from fastvi.api.flat import SamplerRunResult, fit, run_vi
from fastvi.api.other_data import DataLLC, example_losses, llc_on
from fastvi.api.resample import correct
from fastvi.api.virial import VirialLLC, virial_llc
from fastvi.config import FlowConfig, VIConfig
from fastvi.families import AbstractBackend, register_backend
from fastvi.observables.draws import FittedQ
from fastvi.results.estimate import LLCEstimate
from fastvi.target.objective import FlatObjective, make_flat_objective, ravel_loss
from fastvi.target.posterior import LocalPosterior
from fastvi.target.restrict import restrict

__version__ = "0.1.0"

__all__ = [
    "AbstractBackend",
    "ConfigError",
    "DataError",
    "DataLLC",
    "FittedQ",
    "FlatObjective",
    "FlowConfig",
    "LLCCurve",
    "LLCEstimate",
    "LocalPosterior",
    "NonFiniteError",
    "SamplerRunResult",
    "UnavailableError",
    "VIConfig",
    "VirialLLC",
    "correct",
    "estimate_llc",
    "example_losses",
    "fit",
    "llc_curve",
    "llc_on",
    "make_flat_objective",
    "ravel_loss",
    "register_backend",
    "restrict",
    "run_vi",
    "virial_llc",
]
