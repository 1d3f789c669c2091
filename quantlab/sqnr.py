"""Signal-to-quantization-noise ratio of every site.

The float and the quantized program run on the same batch; at each quantized
site the products (with what is folded into them) and the weights are compared.
The noise of a product includes what earlier sites have done to its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from quantlab import rewrites
from quantlab.calibration.batches import checked
from quantlab.core import QTensor
from quantlab.graph import tracing
from quantlab.ptq.model import Quantized


class _Products:
  """Observer of the product and the weight of each chosen site."""

  def __init__(self, chosen: Iterable[str]):
    self.chosen = frozenset(chosen)

  def init(self, site):
    shared = {'while', 'cond'} & set(site.inside)
    steps = site.inside.count('scan') > len(site.loops)
    if site.id not in self.chosen or shared or steps:
      return None  # one site, many products: no single pair to compare
    stat: dict[str, Any] = {'out': jnp.zeros(site.out, site.out_dtype)}
    if site.side is not None:
      stat['weight'] = jnp.zeros(site.weight_shape, site.dtype)
    return stat

  def update(self, site, stat, lhs, rhs, out, state):
    new = {**stat, 'out': out}
    if 'weight' in stat:
      w = rhs if site.side == 'rhs' else lhs
      new['weight'] = w.dequantize() if isinstance(w, QTensor) else w
    return new

  def merge(self, site, a, b):
    raise TypeError('products of different calls are not merged')


def site_sqnr(
  apply: Callable, params: Any, model: Quantized, batches: Iterable[Any]
) -> dict[str, dict[str, jax.Array]]:
  """SQNR in dB of the products and the weights of each quantized site.

  Args:
    apply, params: the float model; for a model that transforms changed before
      it was encoded, the variables they left: what a site computes may have
      changed with them, the function has not.
    model: its quantized self.
    batches: re-iterable; one batch is often enough. All products of both
      programs on a batch are held at once.

  Returns:
    `{site: {'output': dB, 'weight': dB}}`, with the axes of the layer loops
    around the site. Sites in `while`, `cond` or a loop over time steps are
    left out: their product is not one array.
  """
  plan = model.plan
  observer = _Products(plan.quantized)
  plain = rewrites.observe(apply, observer, plan, quantize=False)
  coded = rewrites.observe(apply, observer, plan)
  tracer = tracing.Tracer(plan.inside(apply)[0], plan.captured)

  @jax.jit
  def powers(params, variables, args):
    weights = params['weights'] if rewrites.is_variables(params) else params
    traced, _, _ = tracer(plan.split(weights), args, {})
    sites = {s.id: s for s in traced.analysis.sites}
    _, float_stats = plain(params, *args)
    _, quant_stats = coded(variables, *args)
    return {
      k: _powers(sites[k], float_stats[k], quant_stats[k]) for k in float_stats
    }

  total = None
  for args in checked(batches):
    new = powers(params, model.params, args)
    total = new if total is None else jax.tree.map(jnp.add, total, new)
  return {
    k: {r: 10 * jnp.log10(p['signal'] / p['noise']) for r, p in v.items()}
    for k, v in (total or {}).items()
  }


def _powers(site, plain, coded):
  """Sums of squares of signal and noise over all but the loop axes."""
  loops = len(site.loops)
  found = {'output': _pair(plain['out'], coded['out'], loops)}
  if 'weight' in plain:
    found['weight'] = _pair(plain['weight'], coded['weight'], loops)
  return found


def _pair(a, b, loops):
  axes = tuple(range(loops, a.ndim))
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return {
    'signal': jnp.sum(a**2, axes),
    'noise': jnp.sum((a - b) ** 2, axes),
  }
