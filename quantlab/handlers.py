"""What becomes of one product: the handlers of the one rewrite.

`computing` leaves it in float, `simulating` fake-quantizes its operands,
`deploying` runs it on codes, `observing` adds statistics to any of them (see
`quantlab.graph.rewrite.Handler`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from quantlab import core, ops
from quantlab.core import QParams, QTensor, Quantizer
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


class Simulate(Protocol):
  """How an operand is quantized in simulation."""

  def __call__(
    self,
    site: str,
    role: str,
    x: Any,
    quantizer: Quantizer,
    leaves: Mapping[str, Any],
    *,
    axis: int,
    shape: tuple[int, ...],
  ) -> Any:
    """Quantizes and dequantizes; differentiable.

    Args:
      site: its id.
      role: 'weight', 'input', 'lhs', 'rhs' or 'output'.
      x: weights (loops..., K, N) with axis=-2, else (loops..., rows, K).
      quantizer: of the role.
      leaves: its state.
      axis: the contraction axis.
      shape: of the operand in the axes of the product.
    """


# How a product of simulated operands is computed: `(site, lhs, rhs, default,
# state) -> out`, where `default(lhs, rhs)` is the product as it was traced.
Product = Callable[[Site, Any, Any, Callable, Mapping[str, Any]], Any]


def plainly(
  site: Site, lhs: Any, rhs: Any, default: Callable, state: Mapping[str, Any]
) -> Any:
  """The product as it was traced."""
  del site, state
  return default(lhs, rhs)


def straight_through(
  site: str,
  role: str,
  x: Any,
  quantizer: Quantizer,
  leaves: Mapping[str, Any],
  *,
  axis: int,
  shape: tuple[int, ...],
) -> Any:
  """The plain simulation: see `core.fake_quantize` for its derivative."""
  del shape
  given = _need(site, role, quantizer, {role: leaves})
  bits = leaves.get('bits')
  return core.fake_quantize(x, quantizer, given, axis=axis, bits=bits)


def _qparams(state: Mapping[str, Any], role: str) -> QParams | None:
  found = state.get(role)
  if not found or 'scale' not in found:
    return None
  return QParams(**{k: v for k, v in found.items() if k in QParams._fields})


def _need(site, role, quantizer, state) -> QParams | None:
  """Calibrated parameters of a static quantizer."""
  if not quantizer.static:
    return None
  found = _qparams(state, role)
  if found is None:
    raise ValueError(
      f'the {role} of site {site!r} has a static quantizer {quantizer!r}, '
      'but the variables hold no calibrated range for it; calibrate with '
      'ql.ptq(...) and pass its params'
    )
  return found


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


def _adapted(site, lhs, rhs, out, state):
  """The product with that of its adapter added."""
  if 'adapter' not in state:
    return out
  x = lhs if site.side == 'rhs' else rhs
  return ops.add_adapter(out, x, site.dims, site.weight_shape, state['adapter'])


def _output(site, rule, out, state, simulate):
  """The product with its shift added, quantized if the rule says so."""
  out = _shifted(site, out, state)
  if rule is None or rule.output is None:
    return out
  return _simulated(site, 'output', out, rule.output, state, simulate)


def _simulated(site, role, x, quantizer, state, simulate):
  """An operand of a product as `simulate` has it."""

  def f(matrix, axis):
    leaves = state.get(role, {})
    return simulate(
      site.id, role, matrix, quantizer, leaves, axis=axis, shape=x.shape
    )

  return ops.on_units(x, quantizer, site.dims, role, f)


def as_seen(plan: Plan, site: Any, x: Any, state: Mapping[str, Any]) -> Any:
  """The input of a site as its weight meets it: simulated, if quantized."""
  rule = plan.sites[site.id].rule
  if rule is None or rule.input is None:
    return x
  return _simulated(site, 'input', x, rule.input, state, straight_through)


def computing(site, lhs, rhs, default, state):
  """The float product, with what is folded into it."""
  out = _adapted(site, lhs, rhs, default(lhs, rhs), state)
  return _shifted(site, out, state), None


def simulating(
  plan: Plan, simulate: Simulate = straight_through, product: Product = plainly
) -> rewrite.Handler:
  """Simulated quantization of every operand; differentiable.

  Parameters that are stored as codes are simulated where they are stored, see
  `fake_quantized`; here come activations and effective weights.
  """

  def handler(site, lhs, rhs, default, state):
    rule = plan.sites[site.id].rule or Rule()
    operands = {'lhs': lhs, 'rhs': rhs}
    roles = {'lhs': 'lhs', 'rhs': 'rhs'}
    if site.side is not None:
      roles = {'lhs': 'input', 'rhs': 'input', site.side: 'weight'}
      if site.id not in plan.effective:
        del roles[site.side]
    for operand, role in roles.items():
      quantizer = getattr(rule, role)
      if quantizer is not None:
        operands[operand] = _simulated(
          site, role, operands[operand], quantizer, state, simulate
        )
    out = product(site, operands['lhs'], operands['rhs'], default, state)
    out = _adapted(site, lhs, rhs, out, state)
    return _output(site, rule, out, state, simulate), None

  return handler


def deploying(plan: Plan | None, *, integer: bool = True) -> rewrite.Handler:
  """Products on codes, with low-bit kernels where the plan says so.

  Args:
    plan: what is quantized.
    integer: False computes what they compute on floats. The derivatives of
      both are those of the floats, straight through what is rounded.
  """

  def handler(site, lhs, rhs, default, state):
    known_site = plan.sites.get(site.id) if plan is not None else None
    rule = known_site.rule if known_site is not None else None
    out = _product(rule, site, lhs, rhs, default, state, integer)
    out = _adapted(site, lhs, rhs, out, state)
    return _output(site, rule, out, state, straight_through), None

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
      r: _need(site.id, r, q, state)
      for r, q in rule.quantizers.items()
      if r in ('lhs', 'rhs')
    }
    return ops.activation_product(
      site, lhs, rhs, rule, given, default, integer=integer
    )
  qparams = None
  if rule.input is not None:
    qparams = _need(site.id, 'input', rule.input, state)
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
