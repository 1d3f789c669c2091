"""Peak memory of the activations, over the schedule of the traced program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from quantlab.graph import _jaxpr, tracing


class Peak(NamedTuple):
  """The most bytes alive at once.

  Attributes:
    nbytes: of all activations alive then.
    at: the operation that runs then, containers around it in front.
  """

  nbytes: int
  at: str


def peak_memory(
  apply: Callable,
  params: Any,
  *args: Any,
  bits: int | None = None,
  **kwargs: Any,
) -> Peak:
  """The most bytes of activations that are alive at once.

  The traced program is followed in its own order, one operation at a time, as
  an interpreter without fusion or reuse in place runs it. A value lives from
  the operation that makes it to the last that reads it, an argument from the
  start, a result to the end; while an operation runs its operands and results
  are both there. Parameters and closed-over arrays are not counted. Inside a
  scan one step's slices and results are alive beside the whole stacks.

  Args:
    apply: `apply(params, *args, **kwargs)`.
    params: parameters, or their shapes.
    *args: example arguments, or their shapes.
    bits: what a floating-point element takes; its own width by default.
    **kwargs: example keyword arguments.
  """
  if bits is not None and not bits > 0:
    raise ValueError(f'bits= takes a positive width, found {bits}')
  traced, _, _ = tracing.Tracer(apply)(params, args, kwargs)
  program = traced.program
  sizes = _Sizes(bits)
  fixed = {*program.jaxpr.invars[: program.num_params]}
  return _walk(program.jaxpr, fixed, sizes)


class _Sizes:
  """Bytes of values by their shape and type."""

  def __init__(self, bits: int | None):
    self.bits = bits

  def __call__(self, variables: Sequence[Any]) -> int:
    return sum(self.one(v.aval) for v in variables)

  def one(self, aval: Any) -> int:
    size, dtype = math.prod(aval.shape), aval.dtype
    if self.bits is not None and jnp.issubdtype(dtype, jnp.floating):
      return math.ceil(size * self.bits / 8)
    return size * getattr(dtype, 'itemsize', 1)


def _walk(jaxpr: Any, fixed: set[Any], sizes: _Sizes) -> Peak:
  """Peak of one body; `fixed` are inputs whose memory is someone else's."""
  held = {*fixed, *jaxpr.constvars}
  last = _last_reads(jaxpr)
  live = {v for v in jaxpr.invars if v not in held and v in last}
  best = Peak(sizes([*live]), 'the arguments')
  for i, eqn in enumerate(jaxpr.eqns):
    live |= {v for v in eqn.outvars if v not in held}
    now = sizes([*live])
    inside = _inside(eqn, sizes)
    name = eqn.primitive.name
    if inside is not None:
      now, name = now + inside.nbytes, f'{name}/{inside.at}'
    if now > best.nbytes:
      best = Peak(now, name)
    live = {v for v in live if last.get(v, -1) > i}
  return best


def _last_reads(jaxpr: Any) -> dict[Any, int]:
  """For each variable the last equation that reads it; the end for results."""
  last: dict[Any, int] = {}
  for i, eqn in enumerate(jaxpr.eqns):
    for v in eqn.invars:
      if not isinstance(v, _jaxpr.Literal):
        last[v] = i
  for v in jaxpr.outvars:
    if not isinstance(v, _jaxpr.Literal):
      last[v] = len(jaxpr.eqns)
  return last


def _inside(eqn: Any, sizes: _Sizes) -> Peak | None:
  """What the body of a container holds beside its operands and results."""
  bodies = [body for body, _ in _jaxpr.inner_jaxprs(eqn)]
  if not bodies:
    return None
  found = []
  for body in bodies:
    given = {*body.invars}
    if eqn.primitive.name == 'scan':
      # Slices of the stacks are copies: only constants and carries are not.
      given = {*body.invars[: sum(_jaxpr.scan_counts(eqn))]}
    elif eqn.primitive.name not in ('scan', 'while'):
      # The results of a call are its caller's, which counts them already.
      given |= {v for v in body.outvars if not isinstance(v, _jaxpr.Literal)}
    found.append(_walk(body, given, sizes))
  return max(found, key=lambda peak: peak.nbytes)
