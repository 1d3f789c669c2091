"""What a search costs: its table, its Hessian products, its population.

A full table with one compilation beside a loop that compiles every entry anew;
random probes of the Hessian beside forward passes; a population of plans as a
search runs it, and in one `lax.map`, beside as many calls of a compiled
function. (In one `vmap` every plan has weights of its own: a convolution of as
many groups, which no CPU library has a fast path for.)
"""

from typing import Any

import jax
import jax.numpy as jnp

import quantlab as ql
from experiments.benchmarks import timing
from quantlab import quality, search
from quantlab.models import resnet_cifar
from quantlab.recipe import Recipe
from quantlab.search import curvature, objectives, taylor


def run(config: Any) -> dict[str, Any]:
  """All cases by name.

  Args:
    config: see `configs/bench/search.py`.
  """
  keys = jax.random.split(jax.random.key(config.seed), 3)
  apply = resnet_cifar.apply
  shape = {k: config.model[k] for k in ('blocks', 'widths')}
  params = jax.jit(lambda key: resnet_cifar.init(key, **shape))(keys[0])
  most = max(config.images.values())
  images = jax.random.normal(keys[1], (most, 32, 32, 3))
  labels = jax.random.randint(keys[2], (most,), 0, 10)
  batches = {k: (images[:n], labels[:n]) for k, n in config.images.items()}
  choices = {'/kernel$': [getattr(ql, f'int{b}')() for b in config.widths]}
  found = search.space(apply, params, choices, images)
  program = search.Program(apply, params, found, [(images,)])
  cases = {
    'table': _table(config, apply, params, choices, batches['table'], found),
    'probes': _probes(config, program, batches['probes']),
    'population': _population(config, program, batches['population']),
  }
  return {'cases': cases, 'peers': {}}


def _table(config, apply, params, choices, batch, found) -> dict[str, Any]:
  """Everything that a user waits for, from the function to the table."""
  images, _ = batch
  float_ = jax.jit(apply)(params, images)
  divergence = objectives.mean(quality.classification, 'kl')
  entries = [(r, k) for r in found.rows for k in range(len(r.options))]
  some = entries[:: max(1, len(entries) // config.compiled)]

  def ours(_):
    ql.sensitivity(
      apply, params, choices, [batch], 'kl', task=quality.classification
    )

  def loop(_):
    for row, k in some:
      rules = dict.fromkeys(row.sites, row.rules[k])
      plan = ql.plan(apply, params, Recipe.of_sites(rules), images)
      simulated = ql.fake_quantized(apply, plan)

      def entry(params, x, reference, simulated=simulated):
        return divergence(reference, simulated(params, x), batch[1:])

      jax.block_until_ready(jax.jit(entry)(params, images, float_))

  contestants = {'recompiling': {'all': loop}, 'one_compilation': {'all': ours}}
  samples = timing.interleaved(
    contestants, config.rounds.table, before=jax.clear_caches
  )
  share = len(entries) / len(some)
  for stages in samples['recompiling'].values():
    for stage, seconds in stages.items():
      stages[stage] = [s * share for s in seconds]
  return timing.case(
    samples,
    'recompiling',
    {'one_compilation': config.limits.table},
    f'{len(entries)} entries, {len(images)} images; of the '
    f'loop {len(some)} entries were run, and their seconds taken {share:g} '
    'times',
  )


def _probes(config, program, batch) -> dict[str, Any]:
  images, labels = batch
  expansion = taylor.Expansion(program, quality.classification, 'loss')
  probes = curvature.Probes(expansion)
  forward = jax.jit(program.apply)
  keys = jax.random.split(jax.random.key(config.seed), config.probes)

  def passes(_):
    for _ in keys:
      jax.block_until_ready(forward(program.params, images))

  def products(_):
    prepared = probes.linearized(program.params, (images,), (labels,))
    for key in keys:
      jax.block_until_ready(probes.products(prepared, key))

  return timing.case(
    timing.interleaved(
      {'forward': {'all': passes}, 'probes': {'all': products}},
      config.rounds.probes,
    ),
    'forward',
    {'probes': config.limits.probes},
    f'{config.probes} of each, {len(images)} images; the '
    'linearization of the batch is counted; compiled before',
  )


def _population(config, program, batch) -> dict[str, Any]:
  images, labels = batch
  key = jax.random.key(config.seed)
  shape = config.plans, len(program.space.rows)
  drawn = jax.random.randint(key, shape, 0, len(config.widths))
  plans = [program.choice(p) for p in drawn.tolist()]
  states = [program.bits(p) for p in plans]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
  simulated = program.simulated()
  divergence = objectives.mean(quality.classification, 'kl')
  reference = jax.jit(program.apply)(program.params, images)
  measure = search.Measure(program, [batch], quality.classification, ['kl'])

  def one(params, state, x):
    outputs = simulated(program.variables(params, state), x)
    return divergence(reference, outputs, (labels,))

  @jax.jit
  def mapped(params, states, x):
    return jax.lax.map(lambda state: one(params, state, x), states)

  @jax.jit
  def together(params, states, x):
    return jax.vmap(lambda state: one(params, state, x))(states)

  each = jax.jit(one)

  def sequential(_):
    found = [each(program.params, s, images) for s in states]
    jax.block_until_ready(found)

  def at_once(_):
    jax.block_until_ready(mapped(program.params, stacked, images))

  contestants = {
    'sequential': {'all': sequential},
    'measure': {'all': lambda _: measure(plans)},
    'lax_map': {'all': at_once},
    'vmap': {
      'all': lambda _: jax.block_until_ready(
        together(program.params, stacked, images)
      )
    },
  }
  return timing.case(
    timing.interleaved(contestants, config.rounds.population),
    'sequential',
    {'measure': config.limits.population},
    f'{config.plans} plans, {len(images)} images; compiled before',
  )
