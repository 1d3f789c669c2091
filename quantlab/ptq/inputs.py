"""Inputs of sites: where equivalent transforms scale, shift and rotate them.

The sites that read one value (q, k, v) are one `Input`. What is done to it,
x' = ((x - z) / s) R, is undone in their weights. Where the dataflow has a pair
(see `quantlab.graph.pairs`), the scale or shift goes into what makes the value
and costs nothing; otherwise it stays in the sites' state and is applied at run
time. Either way the function is what it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import quantlab_kernels as kernels
from quantlab.core.tree import named_leaves, path_str
from quantlab.graph import migrate, pairs
from quantlab.graph.sites import Site
from quantlab.ops import ConvDims, DotDims
from quantlab.plan import Plan
from quantlab.planner import leaf_layout
from quantlab.ptq.transform import Context

Vector = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Input:
  """An activation and the weights that contract it.

  Attributes:
    sites: the quantized sites that read it, in program order.
    pair: where a scale can be folded, or None: at run time.
    channels: its channels, of the pair where there is one.
    loops: lengths of the layer loops around; vectors are (*loops, channels).
    places: for each site, the channel (of the pair) of each of its own input
      channels: (*loops, C); `channels` where it is none of them.
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
    ids = ', '.join(s.id for s in self.sites)
    apart = any(np.any(p == self.channels) for p in self.places.values())
    # Several pairs feed one site: each has some of its channels.
    return f'{ids} from {self.pair.source}' if self.pair and apart else ids

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.loops, self.channels)


def inputs(ctx: Context) -> tuple[Input, ...]:
  """The inputs of all quantized sites that have a weight, in program order.

  A site that reads the channels of several pairs side by side is in the input
  of each of them. What is rotated at run time stays as it is: there is no place
  for another scale between the pair and the rotation.
  """
  plan, params = ctx.plan, dict(named_leaves(ctx.params))
  turned = frozenset(
    k for k, s in ctx.state.items() if 'rotation' in s.get('transform', {})
  )
  found = [
    p
    for p in pairs.of_traced(ctx.traced)
    if 'scale' in p.allows and not turned & set(p.sites)
  ]
  together = {
    site: ids for ids in pairs.shared_of_traced(ctx.traced) for site in ids
  }
  groups: dict[Any, tuple[pairs.Pair | None, list[Site]]] = {}
  for site in ctx.traced.analysis.sites:
    known = isinstance(site.dims, DotDims | ConvDims) and site.side is not None
    if site.id not in plan.quantized or not known:
      continue
    mine = [p for p in found if site.id in p.sites and whole(site, params)]
    if not mine:
      # At run time every site has its own: one that cannot stands apart.
      refused = _refusal(plan, site, params, turned) is not None
      key = together.get(site.id, site.id), refused
      groups.setdefault(key, (None, []))[1].append(site)
    for pair in mine:
      groups.setdefault(id(pair), (pair, []))[1].append(site)
  return tuple(
    _input(plan, params, tuple(sites), pair, turned)
    for pair, sites in groups.values()
  )


def _input(plan, params, sites: tuple[Site, ...], pair, turned) -> Input:
  refused = (_refusal(plan, s, params, turned) for s in sites)
  why = next(filter(None, refused), None)
  if pair is None:
    first, c = sites[0], channels_of(sites[0])
    own = {s.id: np.broadcast_to(np.arange(c), (*s.loops, c)) for s in sites}
    return Input(sites, None, c, first.loops, own, why)
  at = {s.id: places(s, pair, params) for s in sites}
  return Input(sites, pair, pair.channels, pair.loops, at, why)


def _refusal(
  plan: Plan, site: Site, params: Mapping[str, Any], turned: frozenset[str]
) -> str | None:
  """Why the weight of a site cannot take the inverse of a transform."""
  if site.id in turned:
    return f'the input of {site.id!r} is rotated at run time already'
  if site.derivation != 'leaf' or len(site.paths) != 1:
    return f'the weight of {site.id!r} is computed from several parameters'
  if site.weight_loops != site.loops:
    return f'the weight of {site.id!r} is the same in every layer of a loop'
  uses = [s.id for s in plan.sites.values() if site.path in s.paths]
  if len(uses) > 1:
    return f'the weight of {site.id!r} is also that of {uses[1:]}'
  if not whole(site, params):
    return f'the weight of {site.id!r} is a part of {site.path!r}'
  return None


def whole(site: Site, params: Mapping[str, Any]) -> bool:
  """Whether each row of a site's parameters meets one channel of its input."""
  if site.derivation != 'leaf' or site.view is None:
    return False
  want = (*site.loops, *_lead(site), int(np.prod(site.contraction)))
  abstract = {
    p: jax.ShapeDtypeStruct(params[p].shape, params[p].dtype)
    for p in site.paths
  }
  found = jax.eval_shape(lambda tree: matrices_of(site, tree), abstract)
  return all(w.shape[:-1] == want for w in found)


