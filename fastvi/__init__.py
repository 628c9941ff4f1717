"""Fast variational inference on the local posterior of a trained model, and its LLC."""

from fastvi._compilation import use_compilation_cache
from fastvi._errors import ConfigError, DataError, NonFiniteError, UnavailableError
from fastvi._version import __version__ as __version__
from fastvi.api.compare import compare
from fastvi.api.curve import LLCCurve, llc_curve
from fastvi.api.estimate import estimate_llc
from fastvi.api.flat import fit, run_vi
from fastvi.api.forecast import SGLDForecast, forecast_sgld
from fastvi.api.other_data import DataLLC, example_losses, llc_on
from fastvi.api.parts import estimate_parts
from fastvi.api.posterior import sample_posterior
from fastvi.api.profile import profile
from fastvi.api.resample import correct
from fastvi.api.split import split_llc
from fastvi.api.virial import VirialLLC, virial_llc
from fastvi.config import FlowConfig, VIConfig
from fastvi.families import AbstractBackend, register_backend
from fastvi.observables.draws import FittedQ
from fastvi.observables.posterior import PosteriorDraws
from fastvi.results.differences import LLCComparison, LLCDifference
from fastvi.results.estimate import LLCEstimate
from fastvi.results.flat import SamplerRunResult
from fastvi.results.llc_profile import LLCProfile
from fastvi.results.part_estimates import PartEstimates
from fastvi.results.report.arviz import to_arviz
from fastvi.results.report.devinterp import to_devinterp
from fastvi.results.report.page import write_report
from fastvi.results.resume import ProgressFolder, Stopped
from fastvi.results.stored_draws import load_draws
from fastvi.target.heads import attention_heads
from fastvi.target.objective import FlatObjective, make_flat_objective
from fastvi.target.parts import select_part
from fastvi.target.posterior import LocalPosterior
from fastvi.target.preview import PartsPreview, preview
from fastvi.target.ragged import pad_sequences
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
    "PartEstimates",
    "PartsPreview",
    "PosteriorDraws",
    "ProgressFolder",
    "SGLDForecast",
    "SamplerRunResult",
    "Stopped",
    "UnavailableError",
    "VIConfig",
    "VirialLLC",
    "attention_heads",
    "compare",
    "correct",
    "estimate_llc",
    "estimate_parts",
    "example_losses",
    "fit",
    "forecast_sgld",
    "llc_curve",
    "llc_on",
    "load_draws",
    "make_flat_objective",
    "pad_sequences",
    "preview",
    "profile",
    "ravel_loss",
    "register_backend",
    "restrict",
    "run_vi",
    "sample_posterior",
    "select_part",
    "split_llc",
    "to_arviz",
    "to_devinterp",
    "use_compilation_cache",
    "virial_llc",
    "write_report",
]
