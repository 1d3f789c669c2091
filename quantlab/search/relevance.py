"""Layer-wise relevance of every site (LRP-QViT, arXiv 2401.11243)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab import planner, rewrites
from quantlab.core import presets
from quantlab.quality import metric as metrics
from quantlab.recipe import Recipe, Rule
from quantlab.search.program import Program, split
from quantlab.search.simulate import Relevance

FLOAT_BITS = 16  # what an option without a quantizer counts


def relevance(
  program: Program,
  batches: Iterable[Any],
  task: metrics.Metric,
  track: Callable,
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
  """-c_l b_k of every option: relevance c of the row, bits b of the option.

  Relevance starts at the largest logit of every position that counts and is
  passed down by the epsilon rule; c is the mean over examples of sum |R| at
  the row's products, as a share of all rows. Maximizing sum_l c_l b_l within a
  budget is the paper's allocation.

  Returns:
    Values with standard errors over batches, by option; facts with the shares.
  """
  rows = program.space.rows
  places = program.space.places
  sites = list(dict.fromkeys(places[s][0] for r in rows for s in r.sites))
  hook = Rule(output=presets.int8(per='tensor'))
  first = next(iter(batches), None)
  if first is None:
    raise ValueError('there is no batch to measure on; give at least one')
  inputs, _ = split(first, task.targets)
  plan = planner.plan(
    program.apply,
    program.params,
    Recipe.of_sites(dict.fromkeys(sites, hook)),
    *inputs,
  )
  run = rewrites.fake_quantized(program.apply, plan, Relevance())

  @jax.jit
  def shares(params, inputs, targets):
    def start(slots):
      state = {s: {'output': {'alpha': x}} for s, x in slots.items()}
      outputs = run({'weights': params, 'sites': state}, *inputs)
      if task.name == 'sentence_pairs':
        return (outputs[:, 0] * outputs[:, 1]).sum()
      counted = task.counts(outputs, *targets)
      return jnp.where(counted, outputs.max(-1), 0).sum()

    slots = {s: jnp.zeros(plan.sites[s].loops) for s in sites}
    found = jax.grad(start)(slots)

    def share(name):
      site, layer = places[name]
      return (found[site] if layer is None else found[site][layer]).sum()

    by_row = jnp.stack([sum(map(share, r.sites)) for r in rows])
    return by_row / by_row.sum()

  samples = []
  for i, batch in enumerate(track(batches, 'relevance')):
    inputs, targets = split(batch, task.targets, i)
    samples.append(np.asarray(shares(program.params, inputs, targets), float))
  c = np.mean(samples, 0)
  n = len(samples)
  spread = np.std(samples, 0, ddof=1) / np.sqrt(n) if n > 1 else c * np.nan
  entries = [
    (-c[i] * bits(rule), spread[i] * bits(rule))
    for i, r in enumerate(rows)
    for rule in r.rules
  ]
  return entries, {'relevance': {r.name: c[i] for i, r in enumerate(rows)}}


def bits(rule: Rule | None) -> float:
  """Mean bits of what an option quantizes."""
  found = [q.bits for q in rule.quantizers.values()] if rule else []
  return float(np.mean(found)) if found else FLOAT_BITS
