"""Static activation ranges, streamed over calibration batches.

Pass one finds the extremes of every activation; ranges by percentile, squared
error or divergence need a second pass, which counts values in bins between
those extremes. Both statistics are monoids (max; sum), so that batches, devices
and reused layers merge exactly, and nothing of a batch is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab import core, rewrites
from quantlab.calibration import entropy
from quantlab.calibration.batches import checked
from quantlab.core import Quantizer, scales
from quantlab.plan import Plan

BINS = 2048


def extremes(x: jax.Array, axis: int | None = None) -> tuple[Any, Any]:
  """Smallest and largest value; infinite where one is NaN.

  XLA's minimum and maximum over an array pass over NaN on some platforms, and
  a range would look sound.
  """
  nan = jnp.isnan(x)
  lo = jnp.min(jnp.where(nan, -jnp.inf, x), axis)
  return lo, jnp.max(jnp.where(nan, jnp.inf, x), axis)


@dataclasses.dataclass(frozen=True)
class Extremes:
  """Smallest and largest value of the chosen operands of each site."""

  roles: Mapping[str, Iterable[str]]

  def init(self, site):
    if site.id not in self.roles:
      return None
    bound = jnp.float32(jnp.inf)
    return {r: {'lo': bound, 'hi': -bound} for r in self.roles[site.id]}

  def update(self, site, stat, lhs, rhs, out, state):
    new = {}
    for role in stat:
      x = operand(site, role, lhs, rhs, out).astype(jnp.float32)
      lo, hi = extremes(x)
      new[role] = {'lo': lo, 'hi': hi}
    return self.merge(site, stat, new)

  def merge(self, site, a, b):
    return {
      r: {
        'lo': jnp.minimum(a[r]['lo'], b[r]['lo']),
        'hi': jnp.maximum(a[r]['hi'], b[r]['hi']),
      }
      for r in a
    }


@dataclasses.dataclass(frozen=True)
class Histogram:
  """Counts of values in equal bins between known extremes.

  The extremes are state of each site: in a scanned stack they carry the layer
  axis, which the rewrite slices.
  """

  roles: Mapping[str, Iterable[str]]

  def init(self, site):
    if site.id not in self.roles:
      return None
    return {r: jnp.zeros((BINS,), jnp.float32) for r in self.roles[site.id]}

  def update(self, site, stat, lhs, rhs, out, state):
    new = {}
    for role in stat:
      x = operand(site, role, lhs, rhs, out)
      new[role] = self.count(x, state[role]['lo'], state[role]['hi'])
    return self.merge(site, stat, new)

  def count(self, x: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Histogram of one operand; a constant tensor falls into one bin."""
    width = jnp.where(hi > lo, hi - lo, 1) / BINS
    index = jnp.clip((x.astype(jnp.float32) - lo) / width, 0, BINS - 1)
    index = index.astype(jnp.int32).reshape(-1)
    return jnp.zeros((BINS,), jnp.float32).at[index].add(1.0)

  def merge(self, site, a, b):
    return jax.tree.map(jnp.add, a, b)


def operand(site: Any, role: str, lhs: Any, rhs: Any, out: Any) -> Any:
  """The array that a role of a site names."""
  if role == 'output':
    return out
  if role == 'input':
    return lhs if site.side == 'rhs' else rhs
  return lhs if role == 'lhs' else rhs


def calibrate(
  apply: Callable,
  params: Any,
  plan: Plan,
  batches: Iterable[Any],
  state: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, dict[str, jax.Array]]]:
  """Parameters of every static quantizer: {site: {role: {scale, ...}}}.

  Ranges are those of the float program, with the BatchNorms folded that the
  plan folds (what is then quantized is the folded product).

  Args:
    apply, params: the float model.
    plan: says which operands have static quantizers.
    batches: re-iterable calibration batches.
    state: of the sites: what transforms leave to be done at run time.

  Raises:
    ValueError: no batches, a batch of another shape, or values that are not
      finite (site and batch named).
  """
  static = plan.static
  if not static:
    return {}
  base = dict(state or {})
  extremes = stream(
    rewrites.observe(apply, Extremes(static), plan, quantize=False),
    {'weights': params, 'sites': base},
    batches,
    Extremes(static),
    watch=tuple(static),
  )
  _refuse_unseen(extremes)
  searched = {
    site: {r: q for r, q in roles.items() if _needs_counts(q)}
    for site, roles in static.items()
  }
  searched = {k: v for k, v in searched.items() if v}
  counts: dict[str, Any] = {}
  if searched:
    bounds = {
      k: {**base.get(k, {}), **{r: extremes[k][r] for r in v}}
      for k, v in searched.items()
    }
    counts = stream(
      rewrites.observe(apply, Histogram(searched), plan, quantize=False),
      {'weights': params, 'sites': {**base, **bounds}},
      batches,
      Histogram(searched),
    )
  return {
    site: {
      role: _fit(q, extremes[site][role], counts.get(site, {}).get(role))
      for role, q in roles.items()
    }
    for site, roles in static.items()
  }


