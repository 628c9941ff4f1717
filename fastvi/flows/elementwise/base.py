"""The contract of a bijection of numbers whose parameters a network gives."""

import abc

import equinox as eqx
import numpy as np

from fastvi._typing import Array, Float


class AbstractElementwise(eqx.Module):
    """An increasing map of the real line, applied to every entry of an array.

    Each entry has parameters of its own. Laws: `inverse` undoes `forward`; the second value is the
    log of the derivative; with raw parameters equal to `identity()`, or a gate of 0, the map is the
    identity.
    """

    @property
    @abc.abstractmethod
    def num_params(self) -> int:
        """Count the raw parameters of one number's map."""

    @abc.abstractmethod
    def identity(self) -> np.ndarray:
        """Return the raw parameters, shape (num_params,), of the identity."""

    def seen(self, features: Float[Array, "rows size"]) -> Float[Array, "rows size"]:
        """Return what a network that gives raw parameters sees of other features.

        All of them as they are.
        """
        return features

    @abc.abstractmethod
    def forward(
        self,
        raw: Float[Array, "params rows size"],
        x: Float[Array, "rows size"],
        gate: Float[Array, " _"] | None,
    ) -> tuple[Float[Array, "rows size"], Float[Array, "rows size"]]:
        """Return y and log dy/dx."""

    @abc.abstractmethod
    def inverse(
        self,
        raw: Float[Array, "params rows size"],
        y: Float[Array, "rows size"],
        gate: Float[Array, " _"] | None,
    ) -> tuple[Float[Array, "rows size"], Float[Array, "rows size"]]:
        """Return x and log dx/dy."""
