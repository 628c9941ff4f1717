"""The contract of a library of normalizing flows."""

import abc
import dataclasses

from fastvi._errors import ConfigError
from fastvi._typing import Array, Float, Key, PyTree

# Standard deviations of the base that splines reach: 2e-9 of a normal lies beyond. At half 0.3 %
# lies beyond, where a spline is the identity; at double half of the bins begin where no draw falls.
SPLINE_BOUND = 6.0


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Architecture of a normalizing flow.

    Attributes:
        template: "realnvp", "maf", "spline_coupling" or "nsf_ar".
        depth: Number of transforms.
        hidden: Widths of the conditioner's hidden layers.
        bins: Number of bins of a spline.
        init_scale: Scale of the initial weights; small values start near the identity.
    """

    template: str = "realnvp"
    depth: int = 4
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8
    init_scale: float = 1e-2

    @property
    def has_splines(self) -> bool:
        """Whether the transforms are splines."""
        return self.template in ("spline_coupling", "nsf_ar")


@dataclasses.dataclass(frozen=True)
class AbstractBackend(abc.ABC):
    """A flow of one dimension and configuration.

    Hashable and without arrays, its parameters explicit.

    Laws, tested for every backend and template: the draws of `sample_and_log_prob` have the density
    that it and `log_prob` both state, normalised; with `init_scale` 0 the flow starts as the
    standard normal; the draw is a smooth function of noise and parameters, and `log_prob` one of z.

    Attributes:
        dim: Latent dimensions.
        settings: Template, depth, widths, bins and scale of the initial weights.
    """

    dim: int
    settings: Architecture

    @abc.abstractmethod
    def init(self, key: Key) -> PyTree[Array]:
        """Draw parameters, floating-point arrays all of them."""

    @abc.abstractmethod
    def sample_and_log_prob(
        self, params: PyTree[Array], noise: Float[Array, "draws latent"]
    ) -> tuple[Float[Array, "draws latent"], Float[Array, " draws"]]:
        """Turn standard normals to draws with their log densities."""

    @abc.abstractmethod
    def log_prob(
        self, params: PyTree[Array], z: Float[Array, "draws latent"]
    ) -> Float[Array, " draws"]:
        """Evaluate the log density at z."""

    def require_one_width(self) -> None:
        """Refuse hidden layers of different widths.

        Raises:
            ConfigError: If they differ.
        """
        widths = self.settings.hidden
        if len(set(widths)) > 1:
            raise ConfigError(
                f"flow.hidden must name equal widths for this backend; got {widths}: use "
                f"{[max(widths)]}."
            )

    @property
    def width(self) -> int:
        """Return the width of the first hidden layer."""
        return self.settings.hidden[0]
