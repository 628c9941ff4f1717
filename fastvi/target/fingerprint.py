"""What a loss computes, found by tracing it.

Programs are shared by this, and not by which function it is.
"""

import dataclasses
import functools
import hashlib
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # pyright: ignore[reportPrivateImportUsage]

from fastvi.kernels.noise import streams
from fastvi.target.data import Problem
from fastvi.target.narrow import Use, uses_of_parameters
from fastvi.target.objective import (
    AbstractObjective,
    FlatObjective,
    call_full_loss,
    value_and_grad,
)
from fastvi.target.signature import computed_bytes

# Types whose repr says all of a value.
PLAIN = (type(None), bool, int, float, complex, str, bytes, np.dtype)
# Callables whose code and closure can be read.
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
# Operations with derivative rules of their own, which a gradient has applied.
WITH_RULES = ("custom_jvp_call", "custom_vjp_call")
# Bytes computed for a coordinate of a draw from q, of its density and of its gradient, by a mixture
# of a few components of a few factors.
DRAW_BYTES = 400.0


class Fingerprint(NamedTuple):
    """Equal where the same is computed.

    Attributes:
        digest: Of operations, shapes, and the contents of all arrays that are closed over.
        objects: What else is compared, and kept alive for that: callbacks and the like.
        is_traced: Whether values of an enclosing trace of jax are closed over; then nothing else is
            equal to it.
        is_narrow: Whether a number of 16 bits or fewer is computed with.
        uses: Of the parameters, where some are seen in half precision.
        computed: Bytes that loss and gradient compute for one example.
    """

    digest: str
    objects: tuple[Hashable, ...]
    is_traced: bool
    is_narrow: bool
    uses: tuple[Use, ...]
    computed: float

    def bytes_at_draw(self, dim: int, examples: int) -> float:
        """Count the bytes computed to draw from q, and to evaluate so many examples there."""
        return DRAW_BYTES * dim + self.computed * examples


