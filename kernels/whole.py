"""Calls that keep their rule of differentiation in a scan.

Reverse mode splits the body of a scan twice, into what is known and what is
linear, and then into what the loop changes and what it does not. The second
split replaces a `jax.custom_jvp` by the function inside, whose own derivative
may be zero, or absent. Who differentiates the result once more would get that
one. A primitive is not opened. JAX 0.12 does not need this.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir

_whole = jex_core.Primitive('whole')
_whole.multiple_results = True


def whole(f: Callable, *args: Any) -> Any:
  """Returns f(*args), as one operation to what does not differentiate it.

  Args:
    f: a function of arrays; its derivatives are those that it has. Without
      collectives over an axis that `vmap` names: a batch is traced without.
    args: trees of arrays.
  """
  leaves, tree = jax.tree.flatten(args)
  flat = lambda *leaves: f(*jax.tree.unflatten(tree, leaves))  # noqa: E731
  closed, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
  y = _whole.bind(
    *closed.consts, *leaves, jaxpr=closed.jaxpr, constants=len(closed.consts)
  )
  return jax.tree.unflatten(jax.tree.structure(shape), y)


def jvp_along(
  f: Callable,
  primals: Sequence[Any],
  tangents: Sequence[Any],
  varies: Sequence[bool],
) -> tuple[Any, Any]:
  """`jax.jvp` along some of the arguments; the others are constants."""

  def partly(*varied):
    it = iter(varied)
    pairs = zip(primals, varies, strict=True)
    return f(*[next(it) if v else x for x, v in pairs])

  at, along = (list(itertools.compress(a, varies)) for a in (primals, tangents))
  return jax.jvp(partly, at, along)


def _run(*args, jaxpr, constants):
  closed = jex_core.ClosedJaxpr(jaxpr, args[:constants])
  return jex_core.jaxpr_as_fun(closed)(*args[constants:])


@_whole.def_abstract_eval
def _shapes(*args, jaxpr, constants):
  del args, constants
  return [v.aval for v in jaxpr.outvars]


def _jvp(primals, tangents, **params):
  varies = [not isinstance(t, ad.Zero) for t in tangents]
  run = functools.partial(_run, **params)
  y, dy = jvp_along(run, primals, tangents, varies)
  still = jax.dtypes.float0
  return y, [
    ad.Zero(jax.typeof(a).to_tangent_aval()) if b.dtype == still else b
    for a, b in zip(y, dy, strict=True)
  ]


def _batched(args, axes, **params):
  run = jax.vmap(functools.partial(_run, **params), axes)
  y = whole(run, *args)
  return y, [0] * len(y)


_whole.def_impl(_run)
ad.primitive_jvps[_whole] = _jvp
batching.primitive_batchers[_whole] = _batched
mlir.register_lowering(_whole, mlir.lower_fun(_run, multiple_results=True))
