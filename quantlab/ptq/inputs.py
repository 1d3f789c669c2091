"""Inputs of sites: where equivalent transforms scale, shift and rotate.

The sites that read one value (q, k, v) are one `Input`. What is done to it,
x' = ((x - z) / s) R, is undone in their weights. Where the dataflow has a pair
(see `quantlab.graph.pairs`), the scale or shift goes into what makes the value
and costs nothing; otherwise it stays in the sites' state and is applied at run
time. Either way the function is what it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantlab.core.tree import named_leaves, path_str
from quantlab.graph import migrate, pairs
from quantlab.graph.sites import Site
from quantlab.ops import ConvDims, DotDims, rotate
from quantlab.plan import Plan, Storage
from quantlab.ptq.transform import Context


@dataclasses.dataclass(frozen=True, eq=False)
class Input:
  """An activation and the weights that contract it.

  Attributes:
    sites: the quantized sites that read it, in program order.
    pair: where a scale can be folded, or None: at run time.
    channels: its channels, of the pair where there is one.
    loops: lengths of the layer loops around; vectors are (*loops, channels).
    places: for each site, the channel (of the pair) of each of its own input
      channels: (*loops, C).
    why: why nothing can be done at run time, or None.
  """

  sites: tuple[Site, ...]
  pair: pairs.Pair | None
  channels: int
  loops: tuple[int, ...]
  places: Mapping[str, np.ndarray]
  why: str | None = None

  @property
  def name(self) -> str:
    return ', '.join(s.id for s in self.sites)

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.loops, self.channels)


def inputs(ctx: Context) -> tuple[Input, ...]:
  """The inputs of all quantized sites that have a weight, in program order."""
  plan, analysis = ctx.plan, ctx.traced.analysis
  wanted = [
    s
    for s in analysis.sites
    if s.id in plan.quantized and isinstance(s.dims, DotDims | ConvDims)
    if s.side is not None
  ]
  found = [p for p in pairs.of_traced(ctx.traced) if 'scale' in p.allows]
  pair_of = {site: p for p in reversed(found) for site in p.sites}
  groups: dict[Any, list[Site]] = {}
  together = {
    site: ids for ids in pairs.shared_of_traced(ctx.traced) for site in ids
  }
  for site in wanted:
    pair = pair_of.get(site.id)
    key = id(pair) if pair else together.get(site.id, site.id)
    groups.setdefault(key, []).append(site)
  return tuple(
    _input(plan, tuple(group), pair_of.get(group[0].id))
    for group in groups.values()
  )


def _input(plan: Plan, sites: tuple[Site, ...], pair) -> Input:
  first = sites[0]
  why = next(filter(None, (_refusal(plan, s) for s in sites)), None)
  if pair is None:
    c = channels_of(first)
    own = {s.id: np.broadcast_to(np.arange(c), (*s.loops, c)) for s in sites}
    return Input(sites, None, c, first.loops, own, why)
  members = {m.site: m for m in pair.consumers}
  places = {
    s.id: _places(s, storage_of(plan, s), members[s.id].index, pair)
    for s in sites
  }
  return Input(sites, pair, pair.channels, pair.loops, places, why)


def _refusal(plan: Plan, site: Site) -> str | None:
  """Why the weight of a site cannot take the inverse of a transform."""
  if site.derivation != 'leaf' or len(site.paths) != 1:
    return f'the weight of {site.id!r} is computed from several parameters'
  if site.weight_loops != site.loops:
    return f'the weight of {site.id!r} is the same in every layer of a loop'
  uses = [s.id for s in plan.sites.values() if site.path in s.paths]
  if len(uses) > 1:
    return f'the weight of {site.id!r} is also that of {uses[1:]}'
  return None


def storage_of(plan: Plan, site: Site) -> Storage:
  """How the weight of a quantized site is stored, or would be."""
  if site.id in plan.effective:
    return plan.effective[site.id]
  return plan.leaves[site.paths[0]]


def channels_of(site: Site) -> int:
  """Input channels of a site: a convolution's, else its flat contraction."""
  if isinstance(site.dims, ConvDims):
    return int(np.prod(site.contraction[-1:])) * site.dims.groups
  return int(np.prod(site.contraction))


def _grid(site: Site) -> np.ndarray:
  """Which input channel each element of the matrix (K, N) meets."""
  k = int(np.prod(site.contraction))
  if not isinstance(site.dims, ConvDims):
    return np.arange(k)[:, None]
  per = site.contraction[-1]
  n = site.weight_shape[site.dims.w_free[0]]  # type: ignore[index]
  group = np.arange(n) // (n // site.dims.groups)
  return (np.arange(k) % per)[:, None] + group[None, :] * per