class Identity:
    """Compare by identity, for values that cannot be compared by content."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Identity) and self.value is other.value


def fingerprint_loss(
    objective: FlatObjective, problem: Problem, loss_full_flat: Callable[..., Any] | None = None
) -> Fingerprint:
    """Trace loss and gradient on a minibatch, and the loss of all data where there is one.

    State that the functions read counts as it is now: attributes, globals, arrays changed in place.
    What jax itself keeps traced, such as a function under `jax.jit`, is seen as jax sees it.

    Cost:
        A trace of the gradient; each array that is closed over is read once.
    """
    ours = isinstance(objective, AbstractObjective)  # one method says all of these

    def of_batch(w, batch):
        others = () if ours else (objective.loss(w, batch), objective.grad(w, batch))
        return value_and_grad(objective, w, batch), others

    # Shapes are enough for a trace: no example is read.
    batch = jax.eval_shape(problem.next_batch, streams.shared_key())
    w = jax.eval_shape(lambda: problem.posterior.center)
    sizes = [array.size for array in jax.tree_util.tree_leaves(w)]
    reader = _Reader()
    traced = jax.make_jaxpr(of_batch)(w, batch)
    reader.value(traced)
    if loss_full_flat is not None:
        data = jax.eval_shape(lambda: problem.data.examples)
        of_data = functools.partial(call_full_loss, loss_full_flat)
        reader.value(jax.make_jaxpr(of_data)(w, data))
    return Fingerprint(
        reader.digest.hexdigest(),
        tuple(reader.objects),
        reader.is_traced,
        reader.is_narrow,
        uses_of_parameters(traced.jaxpr, sizes) if reader.is_narrow else (),
        computed_bytes(traced.jaxpr) / problem.batch_size,
    )


def shapes_of(arrays: Any) -> Hashable:
    """Return structure, shapes and dtypes of a pytree: programs depend on them and the loss."""
    leaves, treedef = jax.tree_util.tree_flatten(arrays)
    return treedef, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


class _Reader:
    """Collects what makes up a fingerprint."""

    def __init__(self):
        self.digest = hashlib.blake2b(digest_size=20)
        self.objects: list[Hashable] = []
        self.is_traced = self.is_narrow = False
        # A function that calls itself holds itself in its closure, and is read once.
        self._functions: set[int] = set()

    def text(self, *parts: Any) -> None:
        """Add something that its repr says all of."""
        self.digest.update(repr(parts).encode())

    def value(self, value: Any) -> None:
        """Add the parameter of an operation, or an object that a function closes over."""
        if isinstance(value, PLAIN):
            self.text(type(value).__name__, value)
        elif isinstance(value, ClosedJaxpr):
            self.operations(value.jaxpr, value.consts)
        elif isinstance(value, Jaxpr):
            self.operations(value, ())
        elif isinstance(value, (tuple, list)):
            self.text(type(value).__name__, len(value))
            for one in value:
                self.value(one)
        elif isinstance(value, jax.core.Tracer):
            self.is_traced = True
        elif _is_array(value):
            self.text(_content(value))
        elif isinstance(value, FUNCTIONS):
            self.function(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            self.text(type(value).__qualname__)
            for field in dataclasses.fields(value):
                self.value(getattr(value, field.name))
        else:
            self.object(value)

    def object(self, value: Any) -> None:
        """Add something to compare as it is."""
        self.objects.append(value if _has_equality(value) else Identity(value))

    def operations(self, jaxpr: Any, consts: Any) -> None:
        """Add a program.

        Its operations with the variables numbered, and the arrays it closes over.
        """
        # Each trace has variables of its own: their numbers agree, in order of appearance.
        numbers: dict[Any, int] = {}

        def variables(atoms) -> list:
            return [
                _content(atom.val)
                if isinstance(atom, Literal)
                else (numbers.setdefault(atom, len(numbers)), atom.aval)
                for atom in atoms
            ]

        self.text(variables(jaxpr.constvars), variables(jaxpr.invars))
        for const in consts:
            self.value(const)
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            self.text(name, variables(equation.invars), variables(equation.outvars))
            self.is_narrow |= any(map(_is_narrow, (*equation.invars, *equation.outvars)))
            # A derivative rule is a new object in each trace, and the gradient says what it does.
            for key, parameter in sorted(equation.params.items()):
                if not name.startswith(WITH_RULES) or isinstance(parameter, ClosedJaxpr):
                    self.text(key)
                    self.value(parameter)
        self.text(variables(jaxpr.outvars))

    def function(self, function: Any) -> None:
        """Add a function that runs on the host: its code and what it closes over."""
        if id(function) in self._functions:
            return
        self._functions.add(id(function))
        if isinstance(function, functools.partial):
            self.value((function.func, function.args, tuple(sorted(function.keywords.items()))))
        elif isinstance(function, types.MethodType):
            self.objects.append(Identity(function.__self__))
            self.value(function.__func__)
        else:
            self.objects += [function.__code__, Identity(function.__globals__)]
            held = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
            for one in (*held, *(cell.cell_contents for cell in function.__closure__ or ())):
                # by identity what may change before the function runs: arrays, lists
                self.value(one) if isinstance(one, PLAIN + FUNCTIONS) else self.object(one)


def _is_array(value: Any) -> bool:
    # jax 0.7 holds constants of a program in a class of its own, which numpy reads
    return isinstance(value, (jax.Array, np.ndarray, np.generic)) or hasattr(value, "__array__")


def _is_narrow(variable: Any) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 2


def _has_equality(value: Any) -> bool:
    if type(value).__eq__ is object.__eq__:
        return False
    try:
        hash(value)
    except TypeError:
        return False
    return True


# Digests of jax's arrays by id: they do not change, so each is copied to the host once.
_CONTENTS: dict[int, tuple[weakref.ref, str]] = {}


def _content(array: Any) -> str:
    """Digest an array; that of jax once only."""
    if not isinstance(array, jax.Array):
        return _digest(np.asarray(array))
    number = id(array)
    known, digest = _CONTENTS.get(number, (lambda: None, ""))
    # Python gives the number of an array that is gone to another one.
    if known() is array:
        return digest
    # A random key has no bytes of its own, and its type says which generator reads its words.
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(array) if is_key else array
    digest = f"{array.dtype}{_digest(jax.device_get(words))}"
    _CONTENTS[number] = weakref.ref(array, lambda _: _CONTENTS.pop(number, None)), digest
    return digest


def _digest(array: np.ndarray) -> str:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
    return f"{array.dtype}{array.shape}{hashlib.blake2b(data, digest_size=20).hexdigest()}"
