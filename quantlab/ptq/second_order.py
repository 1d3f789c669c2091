"""Rounding with second-order error compensation (the engine of GPTQ and kin).

For y = x W with Hessian H = E[x x^T] of the squared output error, rows of W
(inputs) are rounded one after another; what one row loses is made up for by the
rows that are not yet rounded, along the inverse Hessian. With U upper
triangular and H^-1 = U^T U, for row k (arXiv 2210.17323, equations 2 and 3):

  e = (w_k - Q(w_k)) / U_kk,    W_j -= U_kj e  for j > k.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from quantlab import core
from quantlab.core import QParams, Quantizer

BLOCK = 128  # rows between two updates of all that follows
RETRIES = 6  # of the factorization, damping ten times more each


class Compensated(NamedTuple):
  """Rounded weights.

  Attributes:
    weight: (K, N), on the quantizer's grid: encoding it with `qparams` gives
      its codes.
    qparams: scales as they were used.
    loss: the error that was left, sum e^2 / 2, in units of the Hessian.
    damp: the damping at which the Hessian could be factored; NaN if never.
  """

  weight: Float[Array, 'k n']
  qparams: QParams
  loss: Float[Array, '']
  damp: Float[Array, '']


def second_order(
  w: Float[Array, '*l k n'],
  hessian: Float[Array, '*l k k'],
  quantizer: Quantizer,
  qparams: QParams | None = None,
  *,
  damp: float = 0.01,
  act_order: bool = False,
  static_groups: bool = True,
) -> Compensated:
  """Rounds weights to minimize the output error under the Hessian.

  Args:
    w: weights (loops..., K, N); loop axes (layers, experts) are independent.
    hessian: E[x x^T] of their inputs, (loops..., K, K).
    quantizer: any format and granularity.
    qparams: scales, if they are settled; else the quantizer's rule finds them.
    damp: added to the diagonal, as a share of its mean.
    act_order: round inputs of large second moment first; groups stay
      contiguous, with scales of the original weights.
    static_groups: False finds the scales of a group when its first row is
      reached, on the weights as they are by then (not with act_order).

  Returns:
    `Compensated`, loop axes in front.
  """
  if act_order and not static_groups:
    raise ValueError(
      'act_order=True needs static_groups=True: in another order a group has '
      'no first row'
    )
  if not static_groups and quantizer.block is not None:
    raise ValueError(f'{quantizer!r}: static_groups=False needs group= or per=')
  if qparams is None:
    qparams = core.fit(w, quantizer, axis=-2)
  run = functools.partial(
    _compensate,
    quantizer=quantizer,
    damp=damp,
    act_order=act_order,
    refit=not static_groups and quantizer.group is not None,
  )
  for _ in range(w.ndim - 2):
    run = jax.vmap(run)
  return run(w, hessian, qparams)


@functools.partial(
  jax.jit, static_argnames=('quantizer', 'damp', 'act_order', 'refit')
)
def _compensate(w, hessian, qparams, *, quantizer, damp, act_order, refit):
  k, n = w.shape
  group = quantizer.unit(k, n)[0]
  x = w.astype(jnp.float32)
  order = jnp.arange(k)
  if act_order:
    order = jnp.argsort(-jnp.diagonal(hessian), stable=True)
  h = hessian.astype(jnp.float32)[order][:, order]
  upper, used = inverse_factor(h, damp)
  rows = _Rows(quantizer, group, _by_row(qparams, quantizer, n), refit)
  rounded, rows, loss = _sweep(x[order], upper, order // group, rows)
  weight = jnp.zeros_like(rounded).at[order].set(rounded)
  return Compensated(weight, rows.restore(qparams), loss, used)


def inverse_factor(
  h: Float[Array, 'k k'], damp: float
) -> tuple[Float[Array, 'k k'], Float[Array, '']]:
  """Upper triangular U with (H + damping)^-1 = U^T U, and the damping share.

  An input that is always zero (H_kk = 0) is rounded on its own. With R upper
  triangular and H = R R^T, which is the Cholesky factorization in reverse
  order, U = R^-1.
  """
  k = h.shape[0]
  diagonal = jnp.diagonal(h)
  dead = diagonal == 0
  h = h + jnp.diag(dead.astype(h.dtype))
  mean = jnp.mean(jnp.where(dead, 0, diagonal))

  def attempt(share):
    damped = h + share * mean * jnp.eye(k, dtype=h.dtype)
    r = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return lax.linalg.triangular_solve(
      r, jnp.eye(k, dtype=h.dtype), left_side=True, lower=False
    )

  def failed(state):
    share, upper = state
    return ~jnp.isfinite(upper).all() & (share < damp * 10**RETRIES)

  def again(state):
    share = state[0] * 10
    return share, attempt(share)

  share, upper = lax.while_loop(
    failed, again, (jnp.float32(damp), attempt(jnp.float32(damp)))
  )
  fine = jnp.isfinite(upper).all()
  return upper, jnp.where(fine, share, jnp.nan)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
  """Rounding of single rows: parameters by (group, output)."""

  quantizer: Quantizer = dataclasses.field(metadata={'static': True})
  group: int = dataclasses.field(metadata={'static': True})
  params: QParams
  refit: bool = dataclasses.field(metadata={'static': True})

  def round(self, row: Array, g: Array) -> Array:
    """One row (N,) of group g on the grid."""
    p = self.params
    mine = p._replace(
      scale=p.scale[g][None],
      zero_point=None if p.zero_point is None else p.zero_point[g][None],
    )
    single = dataclasses.replace(
      self.quantizer, per='channel', group=None, block=None, ragged=False
    )
    return core.fake_quantize(row[None], single, mine, axis=-2)[0]

  def fitted(self, rows: Array, g: Array) -> _Rows:
    """With the scales of group g found again on its rows as they are."""
    new = core.fit(rows, self.quantizer, axis=-2)
    p = self.params

    def put(old, one):
      return None if old is None else old.at[g].set(one[0])

    return dataclasses.replace(
      self,
      params=p._replace(
        scale=put(p.scale, new.scale),
        zero_point=put(p.zero_point, new.zero_point),
      ),
    )

  def restore(self, like: QParams) -> QParams:
    """The parameters in the shape the quantizer stores them."""
    return self.params if self.refit else like


def _by_row(p: QParams, q: Quantizer, n: int) -> QParams:
  """Parameters expanded to one for each (group, output)."""

  def wide(a):
    return jnp.repeat(a, n // a.shape[-1], axis=-1, total_repeat_length=n)

  return QParams(
    wide(p.scale),
    None if p.zero_point is None else wide(p.zero_point),
    p.scale2,
    None if p.codebook is None else wide(p.codebook),
  )


def _sweep(
  x: Float[Array, 'k n'],
  upper: Float[Array, 'k k'],
  groups: Int[Array, ' k'],
  rows: _Rows,
) -> tuple[Array, _Rows, Array]:
  """Rounds all rows in order; updates within a block, then all that follows."""
  k = x.shape[0]
  size = max(BLOCK // rows.group, 1) * rows.group if rows.refit else BLOCK
  size = min(size, k)
  pad = -k % size
  x = jnp.pad(x, ((0, pad), (0, 0)))
  upper = jnp.pad(upper, ((0, pad), (0, pad)))
  upper = upper + jnp.diag((jnp.arange(k + pad) >= k).astype(x.dtype))
  groups = jnp.pad(groups, (0, pad), mode='edge')

  def block(b, state):
    x, done, rows, loss = state
    start = b * size
    u = lax.dynamic_slice_in_dim(upper, start, size)
    local = lax.dynamic_slice_in_dim(u, start, size, axis=1)
    part = lax.dynamic_slice_in_dim(x, start, size)

    def row(i, inner):
      part, errors, rows, loss = inner
      g = groups[start + i]
      if rows.refit:
        rows = _refit(rows, part, i, g, start + i < k)
      q = rows.round(part[i], g)
      error = (part[i] - q) / local[i, i]
      part = (
        part
        - jnp.where(jnp.arange(size) > i, local[i], 0)[:, None] * (error[None])
      )
      part = part.at[i].set(q)
      errors = errors.at[i].set(error)
      return part, errors, rows, loss + jnp.sum(error**2) / 2

    part, errors, rows, loss = lax.fori_loop(
      0, size, row, (part, jnp.zeros_like(part), rows, loss)
    )
    later = jnp.arange(k + pad) >= start + size
    x = x - jnp.where(later, u, 0).T @ errors
    done = lax.dynamic_update_slice_in_dim(done, part, start, 0)
    return x, done, rows, loss

  state = (x, jnp.zeros_like(x), rows, jnp.float32(0))
  _, done, rows, loss = lax.fori_loop(0, (k + pad) // size, block, state)
  return done[:k], rows, loss


def _refit(rows: _Rows, part: Array, i: Array, g: Array, real: Array) -> _Rows:
  """Finds the scales of a group at its first row; padding has none."""
  size = min(rows.group, part.shape[0])

  def fit(rows):
    return rows.fitted(lax.dynamic_slice_in_dim(part, i, size), g)

  first = (i % rows.group == 0) & real
  return lax.cond(first, fit, lambda rows: rows, rows)