def _places(site, storage, index, pair) -> np.ndarray:
  """The pair's channel of each input channel of a site, (*loops, C)."""
  full = np.broadcast_to(index, storage.shape)
  matrix = np.asarray(storage.layout.to_canonical(full)) % pair.channels
  grid = np.broadcast_to(_grid(site), matrix.shape[-2:])
  first = np.unique(grid, return_index=True)[1]
  return matrix.reshape(*matrix.shape[:-2], -1)[..., first]


# What is known of an input --------------------------------------------------


class ChannelRange:
  """Observer: smallest, largest and mean magnitude of each input channel."""

  def __init__(self, sites: Iterable[str]):
    self.sites = frozenset(sites)

  def init(self, site):
    if site.id not in self.sites:
      return None
    bound = jnp.full((*_lead(site), channels_of(site)), jnp.inf, jnp.float32)
    zero = jnp.zeros_like(bound)
    return {'lo': bound, 'hi': -bound, 'sum': zero, 'rows': zero}

  def update(self, site, stat, lhs, rhs, out, state):
    x = channel_rows(site, lhs if site.side == 'rhs' else rhs)
    new = {
      'lo': jnp.min(x, -2),
      'hi': jnp.max(x, -2),
      'sum': jnp.sum(jnp.abs(x), -2),
      'rows': jnp.full_like(stat['rows'], x.shape[-2]),
    }
    return self.merge(site, stat, new)

  def merge(self, site, a, b):
    return {
      'lo': jnp.minimum(a['lo'], b['lo']),
      'hi': jnp.maximum(a['hi'], b['hi']),
      'sum': a['sum'] + b['sum'],
      'rows': a['rows'] + b['rows'],
    }


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


def gather(
  where: Input, values: Mapping[str, jax.Array], reduce: str
) -> jax.Array:
  """Values by site and input channel as values by channel of the input.

  Args:
    where: the input.
    values: by site id, (*loops, batch..., C).
    reduce: 'min' or 'max', where several positions hold one channel.

  Returns:
    (*loops, channels).
  """
  start = np.inf if reduce == 'min' else -np.inf
  out = jnp.full(where.shape, start, jnp.float32)
  for site in where.sites:
    if site.id not in values:
      continue
    value, place = values[site.id], where.places[site.id]
    extra = value.ndim - place.ndim  # experts read one input
    axes = tuple(range(len(where.loops), len(where.loops) + extra))
    value = value.min(axes) if reduce == 'min' else value.max(axes)
    flat = out.reshape(-1, where.channels)
    rows = np.arange(flat.shape[0])[:, None]
    at = flat.at[rows, place.reshape(flat.shape[0], -1)]
    value = value.reshape(flat.shape[0], -1)
    flat = at.min(value) if reduce == 'min' else at.max(value)
    out = flat.reshape(where.shape)
  return out


def weight_absmax(ctx: Context, where: Input) -> jax.Array:
  """The largest magnitude that meets each channel, over all its weights."""
  params = dict(named_leaves(ctx.params))
  values = {}
  for site in where.sites:
    w = jnp.abs(matrix_of(ctx.plan, site, params)).astype(jnp.float32)
    grid = np.broadcast_to(_grid(site), w.shape[-2:])
    lead = w.shape[:-2]
    best = jnp.zeros((*lead, channels_of(site)), jnp.float32)
    values[site.id] = best.at[..., grid.reshape(-1)].max(
      w.reshape(*lead, -1), mode='drop'
    )
  return gather(where, values, 'max')


def matrix_of(plan: Plan, site: Site, params: Mapping[str, Any]) -> jax.Array:
  """The float weight of a site as (loops..., batch..., K, N)."""
  storage = storage_of(plan, site)
  return storage.layout.to_canonical(params[site.paths[0]])


# What is done to it ---------------------------------------------------------


def scale_input(ctx: Context, where: Input, s: jax.Array) -> Context:
  """Divides an input by s > 0 of shape `where.shape`, weights multiplied."""
  if where.pair is not None:
    params = dict(named_leaves(ctx.params))
    return replaced(ctx, migrate.scale_pair(params, where.pair, s))
  ctx = _weights(ctx, where, lambda w, v: w * v, s)
  own = _own(where, 1 / s)
  return _at_run_time(ctx, {k: {'gain': v} for k, v in own.items()})