def channels_of(site: Site) -> int:
  """Input channels of a site: a convolution's, else its flat contraction."""
  if isinstance(site.dims, ConvDims):
    return int(np.prod(site.contraction[-1:])) * site.dims.groups
  return int(np.prod(site.contraction))


def grid(site: Site, n: int) -> np.ndarray:
  """Which input channel each element of the matrix (K, n or 1) meets."""
  k = int(np.prod(site.contraction))
  if not isinstance(site.dims, ConvDims):
    return np.arange(k)[:, None]
  per, groups = site.contraction[-1], site.dims.groups
  group = np.arange(n if groups > 1 else 1) // max(n // groups, 1)
  return (np.arange(k) % per)[:, None] + group[None, :] * per


def places(
  site: Site, pair: pairs.Pair, params: Mapping[str, Any]
) -> np.ndarray:
  """The pair's channel of each input channel of a site; see `Input`."""
  path = site.paths[0]
  [member] = [m for m in pair.consumers if (m.site, m.path) == (site.id, path)]
  matrix = index_matrix(site, member, params)
  first = np.unique(grid(site, matrix.shape[-1]), return_index=True)[1]
  if grid(site, matrix.shape[-1]).shape[-1] == 1:
    matrix = matrix[..., :1]
  batch = tuple(range(len(site.loops), matrix.ndim - 2))
  # Experts read one input.
  matrix = matrix.max(batch) if batch else matrix
  found = matrix.reshape(*matrix.shape[:-2], -1)[..., first]
  return np.where(found < 0, pair.channels, found % pair.channels)


def index_matrix(
  site: Site, member: pairs.Member, params: Mapping[str, Any]
) -> np.ndarray:
  """A member's channels as they lie in its site's (loops..., batch..., K, N).

  Channels count over the loops; -1 where it is none, as in `Member`.
  """
  shape = params[member.path].shape
  full: Any = np.broadcast_to(member.index, shape)
  layout = leaf_layout(site, site.paths.index(member.path), shape)
  return np.asarray(layout.to_canonical(full))


def _lead(site) -> tuple[int, ...]:
  if isinstance(site.dims, ConvDims):
    return ()
  return tuple(site.weight_shape[i] for i in site.dims.w_batch)


def matrix_of(site: Site, params: Mapping[str, Any]) -> jax.Array:
  """The float weight of a site as (loops..., batch..., K, N)."""
  return matrices_of(site, params)[0]


def matrices_of(site: Site, params: Mapping[str, Any]) -> list[jax.Array]:
  """`matrix_of` each of its parameters, where several are joined."""
  return [
    leaf_layout(site, part, params[p].shape).to_canonical(params[p])
    for part, p in enumerate(site.paths)
  ]


def own(
  where: Input, site: Site, vector: np.ndarray, neutral: float
) -> np.ndarray:
  """A vector over the input's channels as one over a site's own.

  Args:
    where: the input.
    site: one of its sites.
    vector: (..., *loops, channels).
    neutral: for channels of the site that are none of the input's.

  Returns:
    (..., *loops, C).
  """
  lead, place = vector.shape[:-1], where.places[site.id]
  rest = np.full((*lead, 1), neutral, np.float32)
  return np.take_along_axis(
    np.concatenate([vector, rest], -1, dtype=np.float32),
    np.broadcast_to(place, (*lead, place.shape[-1])),
    -1,
  )


def over_matrix(
  where: Input, site: Site, vector: np.ndarray, neutral: float, n: int
) -> np.ndarray:
  """A vector over the input's channels as it meets a site's matrix.

  Returns:
    (..., *loops, 1 for each batch axis, K, n or 1).
  """
  spread = own(where, site, vector, neutral)[..., grid(site, n)]
  lead = spread.ndim - 2
  batch = range(lead, lead + len(_lead(site)))
  return np.expand_dims(spread, tuple(batch))


# What is done to it ---------------------------------------------------------


def scale_input(ctx: Context, where: Input, s: Vector) -> Context:
  """Divides an input by s > 0 of shape `where.shape`, weights multiplied."""
  if where.pair is not None:
    return scale_across(ctx, where.pair, s)
  _check_run_time(where)
  params = dict(named_leaves(ctx.params))
  for site in where.sites:
    w = matrix_of(site, params)
    scaled = w * over_matrix(where, site, np.asarray(s), 1, w.shape[-1])
    params[site.paths[0]] = _back(site, params, scaled)
  gains = _vectors(where, 1 / s, 1)
  return _at_run_time(
    replaced(ctx, params), {k: {'gain': v} for k, v in gains.items()}
  )


