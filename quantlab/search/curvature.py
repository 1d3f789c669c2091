"""Traces and eigenvalues of the Hessian, operand by operand (HAWQ).

Hutchinson's estimate of the trace takes random signs v: E[v' H v] = tr(H). One
product of the whole Hessian with signs on all operands gives every block's
v_l' H_ll v_l: the terms across blocks have mean zero, and add to the spread
that is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.search import objectives
from quantlab.search.offsets import Offsets
from quantlab.search.probes import Probes
from quantlab.search.program import Operand, Program, split
from quantlab.search.simulate import kind
from quantlab.search.taylor import Expansion

Entries = list[tuple[float, float]]


def trace(
  expansion: Expansion,
  batches: Iterable[Any],
  key: jax.Array,
  probes: int,
  track: Callable,
) -> tuple[Entries, dict[str, Any]]:
  """tr(H) / n ||d||^2 of every option (HAWQ-v2, arXiv 1911.03852).

  Of an activation tr, n and ||d||^2 are means over examples.

  Returns:
    Values with standard errors over probes and batches, by option; facts
    with the traces.
  """
  program = expansion.program
  hutchinson = Probes(expansion)
  units = units_of(expansion)
  found: list[list[np.ndarray]] = []
  counts: Callable = expansion.counts
  weights: list[float] = []
  norms: dict[Operand, np.ndarray] = {}
  sizes: dict[Operand, float] = {}
  squared = expansion.norms()
  examples = 0
  for i, batch in enumerate(track(batches, 'trace')):
    inputs, targets = split(batch, expansion.task.targets, i)
    keys = jax.random.split(jax.random.fold_in(key, i), probes)
    weights.append(float(counts(program.params, inputs, targets)))
    prepared = hutchinson.linearized(program.params, inputs, targets)
    rows = [hutchinson.products(prepared, k) for k in keys]
    found.append(
      [
        np.concatenate([np.ravel(r[o]) for o in expansion.searched])
        for r in rows
      ]
    )
    b = np.shape(jax.tree.leaves(inputs)[0])[0]
    for o, x in jax.device_get(squared(program.params, inputs)).items():
      share = 1 if kind(o[1]) == 'weight' else 1 / b
      names = program.space.names(o[0])
      x = np.asarray(x, float).reshape(len(names), -1, x.shape[-1]).sum(1)
      for name, each in zip(names, x[:, :-1] * share * b, strict=True):
        norms[name, o[1]] = norms.get((name, o[1]), 0) + each
    if not sizes:
      for o, shape in hutchinson.offsets.shapes(inputs).items():
        share = 1 if kind(o[1]) == 'weight' else b
        names = program.space.names(o[0])
        size = math.prod(shape) / share / len(names)
        sizes |= {(name, o[1]): size for name in names}
    examples += b
  samples = np.array(found, float)  # batches, probes, units
  mean, spread = _two_level(samples, np.array(weights))
  facts = {
    'traces': {
      '/'.join(o): {'value': mean[j], 'stderr': spread[j], 'n': sizes[o]}
      for j, o in enumerate(units)
    }
  }
  entries = []
  for row, option in program_flat(program):
    sites = program.space.rows[row].sites
    weight = np.array(
      [
        norms[o][option] / examples / sizes[o] if o[0] in sites else 0.0
        for o in units
      ]
    )
    drawn = (samples @ weight)[..., None]
    value, error = _two_level(drawn, np.array(weights))
    entries.append((float(value[0]), float(error[0])))
  return entries, facts


def units_of(expansion: Expansion) -> list[Operand]:
  """Operands by what rows call their site: layer by layer where they do."""
  names = expansion.program.space.names
  return [(n, role) for site, role in expansion.searched for n in names(site)]


def program_flat(program: Program) -> list[tuple[int, int]]:
  """(row, option) of every entry, as `Table.flat` has them."""
  return [
    (i, k)
    for i, r in enumerate(program.space.rows)
    for k in range(len(r.options))
  ]


def _two_level(
  samples: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard error of (batches, probes, ...) draws.

  The larger of the spread of all draws and, with more than one batch, that
  of the batches.
  """
  b, p = samples.shape[:2]
  flat = samples.reshape(b * p, *samples.shape[2:])
  mean, error = objectives.over_batches(flat, np.repeat(weights, p))
  _, between = objectives.over_batches(samples.mean(1), weights)
  return mean, np.fmax(error, between)