def shift_input(ctx: Context, where: Input, z: jax.Array) -> Context:
  """Subtracts z from an input, the products' biases make up for it."""
  if where.pair is not None and 'shift' in where.pair.allows:
    params = dict(named_leaves(ctx.params))
    return replaced(ctx, migrate.shift_pair(params, where.pair, z))
  _check_run_time(where)
  if any(isinstance(s.dims, ConvDims) for s in where.sites):
    raise ValueError(
      f'the input of {where.name} cannot be shifted: a convolution pads with '
      'zeros, which would have to be shifted too'
    )
  folded = [s.id for s in where.sites if s.id in ctx.plan.folded]
  if folded:
    raise ValueError(
      f'the input of {folded} cannot be shifted: a BatchNorm is folded into '
      'the weight; give the rule fold=False'
    )
  params = dict(named_leaves(ctx.params))
  state = {k: dict(v) for k, v in ctx.state.items()}
  for site in where.sites:
    w = matrix_of(ctx.plan, site, params).astype(jnp.float32)
    mine = jnp.take_along_axis(z, jnp.asarray(where.places[site.id]), -1)
    extra = w.ndim - 1 - mine.ndim
    lead = (*mine.shape[:-1], *(1,) * extra, 1, mine.shape[-1])
    product = jnp.matmul(
      mine.reshape(lead), w, precision=lax.Precision.HIGHEST
    )[..., 0, :]
    roles = state.setdefault(site.id, {})
    roles['bias'] = roles.get('bias', 0) + product
  ctx = dataclasses.replace(ctx, state=state)
  own = _own(where, z)
  return _at_run_time(ctx, {k: {'shift': v} for k, v in own.items()})


def rotate_input(
  ctx: Context, where: Input, signs: jax.Array, factors: Sequence[jax.Array]
) -> Context:
  """Rotates an input at run time by diag(signs) (I kron A kron B ...).

  Args:
    ctx: the context.
    where: an input of matrix products.
    signs: +-1, (C,) with C the sites' own channels.
    factors: orthogonal matrices whose sizes multiply to a divisor of C.
  """
  _check_run_time(where)
  if any(isinstance(s.dims, ConvDims) for s in where.sites):
    raise ValueError(f'the input of {where.name} is that of a convolution')
  params = dict(named_leaves(ctx.params))
  noted = {}
  for site in where.sites:
    w = matrix_of(ctx.plan, site, params)
    turned = rotate(
      jnp.swapaxes(w, -1, -2).astype(jnp.float32) * signs, factors
    )
    new = storage_of(ctx.plan, site).layout.to_logical(
      jnp.swapaxes(turned, -1, -2)
    )
    params[site.paths[0]] = new.astype(w.dtype)
    lead = (*site.loops, *_lead(site))
    noted[site.id] = {
      'signs': jnp.broadcast_to(signs, (*lead, *signs.shape)),
      'rotation': tuple(
        jnp.broadcast_to(f, (*site.loops, *f.shape)) for f in factors
      ),
    }
  return _at_run_time(replaced(ctx, params), noted)


def _check_run_time(where: Input) -> None:
  if where.why:
    raise ValueError(
      f'the input of {where.name} cannot be changed at run time: {where.why}'
    )


def _weights(ctx: Context, where: Input, f, vector) -> Context:
  """Applies f(matrix, vector spread over it) to the weights of an input."""
  _check_run_time(where)
  params = dict(named_leaves(ctx.params))
  for site in where.sites:
    w = matrix_of(ctx.plan, site, params)
    mine = jnp.take_along_axis(vector, jnp.asarray(where.places[site.id]), -1)
    spread = mine[..., _grid(site)]  # (loops..., K, N or 1)
    batch = w.ndim - spread.ndim
    spread = jnp.expand_dims(
      spread, tuple(len(where.loops) + i for i in range(batch))
    )
    new = storage_of(ctx.plan, site).layout.to_logical(f(w, spread))
    params[site.paths[0]] = new.astype(w.dtype)
  return replaced(ctx, params)


def _at_run_time(
  ctx: Context, noted: Mapping[str, Mapping[str, Any]]
) -> Context:
  """Notes by site what is left to do at run time, after what is noted."""
  state = {k: dict(v) for k, v in ctx.state.items()}
  for site, fields in noted.items():
    roles = state.setdefault(site, {})
    for key, value in fields.items():
      mine = roles.get('transform', {})
      roles['transform'] = _joined(site, mine, key, value)
  return dataclasses.replace(ctx, state=state)


def _own(where: Input, value: jax.Array) -> dict[str, jax.Array]:
  """A vector over the input's channels as each site's own."""
  found = {}
  for site in where.sites:
    mine = jnp.take_along_axis(value, jnp.asarray(where.places[site.id]), -1)
    extra = (1,) * len(_lead(site))
    shape = (*mine.shape[:-1], *extra, mine.shape[-1])
    found[site.id] = jnp.asarray(mine.reshape(shape), jnp.float32)
  return found


def _joined(site, mine, key, value):
  """The transforms that a site has, followed by one more."""
  turned = {'signs', 'rotation'} & set(mine)
  if (turned and key not in ('signs', 'rotation')) or key in turned:
    raise ValueError(
      f'the input of {site!r} is rotated already; scale and shift it before'
    )
  if key == 'gain' and 'gain' in mine:
    value = value * mine['gain']
  if key == 'shift' and mine:
    value = value / mine.get('gain', 1) + mine.get('shift', 0)
  return {**mine, key: value}


def replaced(ctx: Context, flat: Mapping[str, Any]) -> Context:
  """With other parameters, given by path."""
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: flat[path_str(path)], ctx.params
  )
  return dataclasses.replace(ctx, params=params)
