"""Rotations: an outlier of one channel becomes a little in every channel.

QuaRot (arXiv 2404.00456): orthogonal matrices between what makes an activation
and the weights that contract it. The residual stream and the values of
attention are rotated in the weights and cost nothing; the other inputs are
rotated at run time by Kronecker products of small matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.core.tree import named_leaves
from quantlab.graph import migrate, pairs
from quantlab.graph import residual as residual_lib
from quantlab.graph.residual import Stream
from quantlab.ptq import hadamard
from quantlab.ptq.inputs import Input, inputs, replaced, rotate_input
from quantlab.ptq.transform import Context, Transform


def rotate(
  key: jax.Array | None = None,
  *,
  residual: bool = True,
  heads: bool = True,
  online: bool = True,
) -> Transform:
  """Rotates activations so that they quantize better; the function stays.

  Args:
    key: of the random signs and matrices; that of `ptq` by default.
    residual: rotate residual streams, in the weights. Where norms subtract the
      mean, by matrices that keep it. Gains go into the weights after them.
    heads: rotate the values of each attention head, in the weights.
    online: rotate every other quantized input of a product with a weight, at
      run time. Products of two activations (queries and keys) are left.

  Returns:
    A prepare member of a chain. Its facts, under 'rotate': 'residual' and
    'heads' (source: size of the matrix), 'online' (sites: sizes of the
    Kronecker factors) and 'left' (what is not rotated: why).

  Raises:
    ValueError: (when run) no key, or nothing to rotate.
  """

  def run(ctx: Context) -> Context:
    work = _Work(ctx, _key(ctx, key))
    if residual:
      work.residual(turn=True)
    if heads:
      work.heads()
    if online:
      work.online()
    work.check(residual, heads, online)
    return work.ctx.noted(rotate=work.facts)

  options = {'residual': residual, 'heads': heads, 'online': online}
  return Transform('rotate', 'prepare', run, options)


def fold_norms() -> Transform:
  """Moves the gains of norms into the weights, where `rotate` would.

  What a rotation gains is told apart from what this alone does: outliers that
  a gain makes are gone (the baseline to report beside `rotate`).

  Returns:
    A prepare member of a chain.
  """

  def run(ctx: Context) -> Context:
    work = _Work(ctx, None)
    work.residual(turn=False)
    work.check(True, False, False)
    return work.ctx.noted(fold_norms=work.facts)

  return Transform('fold_norms', 'prepare', run)


def _key(ctx: Context, key: jax.Array | None) -> jax.Array:
  found = ctx.key if key is None else key
  if found is None:
    raise ValueError(
      'a rotation is random; give ql.rotate(key=...) or ql.ptq(..., key=...)'
    )
  return found


class _Work:
  """A context on its way, and what was done to it."""

  def __init__(self, ctx: Context, key: jax.Array | None):
    self.ctx, self.key = ctx, key
    self.done: dict[str, dict[str, Any]] = {}
    self.left: dict[str, str] = {}
    self.covered: set[str] = set()

  @property
  def facts(self) -> dict[str, Any]:
    return {**self.done, 'left': self.left}

  def rng(self, name: str) -> np.random.Generator:
    assert self.key is not None
    return hadamard.generator(self.key, name)

  def note(self, part: str, name: str, fact: Any) -> None:
    self.done.setdefault(part, {})[name] = fact

  def check(self, residual: bool, heads: bool, online: bool) -> None:
    """Something must have been rotated."""
    if any(self.done.values()):
      return
    looked = [
      (residual, 'residual streams read through norms'),
      (heads, 'values of attention that reach an output projection'),
      (online, 'quantized inputs of matrix products'),
    ]
    why = ''.join(f'\n  {name}: {why}' for name, why in self.left.items())
    raise ValueError(
      'nothing to rotate; looked for '
      + (', '.join(text for on, text in looked if on) or 'nothing')
      + why
    )

  # Residual streams -----------------------------------------------------------

  def residual(self, turn: bool) -> None:
    """Folds gains and rotates what they lay between."""
    for stream in residual_lib.of_traced(self.ctx.traced):
      why = stream.why or self._unfit(stream.sites, stream.written)
      why = why or self._fold(stream)
      if why is not None:
        self.left[f'stream of {stream.source}'] = why
      elif turn:
        self._turn(stream)
        self.covered |= set(stream.sites)
        self.note('residual', stream.source, stream.channels)
      else:
        self.note('residual', stream.source, [f.gain for f in stream.folds])

  def _unfit(self, reads: Iterable[str], writes: Iterable[str]) -> str | None:
    """Why the weights of sites cannot be rotated now."""
    reads, writes = tuple(reads), tuple(writes)
    if not {*reads, *writes} & set(self.ctx.plan.quantized):
      return 'no weight of it is quantized'
    for site, roles in self.ctx.state.items():
      if site in reads and 'transform' in roles:
        return f'the input of {site!r} is changed at run time; rotate first'
      if site in writes and 'bias' in roles:
        return f'the output of {site!r} is shifted at run time; rotate first'
    return None

  def _fold(self, stream: Stream) -> str | None:
    """Makes the gains one; why not, if it cannot be."""
    params = dict(named_leaves(self.ctx.params))
    for fold in stream.folds:
      gain = jnp.asarray(params[fold.gain]).astype(jnp.float32) + fold.offset
      if bool((gain == 1).all()):
        continue
      if fold.pair is None:
        return f'its gain {fold.gain!r} cannot be folded: {fold.why}'
      if not bool((jnp.isfinite(gain) & (gain != 0)).all()):
        return f'its gain {fold.gain!r} has zeros'
      [member] = [m for m in fold.pair.producers if m.role == 'gain']
      scale = np.zeros(fold.pair.shape, np.float32).reshape(-1)
      index = np.broadcast_to(member.index, gain.shape).reshape(-1)
      scale[index] = np.asarray(gain).reshape(-1)
      params = migrate.scale_pair(
        params, fold.pair, scale.reshape(fold.pair.shape)
      )
    self.ctx = replaced(self.ctx, params)
    return None

  def _turn(self, stream: Stream) -> None:
    rng = self.rng(f'residual/{stream.source}')
    make = hadamard.mean_keeping if stream.keeps else hadamard.rotation
    matrix = make(rng, stream.channels)
    params = dict(named_leaves(self.ctx.params))
    assert stream.pair is not None
    turned = migrate.rotate_pair(params, stream.pair, jnp.asarray(matrix))
    self.ctx = replaced(self.ctx, turned)

  # Heads ----------------------------------------------------------------------

  def heads(self) -> None:
    """Rotates the values of each head."""
    for pair in pairs.of_traced(self.ctx.traced):
      if 'rotate' not in pair.allows:
        continue
      size = pair.channels // pair.heads
      why = self._unfit(pair.sites, [pair.source])
      if why is not None:
        self.left[f'values of {pair.source}'] = why
        continue
      rng = self.rng(f'heads/{pair.source}')
      matrix = hadamard.rotation(rng, size)
      params = dict(named_leaves(self.ctx.params))
      turned = migrate.rotate_pair(
        params, pair, jnp.broadcast_to(matrix, (*pair.loops, size, size))
      )
      self.ctx = replaced(self.ctx, turned)
      self.covered |= set(pair.sites)
      self.note('heads', pair.source, size)

  # At run time ----------------------------------------------------------------

  def online(self) -> None:
    """Rotates the quantized inputs that are left."""
    for where in inputs(self.ctx):
      wanted = tuple(
        s
        for s in where.sites
        if s.id not in self.covered
        and (rule := self.ctx.plan.sites[s.id].rule) is not None
        and rule.input is not None
      )
      # One input may be read whole by one product, in part by another.
      sizes = {s.id: where.places[s.id].shape[-1] for s in wanted}
      for size in sorted(set(sizes.values())):
        sites = tuple(s for s in wanted if sizes[s.id] == size)
        self._at_run_time(dataclasses.replace(where, sites=sites))

  def _at_run_time(self, where: Input) -> None:
    rng = self.rng(f'online/{where.name}')
    channels = where.places[where.sites[0].id].shape[-1]
    factors = hadamard.factors(rng, channels)
    signs = hadamard.signs(rng, channels)
    if channels < 2:
      self.left[where.name] = 'it has one channel'
      return
    try:
      self.ctx = rotate_input(
        self.ctx,
        where,
        jnp.asarray(signs, jnp.float32),
        [jnp.asarray(f, jnp.float32) for f in factors],
      )
    except ValueError as error:  # a convolution, a tied weight
      self.left[where.name] = str(error)
      return
    self.covered |= {s.id for s in where.sites}
    self.note('online', where.name, list(hadamard.sizes(channels)))