def eigenvalue(
  expansion: Expansion,
  batches: Iterable[Any],
  key: jax.Array,
  iterations: int,
  tolerance: float,
  track: Callable,
) -> tuple[Entries, dict[str, Any]]:
  """lambda_max ||d||^2 of every option (HAWQ, arXiv 1905.03696).

  Power iteration on the block of each row's weights, v <- H_ll v / |H_ll v|,
  until the Rayleigh quotient moves by less than `tolerance` of itself. What
  it finds is the eigenvalue of largest magnitude.

  Returns:
    Values with standard errors over batches, by option; facts with the
    eigenvalues, their residuals |H v - lambda v| and the iterations taken.
  """
  program = expansion.program
  wrong = [o for o in expansion.searched if kind(o[1]) != 'weight']
  if wrong:
    raise ValueError(
      f"metric 'eigenvalue' is of weights alone, and {wrong[0][0]!r} also "
      f"chooses its {wrong[0][1]}; metric 'trace' has both"
    )
  power = _Power(expansion, list(batches))
  found, facts = [], {}
  for i, row in enumerate(track(program.space.rows, 'eigenvalues')):
    value, error, more = power(
      row.sites, jax.random.fold_in(key, i), iterations, tolerance
    )
    found.append((value, error))
    facts[row.name] = {'value': value, 'stderr': error, **more}
  norms = weight_norms(expansion, power.batches)
  entries = [
    (found[i][0] * norms[j], found[i][1] * norms[j])
    for j, (i, _) in enumerate(program_flat(program))
  ]
  return entries, {'eigenvalues': facts}


def weight_norms(expansion: Expansion, batches: Sequence[Any]) -> np.ndarray:
  """||Q(w) - w||^2 of every option, over all weights of its row."""
  program = expansion.program
  inputs, _ = split(next(iter(batches)), expansion.task.targets)
  squared = jax.device_get(expansion.norms()(program.params, inputs))
  places, found = program.space.places, []
  for i, k in program_flat(program):
    sites = [places[name] for name in program.space.rows[i].sites]
    found.append(
      sum(
        float(_layer(np.asarray(x, float)[..., k], layer).sum())
        for site, layer in sites
        for o, x in squared.items()
        if o[0] == site and kind(o[1]) == 'weight'
      )
    )
  return np.array(found)


def _layer(x, layer: int | None):
  return x if layer is None else x[layer]


class _Power:
  """Power iteration on one row's block of the Hessian."""

  def __init__(self, expansion: Expansion, batches: Sequence[Any]):
    self.program, self.task = expansion.program, expansion.task
    self.batches = batches
    self.offsets = Offsets(expansion)
    self.shapes = self.offsets.shapes(split(batches[0], self.task.targets)[0])
    self._product = jax.jit(self._hessian_product)
    counts, params = expansion.counts, self.program.params
    self.weights = np.array(
      [
        float(counts(params, *split(b, self.task.targets, i)))
        for i, b in enumerate(batches)
      ]
    )

  def _hessian_product(self, params, v, inputs, targets):
    zero = jax.tree.map(jnp.zeros_like, v)
    loss = self.offsets.loss(params, inputs, targets)
    return jax.jvp(jax.grad(lambda x: loss(x, {})), (zero,), (v,))[1]

  def _products(self, v) -> list[dict[Operand, jax.Array]]:
    """H v of each batch, on the operands of v that are not zero."""
    return [
      self._product(self.program.params, v, *split(b, self.task.targets, i))
      for i, b in enumerate(self.batches)
    ]

  def _mean(self, each, operand):
    """Over the batches that count."""
    used = [
      (w, h[operand]) for w, h in zip(self.weights, each, strict=True) if w > 0
    ]
    return sum(w * h for w, h in used) / sum(w for w, _ in used)

  def _masks(self, names):
    """1 where a row's block is, by operand: all of it, or some layers."""
    masks: dict[Operand, Any] = {}
    places = self.program.space.places
    for site, layer in map(places.__getitem__, names):
      for o, shape in self.shapes.items():
        if o[0] == site:
          where = ... if layer is None else layer
          mask = masks.get(o, jnp.zeros((*shape[:1], *[1] * (len(shape) - 1))))
          masks[o] = mask.at[where].set(1)
    return masks

  def __call__(self, sites, key, iterations, tolerance):
    masks = self._masks(sites)
    mine = [o for o in self.shapes if o in masks]
    v = {
      o: jax.random.normal(jax.random.fold_in(key, j), shape) * masks[o]
      if o in mine
      else jnp.zeros(shape)
      for j, (o, shape) in enumerate(self.shapes.items())
    }
    v = _scaled(v, mine, 1 / _norm(v, mine))
    value, step = 0.0, 0
    while True:
      step += 1
      each = self._products(v)
      h = {o: masks[o] * self._mean(each, o) for o in mine}
      before, value = value, _dot(v, h, mine)
      residual = {o: h[o] - value * v[o] for o in mine}
      size = _norm(h, mine)
      moved = abs(value - before) > tolerance * abs(value)
      if step == iterations or not moved or not size > 0:
        break
      v = _scaled({**v, **h}, mine, 1 / size)
    quotients = np.array([_dot(v, hb, mine) for hb in each])
    _, error = objectives.over_batches(quotients, self.weights)
    facts = {'residual': _norm(residual, mine), 'iterations': step}
    return value, float(error), facts


def _dot(a, b, names) -> float:
  return float(sum(jnp.vdot(a[o], b[o]) for o in names))


def _norm(a, names) -> float:
  return float(np.sqrt(_dot(a, a, names)))


def _scaled(a, names, factor):
  return {o: x * factor if o in names else x for o, x in a.items()}
