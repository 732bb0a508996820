"""Floating-point operations of a program, counted from its trace: nothing is compiled or run.

Matrix products and convolutions count, two operations for each product that is added up, as
papers and PyTorch's counter count them; everything else is little beside them. A convolution's
padding counts as if it were image, and the zeros between the rows of a strided one's gradient do
not.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr


def of_call(function: Callable, *arguments: Any) -> int:
    """Operations of one call of a jitted function, on all devices together.

    The trace is the one that the call itself makes, or finds, so that it takes no time of its own.
    Results that nobody uses do not count, as compilers leave them out.
    Of what depends on the device as it computes the same, the form for any device counts; of other
    branches, the largest. The body of a loop whose length is data, as that of `qmx.train.make_step`
    over `Rows` is, counts once.

    Args:
      function: from `jax.jit`.
      arguments: arrays, or their shapes and types.
    """
    return of_jaxpr(function.trace(*arguments).jaxpr.jaxpr)  # type: ignore[attr-defined]


def of_jaxpr(jaxpr: Jaxpr) -> int:
    """The same of a trace."""
    total = 0
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    for equation in used.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _of_product(equation)
        elif name == "conv_general_dilated":
            total += _of_convolution(equation)
        elif name == "cond":
            branches = [of_jaxpr(branch.jaxpr) for branch in params["branches"]]
            by_device = params.get("branches_platforms")  # the form for any stands last, as None
            total += branches[-1] if by_device and by_device[-1] is None else max(branches)
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(map(of_jaxpr, _inner(params)))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The traces within an equation: of a jitted function, a loop, a rule for gradients."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


def _of_product(equation: Any) -> int:
    (summed, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in summed)


def _of_convolution(equation: Any) -> int:
    numbers, params = equation.params["dimension_numbers"], equation.params
    image, kernel = (one.aval.shape for one in equation.invars)
    result = equation.outvars[0].aval.shape
    _, channels, *window = (kernel[axis] for axis in numbers.rhs_spec)
    places = [
        # Each pixel meets the whole window where zeros lie between them.
        image[before] if dilation > 1 else result[after]
        for before, after, dilation in zip(
            numbers.lhs_spec[2:], numbers.out_spec[2:], params["lhs_dilation"], strict=True
        )
    ]
    batch, features = (result[axis] for axis in numbers.out_spec[:2])
    return 2 * batch * features * channels * math.prod(places) * math.prod(window)
