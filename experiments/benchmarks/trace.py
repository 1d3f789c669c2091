"""What quantization costs before and beside the computation itself.

Tracing an unchanged program through the rewrite, tracing and compiling W8A8
beside a peer, and a calibration pass beside the bare forward pass.
"""

import functools
import importlib.metadata
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import quantlab as ql
from experiments.benchmarks import timing
from quantlab import rewrites
from quantlab.calibration import ranges
from quantlab.models import llama, resnet_cifar, transformer

W8A8 = {'/kernel$': ql.rule(weight=ql.int8(), input=ql.int8(per='token'))}
STATIC = ql.rule(weight=ql.int8(), input=ql.int8(per='tensor', static=True))


def run(config: Any) -> dict[str, Any]:
  """All cases by name, and what is known of the peers.

  Args:
    config: see `configs/bench/trace.py`.
  """
  keys = jax.random.split(jax.random.key(config.seed), 4)
  c = config.model
  tokens = jax.random.randint(keys[0], (c.batch, c.length), 0, c.vocab)
  sizes = llama.Config(
    c.vocab, c.dim, 4 * c.dim, c.blocks, c.heads, kv_heads=c.heads
  )
  bare = functools.partial(llama.apply, config=sizes)
  bare_params = jax.jit(llama.init, static_argnums=1)(keys[1], sizes)
  linen = transformer.Transformer(c.vocab, c.dim, c.heads, c.blocks, c.length)
  linen_params = jax.jit(linen.init)(keys[2], tokens)

  cases: dict[str, Any] = {}
  models: list[tuple[str, Callable, Any]] = [
    ('bare', bare, bare_params),
    ('linen', linen.apply, linen_params),
  ]
  for name, apply, params in models:
    cases |= _tracing(name, apply, params, tokens, config)
  beside, peers = compiling(linen, linen_params, tokens, config)
  cases |= beside
  images = jax.random.normal(keys[3], (config.images, 32, 32, 3))
  resnet_params = jax.jit(resnet_cifar.init)(keys[3])
  models.append(('resnet20', resnet_cifar.apply, resnet_params))
  for name, apply, params in models:
    batch = images if name == 'resnet20' else tokens
    cases |= _calibrating(name, apply, params, batch, config)
  return {'cases': cases, 'peers': peers}


def _tracing(name, apply, params, tokens, config) -> dict[str, Any]:
  """The identity rewrite beside the float trace, cold and with warm caches."""
  kept = ql.quantized(apply)

  def trace(make):
    # A new function each time, or jit would find its earlier trace.
    return {'trace': lambda _: jax.jit(make()).trace(params, tokens)}

  float_ = trace(lambda: lambda p, x: apply(p, x))
  identity = trace(lambda: lambda p, x: ql.quantized(apply)(p, x))
  again = trace(lambda: lambda p, x: kept(p, x))
  limits = {'identity': config.limits.trace}
  cold = timing.interleaved(
    {'float': float_, 'identity': identity},
    config.rounds.trace,
    before=jax.clear_caches,
  )
  warm = timing.interleaved(
    {'float': float_, 'identity': identity, 'identity_again': again},
    config.rounds.trace,
  )
  return {
    f'trace/{name}/cold': timing.case(
      cold, 'float', limits, "JAX's caches are cleared before each trace"
    ),
    f'trace/{name}/warm': timing.case(
      warm,
      'float',
      limits,
      "JAX's caches stay; identity is a new wrapper each time, "
      'identity_again a wrapper that has traced these shapes before',
    ),
  }


def compiling(model, params, tokens, config):
  """W8A8 from function to executable, beside the peer and the float model."""
  made = ql.ptq(model.apply, params, W8A8, [(tokens,)])
  entries = {
    'float': (lambda: model.apply, params),
    # A new wrapper each time: finding the sites again is part of the trace.
    'quantlab': (lambda: ql.quantized(model.apply, made.plan), made.params),
  }
  peer, found = _qwix(model, params, tokens)
  if peer is not None:
    entries['qwix'] = peer
  products = {k: _products(*entry, tokens) for k, entry in entries.items()}
  if peer is not None and products['qwix'] != products['quantlab']:
    found |= {'fair': False, 'why': f'other products: {products}'}

  def stages(make, variables):
    return {
      'trace': lambda _: _fresh(make).trace(variables, tokens),
      'lower': lambda traced: traced.lower(),
      'compile': lambda lowered: lowered.compile(),
    }

  samples = timing.interleaved(
    {k: stages(*entry) for k, entry in entries.items()},
    config.rounds.compile,
    before=jax.clear_caches,
  )
  baseline = 'float' if peer is None else 'qwix'
  limits = {} if peer is None else {'quantlab': config.limits.compile}
  case = timing.case(
    samples,
    baseline,
    limits,
    'int8 weights per channel, int8 activations per token; products of two '
    "activations and the embedding in float; JAX's caches are cleared before "
    'each',
  )
  case['integer_products'] = products
  return {'compile/linen': case}, {'qwix': found}


def _fresh(make):
  function = make()
  return jax.jit(lambda v, x: function(v, x))


def _products(make, variables, tokens) -> int:
  """How many products of the lowered program are on int8."""
  jax.clear_caches()  # the peer would meet traces of the float model
  text = _fresh(make).lower(variables, tokens).as_text()
  return len(re.findall(r'dot_general.*xi8>', text))


def _qwix(model, params, tokens):
  """The same model and precision in qwix: (make, variables), what is known."""
  try:
    import qwix
  except ImportError as error:
    why = f"not compared: {error}; pip install 'quantlab[bench]'"
    return None, {'used': False, 'fair': None, 'version': None, 'why': why}
  rule = qwix.QuantizationRule(
    module_path='.*',
    op_names=('dot_general',),  # Dense; attention's products are einsums
    weight_qtype=jnp.int8,
    act_qtype=jnp.int8,
  )

  def make():
    return qwix.quantize_model(model, qwix.PtqProvider([rule])).apply

  quantized = qwix.quantize_model(model, qwix.PtqProvider([rule]))
  abstract = jax.eval_shape(quantized.init, jax.random.key(0), tokens)
  weights = qwix.quantize_params(params['params'], abstract['params'])
  return (make, {'params': weights}), {
    'used': True,
    'fair': True,
    'version': importlib.metadata.version('qwix'),
    'why': 'PtqProvider on the same Linen model, shapes and dtypes',
  }


def _calibrating(name, apply, params, batch, config):
  """A pass that finds absmax ranges beside the bare forward pass."""
  pattern = '^/blocks/' if name == 'bare' else '/kernel$'
  plan = ql.plan(apply, params, {pattern: STATIC}, batch)
  observed = rewrites.observe(
    apply, ranges.Extremes(plan.static), plan, quantize=False
  )
  # As `ranges.calibrate` runs it: statistics alone, fetched for every batch.
  watch = jax.jit(lambda p, x: observed(p, x)[1])
  forward = jax.jit(apply)

  def float_pass(_):
    for _ in range(config.batches):
      forward(params, batch).block_until_ready()

  def observed_pass(_):
    for _ in range(config.batches):
      jax.device_get(watch(params, batch))

  samples = timing.interleaved(
    {'float': {'pass': float_pass}, 'absmax': {'pass': observed_pass}},
    config.rounds.calibration,
  )
  return {
    f'calibrate/{name}': timing.case(
      samples,
      'float',
      {'absmax': config.limits.calibration},
      f'{config.batches} batches of {batch.shape}, compiled before; '
      f'{len(plan.static)} sites with a static int8 input',
    )
  }
