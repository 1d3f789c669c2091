"""Seconds of every product of a model, in each format of a search.

What a latency budget is made of: `bench.json` holds a `ql.cost.LatencyTable`
under 'latency', which a search config names as its `latency`. Each product is
measured by itself, on as many copies of its weight as exceed the caches.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

import quantlab as ql
from experiments import spaces, variants
from experiments.benchmarks import timing
from quantlab import search
from quantlab.plan import SitePlan


def run(config: Any) -> dict[str, Any]:
  """A case for each geometry; the table of all.

  Args:
    config: see `configs/bench/latency.py`.

  Raises:
    ConfigError: a site is no product of a matrix, or the model's data is not
      here.
  """
  work = spaces.workload(config.search)
  table = ql.cost.LatencyTable
  cases: dict[str, Any] = {}
  seconds: dict[str, float] = {}
  for name, options in _products(spaces.space(config.search, work)).items():
    contestants = {
      label: {'run': _chained(site, config)} for label, site in options.items()
    }
    samples = timing.interleaved(contestants, config.rounds)
    for label, site in options.items():
      count = _copies(site, config)
      for stages in samples[label].values():
        for stage, found in stages.items():
          stages[stage] = [s / count for s in found]
      median = timing.spread(samples[label]['wall']['total'])['median']
      seconds[table.key(site)] = median
    cases[name] = timing.case(samples, 'float', {}, 'seconds of one product')
  made = table(_device(), seconds)
  return {'cases': cases, 'peers': {}, 'latency': made.to_json()}


def _device() -> str:
  device = jax.devices()[0]
  return f'{device.platform} {device.device_kind}'


def _products(space: search.Space) -> dict[str, dict[str, SitePlan]]:
  """Sites by geometry and option, the float product first; each once."""
  found: dict[str, dict[str, SitePlan]] = {}
  for plan in space.columns:
    for site in plan.sites.values():
      if not site.macs:
        continue
      b, m, k, n = _sizes(site) if site.kind == 'dot' else (0, 0, 0, 0)
      if not b or (site.rule is not None and (b > 1 or not site.matrix)):
        raise variants.ConfigError(
          f'site {site.id!r} is a {site.kind} of {site.tensors[:2]}: only '
          'products of a matrix, and float ones of two activations, are '
          'measured by themselves'
        )
      bare = dataclasses.replace(site, rule=None, compute='float')
      batch = f'{b} of ' if b > 1 else ''
      options = found.setdefault(f'{batch}{k}x{n}/{m}', {})
      options.setdefault('float', bare)
      options.setdefault(search.label(site.rule), site)
  return found


def _sizes(site: SitePlan) -> tuple[int, int, int, int]:
  """Batch, rows, contraction, outputs of one iteration of a dot."""
  left, right, out = map(math.prod, site.tensors)
  each = site.macs // math.prod(site.loops)
  batch = left * right * out // each**2
  return batch, each // right, each // out, each // left


def _copies(site: SitePlan, config: Any) -> int:
  b, _, k, n = _sizes(site)
  return max(1, min(config.copies, config.rotate // (4 * b * k * n)))


def _chained(site: SitePlan, config: Any):
  """Multiplies the copies one after the other in one compiled call."""
  b, m, k, n = _sizes(site)
  batch = (b,) if b > 1 else ()
  key = jax.random.key(config.seed)
  x = jax.random.normal(jax.random.fold_in(key, 1), (*batch, m, k))
  apply, variables = _multiply, {'w': jax.random.normal(key, (*batch, k, n))}
  if site.rule is not None:
    model = ql.ptq(_multiply, variables, {'w': site.rule}, [(x,)])
    apply, variables = model.apply, model.params
  count = _copies(site, config)
  weights = [jax.tree.map(jnp.array, variables) for _ in range(count)]

  def chain(weights, x):
    for w in weights:
      x, y = jax.lax.optimization_barrier((x, apply(w, x)))
    return y

  compiled = jax.jit(chain).lower(weights, x).compile()
  return lambda _: jax.block_until_ready(compiled(weights, x))


def _multiply(params, x):
  return x @ params['w']
