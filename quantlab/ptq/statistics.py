"""What equivalent transforms know of the inputs they scale.

Everything is streamed over the calibration batches through the model as it is
when a member's turn comes, in float: what earlier members changed is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantlab import rewrites
from quantlab.calibration import ranges
from quantlab.core.tree import named_leaves
from quantlab.graph import known
from quantlab.graph.sites import Site
from quantlab.ops import ConvDims
from quantlab.ptq.hessian import input_rows
from quantlab.ptq.inputs import Input, channels_of, grid, matrices_of
from quantlab.ptq.transform import Context


class Range(NamedTuple):
  """Of each channel of an input, (*loops, channels).

  Attributes:
    lo, hi: smallest and largest value; both 0 where no batch came by.
    mean: mean magnitude.
  """

  lo: np.ndarray
  hi: np.ndarray
  mean: np.ndarray

  @property
  def absmax(self) -> np.ndarray:
    return np.maximum(np.abs(self.lo), np.abs(self.hi))


class ChannelRange:
  """Observer: smallest, largest and mean magnitude of each input channel."""

  def __init__(self, sites: Iterable[str]):
    self.sites = frozenset(sites)

  def init(self, site):
    if site.id not in self.sites:
      return None
    bound = jnp.full((*_lead(site), channels_of(site)), jnp.inf, jnp.float32)
    zero = jnp.zeros_like(bound)
    return {'lo': bound, 'hi': -bound, 'sum': zero, 'count': zero}

  def update(self, site, stat, lhs, rhs, out, state):
    x = channel_rows(site, lhs if site.side == 'rhs' else rhs)
    lo, hi = ranges.extremes(x, -2)
    new = {
      'lo': lo,
      'hi': hi,
      'sum': jnp.sum(jnp.abs(x), -2),
      'count': jnp.full_like(stat['count'], x.shape[-2]),
    }
    return self.ranges(stat, new)

  def merge(self, site, a, b):
    return self.ranges(a, b)

  def ranges(self, a, b):
    return {
      'lo': jnp.minimum(a['lo'], b['lo']),
      'hi': jnp.maximum(a['hi'], b['hi']),
      'sum': a['sum'] + b['sum'],
      'count': a['count'] + b['count'],
    }


class RowSample(ChannelRange):
  """Observer: ranges, and a fixed sample of the rows that a weight multiplies.

  Every row gets a rank from a hash of its content and position, and the rows
  of lowest rank are kept: a sample of all rows, the same each time, whose
  merging is associative. Rows are those of `hessian.input_rows`: a convolution
  is unfolded.
  """

  def __init__(self, sites: Iterable[str], rows: int):
    super().__init__(sites)
    self.rows = rows

  def init(self, site):
    stat = super().init(site)
    if stat is None:
      return None
    lead, k = _lead(site), int(np.prod(site.contraction))
    if isinstance(site.dims, ConvDims) and site.dims.groups > 1:
      lead = (site.dims.groups,)
    stat['rows'] = jnp.zeros((*lead, self.rows, k), jnp.float32)
    stat['rank'] = jnp.full((*lead, self.rows), _ABSENT, jnp.uint32)
    return stat

  def update(self, site, stat, lhs, rhs, out, state):
    new = super().update(site, stat, lhs, rhs, out, state)
    x = input_rows(site, lhs if site.side == 'rhs' else rhs)
    return {**new, **self.lowest(stat, {'rows': x, 'rank': _rank(x)})}

  def merge(self, site, a, b):
    return {**self.ranges(a, b), **self.lowest(a, b)}

  def lowest(self, a, b):
    rank = jnp.concatenate([a['rank'], b['rank']], -1)
    rows = jnp.concatenate([a['rows'], b['rows']], -2)
    kept = jnp.argsort(rank, -1)[..., : self.rows]
    return {
      'rank': jnp.take_along_axis(rank, kept, -1),
      'rows': jnp.take_along_axis(rows, kept[..., None], -2),
    }


_ABSENT = np.uint32(2**32 - 1)


def _rank(x: jax.Array) -> jax.Array:
  """A hash of each row and its position; (..., m, k) -> uint32 (..., m)."""
  m, k = x.shape[-2:]
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  odd = 2 * jnp.arange(k, dtype=jnp.uint32) + 1
  h = jnp.sum(bits * (odd * np.uint32(0x9E3779B1)), -1, dtype=jnp.uint32)
  h = h + jnp.arange(m, dtype=jnp.uint32) * np.uint32(0x85EBCA6B)
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
    h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
  return jnp.minimum(h ^ (h >> np.uint32(16)), _ABSENT - np.uint32(1))


def _lead(site) -> tuple[int, ...]:
  if isinstance(site.dims, ConvDims):
    return ()
  return tuple(site.weight_shape[i] for i in site.dims.w_batch)


def channel_rows(site: Site, x: jax.Array) -> jax.Array:
  """The input as (batch..., rows, C), float32."""
  x = x.astype(jnp.float32)
  if isinstance(site.dims, ConvDims):
    x = jnp.moveaxis(x, site.dims.lhs_spec[1], -1)
    return x.reshape(-1, x.shape[-1])
  return site.dims.x_matrix(x)  # type: ignore[union-attr]


def collect(ctx: Context, observer: Any) -> dict[str, Any]:
  """Statistics by site over all batches; loops in front in a scanned stack."""
  observed = rewrites.observe(ctx.apply, observer, ctx.plan, quantize=False)
  variables = {'weights': ctx.params, 'sites': dict(ctx.state)}
  return ranges.stream(observed, variables, ctx.batches, observer)


def channel_ranges(ctx: Context, wanted: Sequence[Input]) -> list[Range]:
  """The ranges of some inputs."""
  stats = jax.device_get(collect(ctx, ChannelRange(_ids(wanted))))
  return [_range(where, stats) for where in wanted]


def samples(
  ctx: Context, wanted: Sequence[Input], rows: int
) -> list[tuple[Range, dict[str, np.ndarray]]]:
  """The ranges of some inputs, and by site rows (*loops, batch..., m, K)."""
  stats = jax.device_get(collect(ctx, RowSample(_ids(wanted), rows)))
  return [
    (_range(where, stats), {s.id: _present(stats[s.id]) for s in where.sites})
    for where in wanted
  ]


def _ids(wanted: Sequence[Input]) -> set[str]:
  return {s.id for where in wanted for s in where.sites}


def _present(stat) -> np.ndarray:
  """The sampled rows, without the places that were never filled."""
  count = int(np.max(np.sum(stat['rank'] != _ABSENT, -1)))
  return stat['rows'][..., :count, :]


def _range(where: Input, stats: Mapping[str, Any]) -> Range:
  mine = {s.id: stats[s.id] for s in where.sites}
  lo = gather(where, {k: v['lo'] for k, v in mine.items()}, np.minimum)
  hi = gather(where, {k: v['hi'] for k, v in mine.items()}, np.maximum)
  seen = ~(lo > hi)  # NaN counts as seen
  if not (np.isfinite(lo) & np.isfinite(hi) | ~seen).all():
    raise ValueError(
      f'calibration gives values that are not finite (NaN or infinity) in the '
      f'input of {where.name}; remove such batches, or leave the sites in float'
    )
  means = {k: v['sum'] / np.maximum(v['count'], 1) for k, v in mine.items()}
  mean = gather(where, means, np.maximum)
  return Range(*(np.where(seen, v, 0) for v in (lo, hi, mean)))


def gather(
  where: Input, values: Mapping[str, np.ndarray], reduce: np.ufunc
) -> np.ndarray:
  """Values by site and input channel as values by channel of the input.

  Args:
    where: the input.
    values: by site id, (*loops, batch..., C).
    reduce: np.minimum or np.maximum, where several positions hold one channel.

  Returns:
    (*loops, channels).
  """
  start = np.inf if reduce is np.minimum else -np.inf
  # The last place is for channels that are none of the input's.
  out = np.full((*where.loops, where.channels + 1), start, np.float32)
  rows = np.indices(where.loops + (1,))[:-1]
  for site in where.sites:
    value, place = values[site.id], where.places[site.id]
    extra = value.ndim - place.ndim  # experts read one input
    axes = tuple(range(len(where.loops), len(where.loops) + extra))
    with np.errstate(invalid='ignore'):  # NaN is passed on
      reduce.at(out, (*rows, place), reduce.reduce(value, axes))
  return out[..., :-1]


# Weights --------------------------------------------------------------------


def weights(ctx: Context, sites: Iterable[Site]) -> dict[str, list[jax.Array]]:
  """The matrices (loops..., batch..., K, N) that the sites multiply by.

  What is quantized is what counts: the kernel with its BatchNorm in it, where
  the plan folds one; the parameter as it is anywhere else.
  """
  params = dict(named_leaves(ctx.params))
  sites = list(sites)
  folded = frozenset(s.id for s in sites) & ctx.plan.folded
  leaves = [params[p] for p in ctx.traced.paths]
  found = jax.jit(lambda ls: known.weights(ctx.traced, ls, folded, folded))(
    leaves
  )
  return {
    s.id: [ctx.plan.effective[s.id].layout.to_canonical(found[s.id]['weight'])]
    if s.id in folded
    else matrices_of(s, params)
    for s in sites
  }


def weight_absmax(
  where: Input, matrices: Mapping[str, Sequence[jax.Array]]
) -> np.ndarray:
  """The largest magnitude that meets each channel, over all its weights."""
  values = {}
  for site in where.sites:
    found = [_absmax(site, w) for w in matrices[site.id]]
    values[site.id] = np.max(found, 0)
  return gather(where, values, np.maximum)


def _absmax(site, w) -> np.ndarray:
  """The largest magnitude that meets each input channel of one matrix."""
  lead = w.shape[:-2]
  meets = grid(site, w.shape[-1])
  if meets.shape[-1] == 1:
    w = _largest(w)
  best = np.zeros((int(np.prod(lead)), channels_of(site)), np.float32)
  flat = np.abs(np.asarray(w, np.float32)).reshape(len(best), -1)
  at: Any = (slice(None), meets.reshape(-1))
  np.maximum.at(best, at, flat)
  return best.reshape(*lead, -1)


@jax.jit
def _largest(w):
  return jnp.max(jnp.abs(w), -1, keepdims=True)
