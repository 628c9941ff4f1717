"""Fast variational inference on the local posterior of a trained model, and its local learning coefficient."""

from fastvi._errors import ConfigError, DataError, NonFiniteError, UnavailableError
from fastvi.api import estimate_llc
from fastvi.config import FlowConfig, VIConfig
from fastvi.correct import correct
from fastvi.curve import LLCCurve, llc_curve
from fastvi.draws import FittedQ
from fastvi.expectation import DataLLC, example_losses, llc_on
from fastvi.families import AbstractBackend, register_backend
from fastvi.objective import FlatObjective, make_flat_objective, ravel_loss
from fastvi.posterior import LocalPosterior
from fastvi.restriction import restrict
from fastvi.result import LLCEstimate
from fastvi.sampler import SamplerRunResult, fit, run_vi
from fastvi.virial import VirialLLC, virial_llc

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
