"""Layer-wise relevance of every site (LRP-QViT, arXiv 2401.11243).

The paper gives bits to relevant layers: with relevance c of a layer it
maximizes sum_l c_l b_l within a budget ('lrp_bits'). That is linear in bits, so
that its optimum has nearly every site at the fewest bits or at the most. The
noise of a uniform quantizer falls fourfold with each bit, and what is minimized
by default is the relevance it falls on, sum_l c_l 4^-b_l ('lrp').
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab import planner, rewrites
from quantlab.calibration import batches as batches_lib
from quantlab.core import presets
from quantlab.quality import metric as metrics
from quantlab.recipe import Recipe, Rule
from quantlab.search import objectives
from quantlab.search.program import Program, split
from quantlab.search.simulate import Relevance

# Unit of each.
METRICS = {'lrp': 'relevance x noise', 'lrp_bits': 'relevance x bits'}
FLOAT_BITS = 16  # what bits are taken from


def relevance(
  program: Program,
  batches: Iterable[Any],
  task: metrics.Metric,
  track: Callable,
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Any]]:
  """Relevance c of the rows, and what it makes of every option.

  Relevance starts at the largest logit of every position that counts and is
  passed down by the epsilon rule; c is the mean over examples of sum |R| at
  the row's products, as a share of all rows.

  Returns:
    Values with standard errors over batches, by metric and option: 'lrp' and
    'lrp_bits'; facts with the shares.
  """
  rows = program.space.rows
  places = program.space.places
  sites = list(dict.fromkeys(places[s][0] for r in rows for s in r.sites))
  hook = Rule(output=presets.int8(per='tensor'))
  inputs, _ = split(batches_lib.first(batches), task.targets)
  plan = planner.plan(
    program.apply,
    program.params,
    Recipe.of_sites(dict.fromkeys(sites, hook)),
    *inputs,
  )
  run = rewrites.fake_quantized(program.apply, plan, Relevance())

  @jax.jit
  def sums(params, inputs, targets):
    def start(slots):
      state = {s: {'output': {'alpha': x}} for s, x in slots.items()}
      outputs = run({'weights': params, 'sites': state}, *inputs)
      if task.name == 'sentence_pairs':
        return (outputs[:, 0] * outputs[:, 1]).sum()
      counted = task.counts(outputs, *targets)
      return jnp.where(counted, outputs.max(-1), 0).sum()

    slots = {s: jnp.zeros(plan.sites[s].loops) for s in sites}
    found = jax.grad(start)(slots)

    def total(name):
      site, layer = places[name]
      return (found[site] if layer is None else found[site][layer]).sum()

    return jnp.stack([sum(map(total, r.sites)) for r in rows])

  samples = []
  for i, batch in enumerate(track(batches, 'relevance')):
    inputs, targets = split(batch, task.targets, i)
    samples.append(np.asarray(sums(program.params, inputs, targets), float))
  each = np.array(samples)  # batches, rows
  weights = each.sum(1)
  if not weights.sum() > 0:
    raise ValueError(
      'there is no relevance to share: the largest outputs are zero at every '
      'position that counts'
    )
  shares = each / np.where(weights > 0, weights, 1)[:, None]
  c, spread = objectives.over_batches(shares, weights)
  entries = {
    name: [
      (c[i] * f(rule), spread[i] * f(rule))
      for i, r in enumerate(rows)
      for rule in r.rules
    ]
    for name, f in (('lrp', noise), ('lrp_bits', bits_taken))
  }
  return entries, {'relevance': {r.name: c[i] for i, r in enumerate(rows)}}


def noise(rule: Rule | None) -> float:
  """Noise power of what an option quantizes, 4^-bits each; 0 in float."""
  return (
    sum((4.0**-q.bits for q in rule.quantizers.values()), 0.0) if rule else 0.0
  )


def bits_taken(rule: Rule | None) -> float:
  """Mean bits that an option takes away from what it quantizes."""
  found = (
    [FLOAT_BITS - q.bits for q in rule.quantizers.values()] if rule else []
  )
  return float(np.mean(found)) if found else 0.0