def scale_across(ctx: Context, pair: pairs.Pair, s: Vector) -> Context:
  """Moves a scale across a pair, with what sites do there at run time.

  A shift of a consumer's input is one of the smaller values now; a bias added
  to a producer's product is made smaller like the product.
  """
  _refuse_adjusted(ctx, pair, ('signs', 'rotation'), 'scaled')
  params = dict(named_leaves(ctx.params))
  state = {k: dict(v) for k, v in ctx.state.items()}
  sites = {s.id: s for s in ctx.traced.analysis.sites}
  for member in pair.consumers:
    site, roles = _state_of(member, sites, state)
    if site is not None and 'shift' in roles.get('transform', {}):
      at = {site.id: places(site, pair, params)}
      where = Input((site,), pair, pair.channels, pair.loops, at)
      mine = _vectors(where, s, 1)[site.id]
      shift = roles['transform']['shift'] / mine
      roles['transform'] = {**roles['transform'], 'shift': shift}
  for member in pair.producers:
    site, roles = _state_of(member, sites, state)
    if site is not None and member.role == 'kernel' and 'bias' in roles:
      index = index_matrix(site, member, params)[..., 0, :]
      mine = np.asarray(s).reshape(-1)[np.maximum(index, 0)]
      roles['bias'] = roles['bias'] / np.where(index < 0, 1, mine)
  ctx = dataclasses.replace(ctx, state=state)
  return replaced(ctx, migrate.scale_pair(params, pair, s))


def _state_of(member, sites, state):
  """The site that a member is the weight of, and its state."""
  return sites.get(member.site), state.get(member.site, {})


def no_shift(ctx: Context, where: Input) -> str | None:
  """Why `shift_input` cannot be done, or None."""
  if where.pair is not None and 'shift' in where.pair.allows:
    return None
  if where.why:
    return where.why
  if any(isinstance(s.dims, ConvDims) for s in where.sites):
    return 'a convolution pads with zeros, which would have to be shifted too'
  folded = [s.id for s in where.sites if s.id in ctx.plan.folded]
  if folded:
    return (
      f'a BatchNorm is folded into the weight of {folded}; give the rule '
      'fold=False'
    )
  return None


def shift_input(ctx: Context, where: Input, z: Vector) -> Context:
  """Subtracts z from an input, the products' biases make up for it."""
  why = no_shift(ctx, where)
  if why:
    raise ValueError(f'the input of {where.name} cannot be shifted: {why}')
  params = dict(named_leaves(ctx.params))
  if where.pair is not None and 'shift' in where.pair.allows:
    adjusted = ('gain', 'signs', 'rotation')
    _refuse_adjusted(ctx, where.pair, adjusted, 'shifted')
    return replaced(ctx, migrate.shift_pair(params, where.pair, z))
  own_shift = _vectors(where, z, 0)
  moved = _at_run_time(ctx, {k: {'shift': v} for k, v in own_shift.items()})
  state = {k: dict(v) for k, v in moved.state.items()}
  for site in where.sites:
    w = matrix_of(site, params).astype(jnp.float32)
    product = jnp.matmul(
      own_shift[site.id][..., None, :], w, precision=lax.Precision.HIGHEST
    )[..., 0, :]
    state[site.id]['bias'] = state[site.id].get('bias', 0) + product
  return dataclasses.replace(ctx, state=state)


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
    w = matrix_of(site, params)
    turned = kernels.hadamard(
      jnp.swapaxes(w, -1, -2).astype(jnp.float32) * signs, factors
    )
    params[site.paths[0]] = _back(site, params, jnp.swapaxes(turned, -1, -2))
    lead = (*site.loops, *_lead(site))
    noted[site.id] = {
      'signs': jnp.broadcast_to(signs, (*lead, *signs.shape)),
      'rotation': tuple(
        jnp.broadcast_to(f, (*site.loops, *f.shape)) for f in factors
      ),
    }
  return _at_run_time(replaced(ctx, params), noted)


def _back(site, params, matrix):
  """A matrix as the site's parameter has it."""
  w = params[site.paths[0]]
  return leaf_layout(site, 0, w.shape).to_logical(matrix).astype(w.dtype)


def _refuse_adjusted(ctx, pair, keys, verb) -> None:
  """A pair must not go over inputs that are changed at run time already."""
  for member in pair.consumers:
    found = ctx.state.get(member.site or '', {}).get('transform', {})
    mine = [k for k in keys if k in found]
    if mine:
      raise ValueError(
        f'the input of {member.site!r} has a {mine[0]} at run time already and '
        f'cannot be {verb} before it: put scales and shifts before rotations'
      )


def _check_run_time(where: Input) -> None:
  if where.why:
    raise ValueError(
      f'the input of {where.name} cannot be changed at run time: {where.why}'
    )


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


def _vectors(
  where: Input, value: Vector, neutral: float
) -> dict[str, jax.Array]:
  """A vector over the input's channels as each site's state holds it."""
  found = {}
  for site in where.sites:
    mine = own(where, site, np.asarray(value, np.float32), neutral)
    ones = (1,) * len(_lead(site))
    mine = mine.reshape(*mine.shape[:-1], *ones, mine.shape[-1])
    found[site.id] = jnp.asarray(mine)
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
