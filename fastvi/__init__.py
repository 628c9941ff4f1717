"""Fast variational inference on the local posterior of a trained model, and its LLC."""

from fastvi._errors import ConfigError, DataError, NonFiniteError, UnavailableError
from fastvi._version import __version__ as __version__
from fastvi.api.compare import compare
from fastvi.api.curve import LLCCurve, llc_curve
from fastvi.api.estimate import estimate_llc
from fastvi.api.flat import fit, run_vi
from fastvi.api.other_data import DataLLC, example_losses, llc_on
from fastvi.api.posterior import sample_posterior
from fastvi.api.profile import profile
from fastvi.api.resample import correct
from fastvi.api.virial import VirialLLC, virial_llc
from fastvi.config import FlowConfig, VIConfig
from fastvi.families import AbstractBackend, register_backend
from fastvi.observables.draws import FittedQ
from fastvi.observables.posterior import PosteriorDraws
from fastvi.results.differences import LLCComparison, LLCDifference
from fastvi.results.estimate import LLCEstimate
from fastvi.results.flat import SamplerRunResult
from fastvi.results.llc_profile import LLCProfile
from fastvi.results.report.arviz import to_arviz
from fastvi.results.report.page import write_report
from fastvi.target.objective import FlatObjective, make_flat_objective
from fastvi.target.posterior import LocalPosterior
from fastvi.target.ravel import ravel_loss
from fastvi.target.restrict import restrict

__all__ = [
    "AbstractBackend",
    "ConfigError",
    "DataError",
    "DataLLC",
    "FittedQ",
    "FlatObjective",
    "FlowConfig",
    "LLCComparison",
    "LLCCurve",
    "LLCDifference",
    "LLCEstimate",
    "LLCProfile",
    "LocalPosterior",
    "NonFiniteError",
    "PosteriorDraws",
    "SamplerRunResult",
    "UnavailableError",
    "VIConfig",
    "VirialLLC",
    "compare",
    "correct",
    "estimate_llc",
    "example_losses",
    "fit",
    "llc_curve",
    "llc_on",
    "make_flat_objective",
    "profile",
    "ravel_loss",
    "register_backend",
    "restrict",
    "run_vi",
    "sample_posterior",
    "to_arviz",
    "virial_llc",
    "write_report",
]
