"""What becomes of one product: the handlers of the one rewrite.

`computing` leaves it in float, `simulating` fake-quantizes its operands,
`deploying` runs it on codes, `observing` adds statistics to any of them (see
`quantlab.graph.rewrite.Handler`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from quantlab import ops
from quantlab.core import QParams, QTensor
from quantlab.graph import rewrite
from quantlab.graph.sites import Site
from quantlab.plan import Plan
from quantlab.recipe import Rule


class Observer(Protocol):
  """Statistics of a site as a streamed monoid."""

  def init(self, site: Site) -> Any:
    """The identity (arrays), or None to leave the site out."""

  def update(
    self, site: Site, stat: Any, lhs: Any, rhs: Any, out: Any, state: Any
  ) -> Any:
    """Adds one evaluation of the product; `state` is the site's own."""

  def merge(self, site: Site, a: Any, b: Any) -> Any:
    """Combines two statistics; associative, `init` is its identity."""


def _qparams(state: Mapping[str, Any], role: str) -> QParams | None:
  found = state.get(role)
  return None if not found or 'scale' not in found else QParams(**found)


def _need(site, role, quantizer, state) -> QParams | None:
  """Calibrated parameters of a static quantizer."""
  found = _qparams(state, role)
  if quantizer.static and found is None:
    raise ValueError(
      f'the {role} of site {site.id!r} has a static quantizer {quantizer!r}, '
      'but the variables hold no calibrated range for it; calibrate with '
      'ql.ptq(...) and pass its params'
    )
  return found if quantizer.static else None


def _shifted(site, out, state):
  """The product with the shift of a folded map, and its own bias, added."""
  shift = state.get('fold', {}).get('shift')
  if shift is not None:
    shape = [1] * out.ndim
    shape[site.fold.axis] = -1
    out = out + shift.reshape(shape).astype(out.dtype)
  if 'bias' in state:
    out = ops.add_bias(out, site.dims, state['bias'])
  return out


def _output(site, rule, out, state):
  """The product with its shift added, quantized if the rule says so."""
  out = _shifted(site, out, state)
  if rule is None or rule.output is None:
    return out
  given = _need(site, 'output', rule.output, state)
  bits = state.get('output', {}).get('bits')
  return ops.fake_quantize_activation(
    out, rule.output, site.dims, 'output', given, bits
  )


def as_seen(plan: Plan, site: Any, x: Any, state: Mapping[str, Any]) -> Any:
  """The input of a site as its weight meets it: simulated, if quantized."""
  rule = plan.sites[site.id].rule
  if rule is None or rule.input is None:
    return x
  given = _need(site, 'input', rule.input, state)
  return ops.fake_quantize_activation(
    x, rule.input, site.dims, 'input', given, state.get('input', {}).get('bits')
  )


def computing(site, lhs, rhs, default, state):
  """The float product, with what is folded into it."""
  return _shifted(site, default(lhs, rhs), state), None


def simulating(plan: Plan) -> rewrite.Handler:
  """Fake quantization of every operand; differentiable (straight-through).

  Parameters that are stored as codes are simulated where they are stored, see
  `fake_quantized`; here come activations and effective weights.
  """

  def handler(site, lhs, rhs, default, state):
    rule = plan.sites[site.id].rule or Rule()
    operands = {'lhs': lhs, 'rhs': rhs}
    roles = {'lhs': 'lhs', 'rhs': 'rhs'}
    if site.side is not None:
      del roles[site.side]
      roles = dict.fromkeys(roles, 'input')
      if site.id in plan.effective and rule.weight is not None:
        bits = state.get('weight', {}).get('bits')
        operands[site.side] = ops.fake_quantize_weight(
          operands[site.side], rule.weight, site.dims, bits
        )
    for operand, role in roles.items():
      quantizer = getattr(rule, role)
      if quantizer is not None:
        operands[operand] = ops.fake_quantize_activation(
          operands[operand],
          quantizer,
          site.dims,
          role,
          _need(site, role, quantizer, state),
          state.get(role, {}).get('bits'),
        )
    out = default(operands['lhs'], operands['rhs'])
    return _output(site, rule, out, state), None

  return handler


def deploying(plan: Plan | None, *, integer: bool = True) -> rewrite.Handler:
  """Products on codes, with low-bit kernels where the plan says so.

  Args:
    plan: what is quantized.
    integer: False computes what they compute on floats: differentiable
      (straight-through) in what flows in.
  """

  def handler(site, lhs, rhs, default, state):
    known_site = plan.sites.get(site.id) if plan is not None else None
    rule = known_site.rule if known_site is not None else None
    return _output(
      site, rule, _product(rule, site, lhs, rhs, default, state, integer), state
    ), None

  return handler


def _product(rule, site, lhs, rhs, default, state, integer):
  """A product on codes, as its rule says."""
  if site.kind == 'gather' and isinstance(lhs, QTensor):
    return ops.embed(lhs, rhs, site.dims)
  if rule is None:
    lhs, rhs = (
      v.dequantize() if isinstance(v, QTensor) else v for v in (lhs, rhs)
    )
    return default(lhs, rhs)
  if site.side is None:
    given = {
      r: _need(site, r, q, state)
      for r, q in rule.quantizers.items()
      if r in ('lhs', 'rhs')
    }
    return ops.activation_product(
      site, lhs, rhs, rule, given, default, integer=integer
    )
  qparams = None
  if rule.input is not None:
    qparams = _need(site, 'input', rule.input, state)
  return ops.product(
    site, lhs, rhs, rule.input, qparams, default, integer=integer
  )


def observing(observer: Observer, inner: rewrite.Handler) -> rewrite.Handler:
  """Statistics of every product, computed as `inner` computes it."""

  def handler(site, lhs, rhs, default, state):
    out, _ = inner(site, lhs, rhs, default, state)
    stat = observer.init(site)
    if stat is not None:
      stat = observer.update(site, stat, lhs, rhs, out, state)
    return out, stat

  return handler
