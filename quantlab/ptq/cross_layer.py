"""Cross-layer equalization (arXiv 1906.04721)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quantlab.core.tree import named_leaves
from quantlab.graph import pairs
from quantlab.graph.pairs import Pair
from quantlab.ptq import equalize, statistics
from quantlab.ptq import inputs as inputs_lib
from quantlab.ptq.transform import Context, Transform

KINDS = ('conv', 'linear', 'up_down', 'v_out')


class _End(NamedTuple):
  """A weight on one side of a pair.

  Attributes:
    site: whose weight it is.
    channel: the channel, counted over the loops, of each element of its matrix
      (loops..., batch..., K, N); an axis along which it is the same is 1 long.
  """

  site: str
  channel: np.ndarray


class _Link(NamedTuple):
  pair: Pair
  before: tuple[_End, ...]
  after: tuple[_End, ...]


def cross_layer_equalization(
  sweeps: int = 20, tolerance: float = 1e-3
) -> Transform:
  """Gives the channels between two weights the same range in both; no data.

    s_j = sqrt(r1_j r2_j) / r2_j                                  (eq. 11)

  with r1_j the range of output channel j of the weights before and r2_j that
  of input channel j of those after; the former are divided by s, the latter
  multiplied, pair after pair, until nothing moves. A depthwise convolution
  stands in two pairs, so triples come out by iterating. A channel that is zero
  in one of them keeps s_j = 1.

  Where a BatchNorm follows, its gain and bias take the scale, and r1 is the
  range of the kernel with the gain in it, because that is what is quantized.
  If the plan does not fold it, no weight would change: the pair is left out.

  Args:
    sweeps: over all pairs, at most.
    tolerance: no scale of the last sweep differs from 1 by more.

  Raises:
    ValueError: no pair of two weights.
  """
  if sweeps < 1 or tolerance < 0:
    raise ValueError(
      f'sweeps is at least 1, tolerance 0, got {sweeps=}, {tolerance=}'
    )

  def run(ctx: Context) -> Context:
    links = _links(ctx)
    sites = {s.id: s for s in ctx.traced.analysis.sites}
    wanted = {e.site for k in links for e in (*k.before, *k.after)}
    found = statistics.weights(ctx, [sites[name] for name in wanted])
    matrices = {
      k: np.abs(np.asarray(v[0], np.float32)) for k, v in found.items()
    }
    total = [np.ones(k.pair.shape, np.float32) for k in links]
    done, change = 0, np.inf
    while done < sweeps and change > tolerance:
      done, change = done + 1, 0.0
      for i, link in enumerate(links):
        s = _balance(link, matrices)
        total[i] *= s.reshape(link.pair.shape)
        change = max(change, float(np.max(np.abs(s - 1))))
    noted: dict[str, Any] = {'sweeps': done, 'change': change}
    for link, s in zip(links, total, strict=True):
      ctx = inputs_lib.scale_across(ctx, link.pair, s)
      noted[link.pair.source] = {
        'folded': True,
        'into': [m.path for m in link.pair.producers],
        'smallest': float(np.min(s)),
        'largest': float(np.max(s)),
      }
    return ctx.noted(cross_layer_equalization=noted)

  options = {'sweeps': sweeps, 'tolerance': tolerance}
  return Transform('cross_layer_equalization', 'prepare', run, options)


def _balance(link: _Link, matrices: dict[str, np.ndarray]) -> np.ndarray:
  """One step on one pair: its scale, which `matrices` take at once."""
  r1 = _range(link.before, matrices, link.pair)
  r2 = _range(link.after, matrices, link.pair)
  with np.errstate(divide='ignore', invalid='ignore'):  # channels of zeros
    s = equalize.safe(np.sqrt(r1 * r2) / r2, r1, r2)
  padded = np.append(s, np.float32(1))  # index -1: not of this pair
  for end in link.before:
    matrices[end.site] = matrices[end.site] / padded[end.channel]
  for end in link.after:
    matrices[end.site] = matrices[end.site] * padded[end.channel]
  return s


def _range(ends, matrices, pair: Pair) -> np.ndarray:
  """The largest magnitude of each channel, (loops * channels,)."""
  size = int(np.prod(pair.shape))
  best = np.zeros(size + 1, np.float32)  # the last: not of this pair
  for end in ends:
    alike = tuple(i for i, n in enumerate(end.channel.shape) if n == 1)
    largest = np.max(matrices[end.site], alike, keepdims=True)
    np.maximum.at(best, end.channel, largest)
  return best[:-1]


def _links(ctx: Context) -> list[_Link]:
  """The pairs whose two sides are weights."""
  params = dict(named_leaves(ctx.params))
  sites = {s.id: s for s in ctx.traced.analysis.sites}
  links = []
  for pair in pairs.of_traced(ctx.traced):
    if 'scale' not in pair.allows or pair.kind not in KINDS:
      continue
    ends = _before(ctx, pair, sites, params)
    after = [_end(sites.get(m.site or ''), m, params) for m in pair.consumers]
    if ends and None not in (*ends, *after):
      before = tuple(e for e in ends if e)
      links.append(_Link(pair, before, tuple(e for e in after if e)))
  if not links:
    kinds = ', '.join(KINDS)
    raise ValueError(
      'cross_layer_equalization() has nothing to act on: it looked for pairs '
      f'of the kinds {kinds} whose channels lie between two weights, with at '
      'most an activation that is positively homogeneous (ReLU) or a BatchNorm '
      'that the plan folds between them; see ql.pairs(apply, params, *batch)'
    )
  return links


def _before(ctx, pair, sites, params) -> list[_End | None]:
  kernels = [m for m in pair.producers if m.role == 'kernel']
  if kernels:
    return [_end(sites.get(m.site or ''), m, params) for m in kernels]
  site = sites.get(pair.source)
  gains = [m for m in pair.producers if m.role == 'gain']
  if site is None or site.id not in ctx.plan.folded or len(gains) != 1:
    return []
  # One output of the kernel for each element of the gain, in order.
  index = np.broadcast_to(gains[0].index, params[gains[0].path].shape)
  return [_End(site.id, index.reshape(*site.loops, 1, -1))]


def _end(site, member, params) -> _End | None:
  if site is None or len(site.paths) != 1:
    return None
  if not inputs_lib.whole(site, params):
    return None
  index = inputs_lib.index_matrix(site, member, params)
  for axis in range(index.ndim):
    first = index.take([0], axis)
    index = first if (index == first).all() else index
  return _End(site.id, index)
