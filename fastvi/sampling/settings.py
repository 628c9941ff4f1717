"""Settings of the sampler: every number that trades memory, time or bias."""

import dataclasses

STARTS = ("auto", "fit", "localizer")
# The estimates of a gradient, and where walkers that step by them begin.
START_OF_GRADIENTS = {
    "auto": "auto",
    "fresh": "localizer",
    "anchored": "localizer",
    "blocks": "fit",
    "full": "fit",
}


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """What a run of the sampler may spend, and how exact its dynamics are.

    A *round* is the part of a run that one call of a compiled program makes: `bins * bin_length`
    steps of every walker. A *fidelity* is the number of blocks that the data are split into and the
    energy error that steps are held to. Only `bins`, `bin_length` and `max_columns` shape compiled
    programs, and `start` chooses between two sets; a change of any other field compiles nothing.

    Attributes:
        start: Where walkers begin. "fit": at draws of a fitted q. "localizer": at draws of the
            localizer, in coordinates that a few gradients measure. Such a walk uses fresh
            minibatches, without a fit or a pass over the data. "auto": at the localizer if the
            posterior is not stiff in its coordinates, and if the budget, or many dimensions with
            weights that are not very uneven, speak against a fit.
        gradients: What a step takes the gradient of. "fresh": a minibatch drawn anew. "anchored":
            the same, less its gradient at w* and with that of all data there in its place.
            "blocks": one of the blocks that the data are split into, anchored in the same way at
            the mean of the walkers. "full": all data. "auto": what a measurement of noise and
            curvature finds cheapest. "fresh" and "anchored" are for walks from the localizer,
            "blocks" and "full" for walks from a fit. If one is named and no method, the method is
            "sample".
        walkers: Least number of walkers of a run, rounded up to a multiple of the chains. Half of
            them doubles the steps for the same error. Twice as many burn in twice as many starts.
        walkers_in_few_dimensions: Times as many walkers, at most, in fewer than 32 dimensions.
            There gradients are cheap and arms of the posterior narrow. At half, arms are visited
            half as often. At double, a first round takes twice the work.
        friction_time: Time after which momentum is forgotten, in standard deviations of q. At half,
            walkers diffuse where they could fly. At double, the bias by gradient noise doubles.
        widest: Posterior width, over that of q, up to which friction time grows with it. At half,
            posteriors 8 times as wide as q take longer to cross. At double, 16 times as wide ones
            are crossed sooner.
        energy_error: Mean square of a step's energy error while walkers burn in, in nats^2 per
            effective dimension. Step sizes grow as its sixth root: half shortens steps by 11 %,
            double lengthens them by 12 % and adds a quarter to their bias.
        precise_energy_error: The same for the steps that are averaged, at a relative error of 2 %.
            It scales as the cube of the relative error, and never exceeds `energy_error`.
        max_blocks: Blocks that the data are split into, at most. At half, a step on a million
            examples costs twice as much where noise would allow more; at double, it costs half.
        min_block: Least number of examples of a block. A step takes two blocks. At half, steps on
            few data cost half and are noisier. At double, the reverse.
        table_floats: Bound on the numbers in a table of block gradients, `blocks * dim`: 64 MiB. A
            measurement of the noise holds two. At half, half the memory and larger blocks in many
            dimensions. At double, the reverse.
        coordinates_per_fge: Coordinates that walkers may move for each full gradient of the budget.
            It bounds the time where gradients are cheap: ten minutes at 1e5 dimensions. At half,
            half the time. At double, twice.
        noise_points: Walkers at which the noise of gradients is measured before a run. At half, the
            measurement costs half and is noisier by 1.4. At double, the reverse.
        noise_share: What gradient noise might add to llc if nothing balanced it, over the error
            that was asked for. A tenth of it is doubted. At half, blocks are twice as large. At
            double, they are half as large, and more of llc's error is systematic.
        burn_in_noise: The same while walkers burn in, as a share of llc. At half, burn-in costs up
            to twice as much; at double, the walkers arrive too hot.
        burn_in_change: Change of llc from the second third of the burn-in to the last, relative to
            llc, that ends it. At half, burn-in lasts longer; at double, exact gradients do more of
            it.
        max_burn_in: Rounds of burn-in on noisy gradients, at most. At half and double: the same,
            for walkers that have not arrived by then.
        max_refinements: Times, at most, that the dynamics are made more exact where the control
            variates see a bias. At half, more of the bias is left; at double, more rounds are
            thrown away.
        bins: Records that a round keeps of each walker. At half, the host looks twice as often; at
            double, half as often.
        bin_length: Steps averaged in a record. At half, records are twice as many and more alike;
            at double, the error is read from half as many.
        min_bins: Records of each walker, at least, before a run may end. At half, errors of short
            runs are trusted sooner; at double, every run is at least twice as long.
        max_columns: Blocks of parameters with a control variate of their own, at most. At half,
            the variance is reduced less; at double, regressions need twice the records.
    """

    start: str = "auto"
    gradients: str = "auto"
    walkers: int = 8
    walkers_in_few_dimensions: int = 16
    friction_time: float = 2.0
    widest: float = 8.0
    energy_error: float = 5e-4
    precise_energy_error: float = 2e-4
    max_blocks: int = 2**14
    min_block: int = 8
    table_floats: int = 2**24
    coordinates_per_fge: float = 2e5
    noise_points: int = 4
    noise_share: float = 4.0
    burn_in_noise: float = 0.2
    burn_in_change: float = 0.1
    max_burn_in: int = 20
    max_refinements: int = 3
    bins: int = 4
    bin_length: int = 4
    min_bins: int = 8
    max_columns: int = 12

    @property
    def chosen_start(self) -> str:
        """Where walkers begin, which gradients that are named decide."""
        return self.start if self.start != "auto" else START_OF_GRADIENTS[self.gradients]

    @property
    def named_start(self) -> str:
        """What says where walkers begin, as a person writes it."""
        if self.gradients != "auto":
            return f"sampler.gradients={self.gradients!r}"
        return f'sampler.start="{self.start}"'

    @property
    def round_length(self) -> int:
        """Count the steps of a round."""
        return self.bins * self.bin_length
