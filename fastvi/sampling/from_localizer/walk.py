"""The walk: burn in, step, average, and end when the error is small."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._devices import host_row, on_host
from fastvi._errors import ConfigError, DataError
from fastvi._typing import Float
from fastvi.sampling.averages import SURPRISE, Analysis, analyse, furthest_off, standard_error
from fastvi.sampling.dynamics import Evaluation, State
from fastvi.sampling.from_localizer.batches import AbstractSource, Reading, WeightSums
from fastvi.sampling.from_localizer.measure import (
    PROBE_STEPS,
    measure_curvature,
    measure_decrement,
    measure_heat,
    standard_normals,
)
from fastvi.sampling.from_localizer.plan import (
    DOUBT_SHARE,
    LARGEST_STEP,
    TINY,
    Measured,
    heat_share,
    noise_heat,
    plan_parts,
    plan_step,
    round_scale,
    seen_heat,
)
from fastvi.sampling.from_localizer.setup import (
    Course,
    WalkSetup,
    affordable_steps,
    call_round,
    deal_course,
)
from fastvi.sampling.from_localizer.steps import Observed, Steps, blank, blank_state, fill, put_row
from fastvi.sampling.keeping import NO_KEEPER, AbstractWalkKeeper
from fastvi.sampling.run import CHECK_GROWTH, ERROR, TAKEN_BACK, Check, Unmet, unmet_by
from fastvi.target.work import GRADIENT

# Time that walkers take to forget where they began, in the same unit. At half, llc still falls or
# rises by a few per cent afterwards; at double, a short budget buys nothing else.
BURN_IN_TIME = 3.0
# Stiffness from which on the coordinates of a fitted q pay for their fit.
MOST_STIFFNESS = 100.0
# Part of the budget after which a walk gives way to a fit, if llc may still be off by this share of
# it for directions that walkers have not filled. At half of the part, walks that take a while are
# given up; at double, twice as much is lost. At half of the share, walks are given up that settle;
# at double, some go on to the end of their budget and do not.
HOPELESS_SHARE, MOST_UNFILLED = 0.05, 0.25
# Part of the budget that measurements and burn-in may take together.
PREPARATION_SHARE = 0.5
# Steps that are averaged, at least, where the budget has to choose between steps and batches.
LEAST_STEPS = 24
# Times the fewest bins that a walk has before it may end by itself. Half of it stops at chance, as
# an error that is read from few bins is small now and then; double costs as much again.
PATIENCE = 2
# Doubt of the heat over what it may be, from which on batches are made larger. At 1, chance makes
# them so; at double, the doubt stays above the error that was asked for.
DOUBT_SLACK = 1.5
# Times as large, at most, that batches are made at once: rare examples are seen late and may say
# more than is so. At half, more steps are lost on the way; at double, steps may cost too much.
MOST_FINER = 16
# Share of steps taken back at which the step size is halved. Half of it halves after one in a
# hundred, double lets walkers stand still for a part of the time.
RETURNED = 0.02
# The same over a walk, above which it is said: a batch that throws a walker out is left out of what
# the walker samples. Half and double tell examples that are rarer, or no longer tell them.
MOST_TAKEN_BACK = 1e-3
# Step size at which halving ends: a target that takes back shorter steps has no finite region.
SHORTEST_STEP = 1e-3 * LARGEST_STEP
# Halvings of the distance from w* of a walker where the loss is not finite. Half of them do where
# a millionth of the width is finite, double look for less.
MOST_HALVINGS = 20
# Standard errors from which on the gradient at w* is not taken for zero.
CERTAIN = 3.0
# Part of the budget that the gradient on all data may take.
FULL_ANCHOR_SHARE = 0.35


class Walk(NamedTuple):
    """A finished walk.

    Attributes:
        check: Averages and criteria that are not met; `check.llc` are means over bins.
        measured: What was measured before.
        reference_loss: Mean of L_B(w*) over the batches.
        heat: What the noise of the gradients adds to llc, were the loss quadratic.
        batch: Examples of a walker's batch.
        step_size: The step.
        returned: Steps taken back, all walkers together.
        examples: Examples read.
        work: Sample gradients.
        least_budget: Sample gradients of a walk of the fewest bins.
        ended_early: Whether the data ended before the walk.
        course: Where it ended.
    """

    check: Check
    measured: Measured
    reference_loss: float
    heat: float
    batch: int
    step_size: float
    returned: float
    examples: int
    work: float
    least_budget: float
    ended_early: bool
    course: Course


class TooStiff(NamedTuple):
    """What was found where these coordinates are of no use: the stiffness, and the work it took.

    They are of none where the stiffness is large, and where walkers are slow to fill their width.
    """

    stiffness: float
    work: float


class BurningIn(NamedTuple):
    """A walk that burns in.

    Attributes:
        measured: What was measured before.
        course: The walk.
        start: State of the generator that draws where walkers begin.
        left: Steps that are left; None before walkers are where they begin.
    """

    measured: Measured
    course: Course
    start: Mapping[str, Any]
    left: int | None = None


class Coarse(NamedTuple):
    """What steps on smaller batches have said, until there are some on larger ones.

    Fields as in `Course`.
    """

    said: Steps
    parts: int
    heat: float


class Averaging(NamedTuple):
    """A walk whose steps are averaged.

    Attributes:
        measured: What was measured before.
        course: The walk.
        checked: How many of its steps had been made at the last look.
        coarse: What counts if the data end before a step on the present batches.
    """

    measured: Measured
    course: Course
    checked: int = 0
    coarse: Coarse | None = None


class KeptWalk(NamedTuple):
    """A walk after a round, or what it was given up for, and how far its data were read."""

    stage: BurningIn | Averaging | TooStiff
    reading: Reading


# What a walk that is kept is made of.
KEPT_OF_WALKS = (
    *(KeptWalk, BurningIn, Averaging, TooStiff, Coarse, Measured, Course, State, Evaluation),
    *(Observed, Steps, Reading, WeightSums),
)


def walk_from_localizer(
    setup: WalkSetup, keeper: AbstractWalkKeeper = NO_KEEPER
) -> Walk | TooStiff:
    """Walk until the error of llc is small, or the budget or the data are spent.

    A walk that was kept goes on.

    Raises:
        DataError: If the data end before a walk can begin.
    """
    kept = keeper.restore()
    if kept is not None:
        setup.reader.go_on(kept.reading)
        if isinstance(kept.stage, TooStiff):
            return kept.stage
        course = deal_course(kept.stage.course, setup.programs.layout)
        kept = kept._replace(stage=kept.stage._replace(course=course))
    stage = begin(setup) if kept is None else kept.stage
    if isinstance(stage, BurningIn):
        course = plan_batch(setup, burn_in(setup, stage, keeper))
        stage = Averaging(stage.measured, course)
    found = average(setup, stage, keeper) if isinstance(stage, Averaging) else stage
    if isinstance(found, TooStiff):
        _keep(setup, keeper, found, is_last=True)
    return found


def _keep(
    setup: WalkSetup,
    keeper: AbstractWalkKeeper,
    stage: BurningIn | Averaging | TooStiff,
    *,
    is_last: bool = False,
) -> None:
    keeper.save(KeptWalk, stage, setup.reader.reading, is_last=is_last)


def begin(setup: WalkSetup) -> BurningIn | TooStiff:
    """Measure, and plan the walk, or say that it is of no use."""
    rng = np.random.default_rng(setup.seed)
    # one state, of which all that is measured makes use: a second one may not fit the memory
    layout = setup.programs.layout
    state = blank_state(setup.shape, setup.dtype, layout)
    measured, state, work, examples = measure_curvature(setup, state, rng)
    if not measured.stiffness <= MOST_STIFFNESS and not setup.must_walk:
        return TooStiff(measured.stiffness, work)
    course = Course(
        state,
        round_scale(setup, measured.curvature),
        plan_step(measured.stiffness),
        work=work,
        examples=examples,
    )
    return BurningIn(measured, plan_anchor(setup, measured, course), rng.bit_generator.state)


def average(setup: WalkSetup, stage: Averaging, keeper: AbstractWalkKeeper) -> Walk | TooStiff:
    """Make steps until their average is good enough, on larger batches where need be.

    They are looked at where they have grown by `CHECK_GROWTH`, and where there can be no more.
    """
    measured, check = stage.measured, None
    while True:
        course, made = stage.course, _count_steps(stage.course)
        ends = bool(made) and setup.ends()
        goes_on = course.is_fed and affordable_steps(setup, course, 1) and not ends
        if made and not (goes_on and made < max(CHECK_GROWTH * stage.checked, stage.checked + 1)):
            check = check_steps(setup, course)
            setup.report(course.work, check.analysis.llc, check.analysis.llc_sem)
            if ends:
                break
            if not setup.must_walk and is_hopeless(setup, course, check):
                return TooStiff(measured.stiffness, course.work)
            parts = finer_parts(setup, course, check)
            if parts > course.parts:  # what hotter walkers said is not averaged with what follows
                assert course.said is not None, "a step has been made"
                coarse = Coarse(course.said, course.parts, course.heat)
                course = with_parts(course, parts)._replace(said=None)
                stage = Averaging(measured, course, 0, coarse)
                continue
            # the first look that says good enough is lucky more often than not
            is_long = check.llc.shape[1] >= PATIENCE * setup.settings.min_bins
            if (is_long and not check.unmet) or not math.isfinite(check.analysis.llc):
                break
            stage = stage._replace(checked=made)
        if not goes_on:
            break
        steps = affordable_steps(setup, course, setup.programs.length)
        stage = stage._replace(course=advance(setup, course, steps))
        _keep(setup, keeper, stage)
    # as it was before this look, which a walk that goes on from here takes again
    _keep(setup, keeper, stage, is_last=True)
    course = stage.course
    if course.said is None and stage.coarse is not None:
        # the data ended before the larger batches
        course = course._replace(**stage.coarse._asdict())
        check = check_steps(setup, course)
    if course.said is None or check is None:
        raise _cannot_begin(setup, course)
    return Walk(
        check,
        measured,
        float(np.mean(course.said.observed.reference)),
        course.heat,
        course.parts * setup.reader.part_size,
        course.step_size,
        float(course.said.returned.sum()),
        course.examples,
        course.work,
        least_budget(setup, course),
        not course.is_fed,
        setup.programs.layout.collect(course),
    )


def _count_steps(course: Course) -> int:
    """Count the steps that are averaged."""
    return 0 if course.said is None else course.said.returned.shape[0]


def _cannot_begin(setup: WalkSetup, course: Course) -> DataError | ConfigError:
    """Say what was missing for a single step that counts."""
    if course.is_fed:
        enough = setup.spent + 2 * course.work + setup.cost(LEAST_STEPS, 1)
        return ConfigError(
            f"budget={setup.spent + setup.budget:.4g} sample gradients pay for no walk: what is "
            f"measured before takes {setup.spent + course.work:.0f}. {enough:.0f} are enough."
        )
    return DataError(
        f"the data ended after {course.examples} examples, before the walk could begin. Give more "
        "examples, or hold them in memory as arrays."
    )


def draw_start(setup: WalkSetup, state: State, start: Mapping[str, Any]) -> State:
    """Draw positions and momenta in the place of those of a state, which is used up.

    `start` is the state of the generator, so that they can be drawn again.
    """
    rng = np.random.default_rng()
    rng.bit_generator.state = start
    return State(
        fill(state.position, standard_normals(setup, rng)),
        fill(state.momentum, standard_normals(setup, rng)),
        # a gradient that is not finite would be one in the next step
        state.here._replace(gradient=blank(state.here.gradient)),
    )


def burn_in(setup: WalkSetup, stage: BurningIn, keeper: AbstractWalkKeeper) -> Course:
    """Let walkers forget where they begin, with steps short enough that none is taken back.

    They begin anew where steps have to be shorter.
    """
    while True:
        if stage.left is None:
            state = draw_start(setup, stage.course.state, stage.start)
            course = _evaluate(setup, stage.course._replace(state=state, said=None))
            steps = math.ceil(BURN_IN_TIME / course.step_size)
            steps = affordable_steps(setup, course, steps, PREPARATION_SHARE)
            stage = stage._replace(course=course, left=steps)
        while stage.left and stage.course.is_fed and not setup.ends():
            course = advance(setup, stage.course, min(stage.left, setup.programs.length))
            left = stage.left - (course.done - stage.course.done)
            stage = stage._replace(course=course, left=left)
            _keep(setup, keeper, stage)
        course = stage.course
        is_stable = course.said is None or float(np.mean(course.said.returned)) <= RETURNED
        if is_stable or course.step_size < SHORTEST_STEP:
            return course
        halved = course._replace(step_size=course.step_size / 2)
        stage = stage._replace(course=halved, left=None)


def plan_anchor(setup: WalkSetup, measured: Measured, course: Course) -> Course:
    """Anchor batches at w* where that takes off more noise than the second gradient costs.

    The anchor is the gradient on all data where the budget pays for it. Else it is zero, as at a
    minimum, and a measurement says how far llc may be off for that. Named gradients are honoured.
    """
    wanted = setup.settings.gradients
    is_dear = measured.anchored_noise * setup.cost(1, 1, True) >= measured.noise * setup.cost(1, 1)
    is_raw = wanted == "fresh" or (is_dear and wanted != "anchored")
    course = course._replace(
        heat=noise_heat(measured.noise if is_raw else measured.anchored_noise, course.step_size)
    )
    if is_raw:
        return course
    if setup.full_gradient is not None and setup.num_data <= FULL_ANCHOR_SHARE * setup.budget:
        work = course.work + GRADIENT * setup.num_data
        anchor = setup.programs.layout.share(setup.full_gradient())
        return course._replace(anchor=anchor, work=work)
    course, decrement, error = measure_decrement(setup, course)
    if decrement > CERTAIN * error and wanted != "anchored":
        return course._replace(heat=noise_heat(measured.noise, course.step_size))
    zeros = jax.tree_util.tree_map(jnp.zeros_like, setup.posterior.center)
    anchor = setup.programs.layout.share(zeros)
    return course._replace(anchor=anchor, gradient_doubt=max(decrement, 0.0) + error)


def plan_batch(setup: WalkSetup, course: Course) -> Course:
    """Choose the batch by its heat, and drop what the burn-in said."""
    said = course.said
    course = course._replace(said=None)
    if said is None:
        return course
    half = said.observed.excess.shape[0] // 2
    llc = float(setup.posterior.nbeta) * float(np.mean(said.observed.excess[half:]))
    if course.work + setup.cost(4, 1, course.is_anchored) <= PREPARATION_SHARE * setup.budget:
        course = measure_heat(setup, course)
    most = affordable_steps(setup, course, setup.reader.most * LEAST_STEPS) // LEAST_STEPS
    wanted = DOUBT_SHARE * setup.error * abs(llc - course.heat)
    parts = plan_parts(course.heat, wanted, max(1, most))
    return course._replace(parts=parts, heat=course.heat / parts)


def with_parts(course: Course, parts: int) -> Course:
    """Go on with batches of so many parts, whose noise is so much less."""
    return course._replace(parts=parts, heat=course.heat * course.parts / parts)


def is_hopeless(setup: WalkSetup, course: Course, check: Check) -> bool:
    """Say whether it is time to know better, and walkers are far from filling their width.

    So are those that have come to where the loss is too stiff for their steps.
    """
    if course.said is None or course.work <= HOPELESS_SHARE * setup.budget:
        return False
    unfilled = check.analysis.parts.relaxation >= MOST_UNFILLED * abs(check.analysis.llc)
    return unfilled or float(np.mean(course.said.returned)) > RETURNED


def finer_parts(setup: WalkSetup, course: Course, check: Check) -> int:
    """Return the parts of a batch to go on with: more where the doubt of the heat asks for them.

    They must promise a smaller error than going on as before, though all steps so far are lost.
    """
    analysis = check.analysis
    wanted = DOUBT_SHARE * setup.error * abs(analysis.llc)
    heat, missed = known_heat(setup, course, 1.0)  # one rare example so far may be chance
    doubt = heat_share(heat, analysis.llc, missed)[1]
    if not doubt > DOUBT_SLACK * wanted:
        return course.parts
    parts = min(
        math.ceil(course.parts * min(doubt / max(wanted, TINY), MOST_FINER)), setup.reader.most
    )
    finer, made = with_parts(course, parts), check.llc.shape[1] * setup.settings.bin_length
    steps, ahead = (affordable_steps(setup, one, PROBE_STEPS) for one in (finer, course))
    if steps < LEAST_STEPS:
        return course.parts
    of_step2 = analysis.parts.statistical**2 * made
    now = of_step2 / (made + ahead) + doubt**2
    then = of_step2 / steps + (doubt * course.parts / parts) ** 2
    return parts if then < now else course.parts


def least_budget(setup: WalkSetup, course: Course) -> float:
    """Return the sample gradients of a walk with the fewest bins on these batches."""
    missing = max(0, setup.settings.min_bins * setup.settings.bin_length - _count_steps(course))
    return course.work + setup.cost(missing, course.parts, course.is_anchored)


def advance(setup: WalkSetup, course: Course, steps: int) -> Course:
    """Make so many steps of a round, or as many as one source serves."""
    steps = min(steps, max(1, setup.reader.most // course.parts))
    source = setup.reader.read(course.done, steps, course.parts)
    while source is None:  # the examples that are left may do for fewer steps, or smaller batches
        parts = course.parts if steps > 1 or course.said is not None else course.parts // 2
        steps = steps // 2 if steps > 1 else 1 if parts < course.parts else 0
        if steps * parts == 0:
            return course._replace(is_fed=False)
        course = with_parts(course, parts)
        source = setup.reader.read(course.done, steps, parts)
    course, said = _made(setup, course, source, 0, steps)
    said = _on_host(said, steps)
    return course._replace(said=said if course.said is None else _concatenate(course.said, said))


def _evaluate(setup: WalkSetup, course: Course) -> Course:
    """Evaluate the walkers where they are, nearer to w* where the loss is not finite there."""
    for halved in range(MOST_HALVINGS + 1):
        source = setup.reader.read(course.done, 1, course.parts)
        if source is None:
            return course._replace(is_fed=False)
        course = _made(setup, course, source, -1, 0)[0]
        state, observed = course.state, course.state.here.observed
        is_inside = np.isfinite(on_host(observed.virial) + on_host(observed.excess))
        if is_inside.all() or halved == MOST_HALVINGS:
            break
        position, gradient = state.position, state.here.gradient
        for walker in np.flatnonzero(~is_inside).astype(np.int32):
            row = host_row(position, int(walker))
            position = put_row(position, walker, row / 2)
            # one that is not finite would be one in the next step
            gradient = put_row(gradient, walker, jax.tree_util.tree_map(np.zeros_like, row))
        here = state.here._replace(gradient=gradient)
        course = course._replace(state=state._replace(position=position, here=here))
    return course


def _made(
    setup: WalkSetup, course: Course, source: AbstractSource, start: int, stop: int
) -> tuple[Course, Steps]:
    """Make steps, and count what they take."""
    state, said = call_round(setup, course, source, start, stop)
    steps = stop - start
    return course._replace(
        state=state,
        done=course.done + steps,
        work=course.work + setup.cost(steps, course.parts, course.is_anchored),
        examples=course.examples + setup.examples(steps, course.parts),
    ), said


def _on_host(steps: Steps, count: int) -> Steps:
    observed = Observed(*(np.asarray(leaf, float)[:count] for leaf in steps.observed))
    return Steps(observed, np.asarray(steps.returned, float)[:count])


def _concatenate(first: Steps, second: Steps) -> Steps:
    pairs = zip(first.observed, second.observed, strict=True)
    observed = Observed(*(np.concatenate(pair) for pair in pairs))
    return Steps(observed, np.concatenate([first.returned, second.returned]))


def known_heat(setup: WalkSetup, course: Course, errors: float = 0.0) -> tuple[float, float]:
    """Return the heat, and the part of it that was missed where it was measured.

    What the losses say counts less so many of its standard errors.
    """
    assert course.said is not None, "a step has been made"
    llc = float(setup.posterior.nbeta) * np.asarray(course.said.observed.excess)
    seen, error = seen_heat(llc, course.step_size, course.is_anchored)
    seen -= errors * error
    return max(course.heat, seen), max(seen - course.heat, 0.0)


def check_steps(setup: WalkSetup, course: Course) -> Check:
    """Average what the steps say, less a share of the heat, and hold it against the criteria."""
    assert course.said is not None, "a step has been made"
    observed, settings = course.said.observed, setup.settings
    length, nbeta = settings.bin_length, float(setup.posterior.nbeta)
    bins = max(1, observed.excess.shape[0] // length)
    first = max(0, observed.excess.shape[0] - bins * length)  # the first steps are left out first
    excess, radius2, virial = (
        np.asarray(leaf)[first:].reshape(bins, -1, leaf.shape[1]).mean(axis=1).T
        for leaf in (observed.excess, observed.radius2, observed.virial)
    )
    llc = nbeta * excess
    if not np.all(np.isfinite(llc)):
        broken = Analysis.broken(llc.shape[0])
        return Check(broken, llc, radius2, (Unmet(ERROR, math.nan, setup.error),))
    analysis = analyse(llc, np.zeros((*llc.shape, 0)), radius2)
    column = setup.shape[1] - virial[:, analysis.burn_in :, None]
    heat, missed = known_heat(setup, course)
    share, doubt = heat_share(heat, analysis.llc, missed)
    # fewer bins than asked for have not shown how long walkers remember
    few = math.sqrt(max(1.0, settings.min_bins / bins))
    parts = analysis.parts._replace(statistical=few * analysis.parts.statistical)
    analysis = dataclasses.replace(
        analysis,
        adjusted=analysis.adjusted - share,
        parts=parts.plus(
            relaxation=math.hypot(missing_width(column), excess_width(column, heat)),
            dynamics=doubt,
            evaluation=course.gradient_doubt,
        ),
        added=share,
        virial_z=furthest_off(column),
    )
    unmet = unmet_by(analysis, setup.error, 1.0, bins, settings)
    taken_back = float(np.mean(course.said.returned))
    if taken_back > MOST_TAKEN_BACK:
        unmet = (*unmet, Unmet(TAKEN_BACK, taken_back, MOST_TAKEN_BACK))
    return Check(analysis, llc, radius2, unmet)


def excess_width(column: Float[np.ndarray, "walkers bins 1"], heat: float) -> float:
    """Return the nats that walkers may have too many, as they began too wide and have not come in.

    A direction that is too wide by a share of its variance takes that share off the virial column
    of `missing_width`, and adds at most half of it to llc. The heat is known already.
    """
    return max(0.0, missing_width(-column) - max(heat, 0.0))


def missing_width(column: Float[np.ndarray, "walkers bins 1"]) -> float:
    """Return the nats that directions may lack which the walkers have not yet filled.

    The virial column `d - v . grad(-log p)` has mean zero under the posterior, and a direction that
    is too narrow by a share of its variance adds that share. It lacks half of it in llc, at most.
    """
    surplus = float(column.mean()) - SURPRISE * standard_error(column[:, :, 0])
    return 0.5 * max(0.0, surplus)
