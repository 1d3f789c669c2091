"""What a page shows of the worst sites: distributions, and what ails them.

One batch goes through three programs: the float model, the float model as the
members of a chain that prepare left it, and the quantized model. Only what is
drawn or diagnosed leaves the device: counts, extremes and sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab import handlers, rewrites
from quantlab.core import scales
from quantlab.graph import tracing
from quantlab.ops import ConvDims, DotDims
from quantlab.plan import Plan
from quantlab.ptq import Quantized, statistics
from quantlab.ptq.hessian import input_rows
from quantlab.report import causes, sites

MOST = 12  # sites to look at
BINS = 61
_DRAWN = 4  # of the worst, whether they are bad or not
_IMAGES, _ROWS = 8, 2048  # enough for shares of the noise
_VANISHED = 1e-4  # of a channel's variance


class _Operands:
  """Observer: input, weight and output of some sites, one call of each."""

  def __init__(self, chosen: Mapping[str, Any], plan: Plan | None = None):
    self.chosen, self.plan = frozenset(chosen), plan

  def init(self, site):
    if site.id not in self.chosen:
      return None
    names = ['out', 'x'] if site.kind != 'gather' else ['out']
    names += ['w'] if site.side is not None else []
    names += ['seen'] if self._quantizes_input(site) else []
    weight_first = site.side == 'lhs'
    shapes = {'out': site.out, 'w': site.weight_shape}
    shapes['x'] = shapes['seen'] = site.rhs if weight_first else site.lhs
    return {k: jnp.zeros(shapes[k], jnp.float32) for k in names}

  def update(self, site, stat, lhs, rhs, out, state):
    x, w = (rhs, lhs) if site.side == 'lhs' else (lhs, rhs)
    found = {'out': out, 'x': x, 'w': w}
    if 'seen' in stat and self.plan:
      found['seen'] = handlers.as_seen(self.plan, site, x, state)
    return {k: _dense(found[k]) for k in stat}

  def merge(self, site, a, b):
    raise TypeError('operands of different calls are not merged')

  def _quantizes_input(self, site) -> bool:
    rule = self.plan.sites[site.id].rule if self.plan else None
    return rule is not None and rule.input is not None


def chosen(rows: Sequence[sites.SiteRow]) -> list[str]:
  """The sites worth looking at: those drawn and those that are bad."""
  worst = [*sites.worst_first(rows)[:_DRAWN], *causes.bad(rows)]
  return list(dict.fromkeys(r['site'] for r in worst))[:MOST]


def look(
  apply: Callable,
  params: Any,
  model: Quantized,
  batch: Any,
  noise: Mapping[str, Mapping[str, Any]],
  names: Sequence[str],
  prepared: Any = None,
) -> dict[str, dict[str, Any]]:
  """Distributions and statistics of some sites.

  Args:
    apply, params: the float model.
    model: its quantized self.
    batch: arguments without params, as calibration passes them.
    noise: SQNR by site; of a stack its worst layer is looked at.
    names: the sites, of which `noise` tells.
    prepared: variables of the float model as it was encoded, if a transform
      changed it.

  Returns:
    `{site: {'before', 'after': histograms of 'input' and 'weight',
    'statistics': see `causes.diagnose`}}`; 'after' where there is `prepared`.
  """
  layers = {k: _worst_layer(noise[k]['output']) for k in names}
  plain = rewrites.observe(apply, _Operands(layers), model.plan, quantize=False)
  coded = rewrites.observe(apply, _Operands(layers, model.plan), model.plan)
  tracer = tracing.Tracer(model.plan.inside(apply)[0], model.plan.captured)
  args = batch if isinstance(batch, tuple) else (batch,)

  @jax.jit
  def reduced(params, prepared, variables, args):
    found = _sites(tracer, model.plan.split(params), args)
    before = plain({'weights': params, 'sites': {}}, *args)[1]
    after = before if prepared is None else plain(prepared, *args)[1]
    last = coded(variables, *args)[1]
    out = {}
    for k, layer in layers.items():
      three = [_at(s[k], layer) for s in (before, after, last)]
      out[k] = _reduced(found[k], _group(model.plan, k), *three)
      if prepared is None:
        del out[k]['after']
    return out

  found = jax.device_get(reduced(params, prepared, model.params, args))
  ends = _ends(model.plan)
  out = {}
  for k, values in found.items():
    facts = _statistics(values['numbers']) | _quantizers(model.plan, k)
    facts |= {'layer': list(layers[k]), 'position': ends.get(k)}
    facts |= {'too_few_rows': _rows(model, k, layers[k])}
    out[k] = {'statistics': {n: v for n, v in facts.items() if v is not None}}
    for side in ('before', 'after'):
      if side in values:
        out[k][side] = _histograms(values[side])
  return out


def _sites(tracer, params, args):
  traced, _, _ = tracer(params, args, {})
  return {s.id: s for s in traced.analysis.sites}


def _dense(x: Any) -> jax.Array:
  return (x.dequantize() if hasattr(x, 'dequantize') else x).astype(jnp.float32)


def _at(stat, layer):
  return {k: v[layer] for k, v in stat.items()}


def _worst_layer(sqnr: Any) -> tuple[int, ...]:
  x = np.asarray(sqnr)
  return tuple(int(i) for i in np.unravel_index(np.argmin(x), x.shape))


def _reduced(site, group, before, after, coded) -> dict[str, Any]:
  """What is kept of one site, on the device."""
  numbers: dict[str, Any] = {}
  if isinstance(site.dims, DotDims | ConvDims) and site.side is not None:
    numbers |= _parts(site, after, coded)
    x = statistics.channel_rows(site, after['x'])
    numbers['in'] = jnp.max(jnp.abs(x), tuple(range(x.ndim - 1)))
    w, q = (site.dims.w_matrix(s['w']) for s in (after, coded))
    numbers['columns'], numbers['codes'] = (
      jnp.max(jnp.abs(m), -2).ravel() for m in (w, q)
    )
    numbers['tail'] = _tail(w, group)
    numbers['variance'], numbers['coded_variance'] = (
      jnp.var(site.dims.out_rows(s['out']), -2).ravel() for s in (after, coded)
    )
    numbers['inputs'] = jnp.asarray(w.shape[-2])
  elif 'w' in after:  # a lookup: what it reads is its product
    w, q = after['w'], coded['w']
    numbers['weight_sqnr'] = _decibel(jnp.sum(w**2), jnp.sum((w - q) ** 2))
  return {
    'numbers': numbers,
    'before': _counts(before),
    'after': _counts(after),
  }


def _parts(site, after, coded) -> dict[str, Any]:
  """SQNR in dB of the three parts of a product's noise, on some rows.

  x_q W_q - x W = (x' - x) W + (x_q - x') W + x_q (W_q - W)

  with x' what arrives and x_q what its quantizer makes of it. Each is compared
  with x W: the error of a weight alone says little, GPTQ's is large where its
  inputs are small.
  """
  x, arrived = (_rows_of(site, s['x']) for s in (after, coded))
  seen = _rows_of(site, coded['seen']) if 'seen' in coded else arrived
  w, q = (_columns(site, s['w']) for s in (after, coded))
  signal = _power(x, w)
  return {
    'arriving_sqnr': _decibel(signal, _power(arrived - x, w)),
    'input_sqnr': _decibel(signal, _power(seen - arrived, w)),
    'weight_sqnr': _decibel(signal, _power(seen, q - w)),
  }


def _rows_of(site, x):
  """Some of the rows (batch..., m, K) that the weight multiplies."""
  if isinstance(site.dims, ConvDims):
    return input_rows(site, _some(x, site.dims.lhs_spec[0]))
  rows = input_rows(site, x)
  return rows[..., :: max(1, rows.shape[-2] // _ROWS), :]


def _some(x, axis):
  return jax.lax.slice_in_dim(x, 0, min(_IMAGES, x.shape[axis]), axis=axis)


def _columns(site, w):
  """The weight as (batch..., K, N), the groups of a convolution in front."""
  w = site.dims.w_matrix(w)
  groups = site.dims.groups if isinstance(site.dims, ConvDims) else 1
  if groups == 1:
    return w
  return jnp.moveaxis(w.reshape(w.shape[0], groups, -1), 1, 0)


def _power(x, w):
  return jnp.sum(jnp.matmul(x, w, precision='highest') ** 2)


def _decibel(signal, noise):
  return 10 * jnp.log10(signal / noise)


def _tail(w, group):
  """Largest magnitude over standard deviation, the mean over all scales."""
  k, n = w.shape[-2:]
  if group == 'tensor':
    w = w.reshape(*w.shape[:-2], k * n, 1)
  elif group and k % group == 0:
    w = w.reshape(*w.shape[:-2], k // group, group, n)
  std = jnp.std(w, -2)
  return jnp.mean(jnp.max(jnp.abs(w), -2) / jnp.where(std > 0, std, jnp.inf))


def _counts(stat):
  names = {'x': 'input', 'w': 'weight'}
  return {
    name: jnp.histogram(stat[k].ravel(), bins=BINS)
    for k, name in names.items()
    if k in stat
  }


def _group(plan: Plan, name: str) -> int | str | None:
  """Elements of the contraction that share a scale; None: all of them."""
  rule = plan.sites[name].rule
  q = rule.weight if rule else None
  if q is None:
    return None
  block = q.block[0] if q.block else None
  return 'tensor' if q.per == 'tensor' else q.group or block


def _histograms(counts) -> dict[str, sites.Histogram]:
  return {
    k: {'edges': [float(f'{e:.6g}') for e in edges], 'counts': n.tolist()}
    for k, (n, edges) in counts.items()
    if np.isfinite(edges).all()
  }


def _statistics(numbers: Mapping[str, Any]) -> dict[str, Any]:
  """Numbers of one site as plain JSON."""
  out = {k: float(v) for k, v in numbers.items() if k.endswith('_sqnr')}
  if 'columns' not in numbers:
    return out
  columns, codes = numbers['columns'], numbers['codes']
  was, now = numbers['variance'], numbers['coded_variance']
  dead = (columns > 0) & (codes == 0)
  if dead.shape == was.shape:
    dead |= (was > 0) & (now < _VANISHED * was)
  return out | {
    'outlier': _spread(numbers['in']),
    'outlier_channel': int(np.argmax(numbers['in'])),
    'imbalance': _spread(columns),
    'tail': float(numbers['tail']),
    'channels': int(columns.size),
    'collapsed': int(np.sum(dead)),
    'inputs': int(numbers['inputs']),
  }


def _spread(x: np.ndarray) -> float:
  """The largest over the median of those that are not zero."""
  live = x[x > 0]
  return float(live.max() / np.median(live)) if live.size else 1.0


def _quantizers(plan: Plan, name: str) -> dict[str, Any]:
  rule = plan.sites[name].rule
  weight, given = (rule.weight, rule.input) if rule else (None, None)
  out: dict[str, Any] = {'input_bits': given.bits if given else None}
  if weight is None:
    return out
  plain = isinstance(weight.scale, scales.absmax | scales.minmax)
  return out | {
    'weight_bits': weight.bits,
    'weight_per': weight.per,
    'weight_grouped': bool(weight.group or weight.block),
    'weight_searched': not plain,
  }


def _ends(plan: Plan) -> dict[str, str]:
  """The first and the last product with a weight; few products have no ends."""
  names = [
    k
    for k, s in plan.sites.items()
    if s.derivation != 'activations' and s.kind != 'gather'
  ]
  return {names[0]: 'first', names[-1]: 'last'} if len(names) > 2 else {}


def _rows(model: Quantized, name: str, layer: Sequence[int]) -> int | None:
  """Rows of calibration of a weight, where its encoder found them too few."""
  facts = model.report.get('weights', {})
  suffix = ''.join(f'[{i}]' for i in layer)
  for path in (name, *model.plan.sites[name].paths):
    mine = facts.get(path + suffix, {})
    if 'warning' in mine:
      return mine['rows']
  return None