def stream(observed, variables, batches, monoid, watch=()):
  """Merges the statistics of all batches; one jitted call a batch.

  Args:
    observed: what `rewrites.observe` returned.
    variables: its variables.
    batches: calibration batches.
    monoid: the observer.
    watch: sites with statistics {role: {'lo', 'hi'}} that must be finite.

  The first of the sites `watch` that sees a value that is not finite is named.
  """
  run = jax.jit(lambda v, args: observed(v, *args)[1])
  merge = jax.jit(lambda a, b: {k: monoid.merge(None, a[k], b[k]) for k in a})
  total = None
  for index, args in enumerate(checked(batches)):
    stats = run(variables, args)
    if watch:
      _refuse_nonfinite(stats, watch, index)
    total = stats if total is None else merge(total, stats)
  return total


def _refuse_nonfinite(stats, sites, index):
  stats = jax.device_get(stats)
  for site in sites:
    for role, found in stats[site].items():
      # An untaken branch leaves the identity: the range from inf to -inf.
      lo, hi = found['lo'], found['hi']
      unseen = (lo == np.inf) & (hi == -np.inf)
      if not (np.isfinite(lo) & np.isfinite(hi) | unseen).all():
        raise ValueError(
          f'calibration batch {index} gives values that are not finite (NaN '
          f'or infinity) in the {role} of site {site!r}; remove the batch, or '
          'leave the site in float'
        )


def _refuse_unseen(extremes):
  for site, roles in jax.device_get(extremes).items():
    for role, found in roles.items():
      if np.isinf(found['lo']).any():
        raise ValueError(
          f'no calibration batch reaches site {site!r}, whose {role} has a '
          'static range: it lies in a branch or a loop that never ran. Add a '
          'batch that runs it, or give it a dynamic quantizer'
        )


def _needs_counts(q: Quantizer) -> bool:
  return isinstance(q.scale, scales.mse | scales.percentile | scales.kl)


@functools.partial(jax.jit, static_argnums=0)
def _fit(q: Quantizer, extremes: Any, counts: Any) -> dict[str, jax.Array]:
  """Quantizer parameters from statistics, any loop axes in front."""
  lo, hi = extremes['lo'], extremes['hi']
  if counts is not None:
    flat = jax.vmap(lambda a, b, c: _search(q, a, b, c))
    shape = lo.shape
    lo, hi = flat(lo.reshape(-1), hi.reshape(-1), counts.reshape(-1, BINS))
    lo, hi = lo.reshape(shape), hi.reshape(shape)
  found = core.fit_range(lo[..., None, None], hi[..., None, None], q)
  return {k: v for k, v in found._asdict().items() if v is not None}


def _search(q: Quantizer, lo, hi, counts):
  """Range of one activation by its rule, from a histogram."""
  edges = lo + (hi - lo) * jnp.linspace(0, 1, BINS + 1)
  centres = (edges[:-1] + edges[1:]) / 2
  if isinstance(q.scale, scales.percentile):
    return _percentile(q, centres, counts)
  rule = q.scale
  if isinstance(rule, scales.kl):
    # A code at least one bin: with fewer nothing is merged, and nothing lost.
    least = min(2**q.bits / BINS, 1.0)
    ratios = jnp.linspace(1.0, least, rule.candidates)
    counts = jnp.where((edges[:-1] <= 0) & (edges[1:] > 0), 0, counts)

    def loss(rounded):
      return entropy.divergence(counts, centres, rounded)

  elif isinstance(rule, scales.mse):
    ratios, p = jnp.asarray(rule.ratios()), rule.p

    def loss(rounded):
      return jnp.sum(counts * jnp.abs(rounded(centres) - centres) ** p)

  else:
    raise TypeError(f'{rule!r} needs no search')
  plain = dataclasses.replace(q, scale=scales.full(q.symmetric), static=False)

  def error(ratio):
    qp = core.fit_range(
      (lo * ratio)[None, None], (hi * ratio)[None, None], plain
    )
    return loss(lambda x: core.fake_quantize(x[None], plain, qp, axis=-1)[0])

  best = ratios[jnp.argmin(jax.lax.map(error, ratios))]
  return lo * best, hi * best


def _percentile(q, centres, counts):
  p = q.scale.p / 100
  if q.symmetric:
    order = jnp.argsort(jnp.abs(centres))
    share = jnp.cumsum(counts[order]) / jnp.sum(counts)
    hi = jnp.abs(centres)[order][jnp.argmax(share >= p)]
    return -hi, hi
  share = jnp.cumsum(counts) / jnp.sum(counts)
  hi = centres[jnp.argmax(share >= p)]
  lo = centres[jnp.argmax(share >= 1 - p)]
  return jnp.minimum(lo, 0), jnp.maximum(hi, 0)
