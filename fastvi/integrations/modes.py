"""Models in training mode: their losses draw noise or depend on the batch, and are refused."""

import inspect
from typing import Any

from fastvi._errors import DataError

# What libraries and their examples call the switch, and its value in evaluation.
EVALUATION = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
    "inference": True,
    "is_train": False,
}


def evaluation_option(model: Any) -> str | None:
    """Return the keyword that puts a call into evaluation mode, such as `train=False`, if any."""
    names = inspect.signature(model).parameters if callable(model) else {}
    found = [f"{name}={EVALUATION[name]}" for name in names if name in EVALUATION]
    return ", ".join(found) or None


def training_mode(what: str, change: str) -> DataError:
    """Return the error of a model in training mode.

    Args:
        what: What was seen, as a clause.
        change: The line to change, as a sentence.
    """
    return DataError(
        f"the model is in training mode: {what}, and the loss must be a function of parameters and "
        f"data alone. {change}"
    )
