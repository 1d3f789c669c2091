"""A training step with simulated quantization beside the float step and qwix.

A step is forward, backward and optimizer, compiled before. The peer trains the
same Linen model at the same bits; its ranges come from each batch, ours are
learned (LSQ) or come from each batch, too.
"""

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import optax

import quantlab as ql
from experiments.benchmarks import timing
from quantlab.models import resnet_cifar, transformer

LEARNED = ql.rule(weight=ql.int4(), input=ql.int8(per='tensor', static=True))
DYNAMIC = ql.rule(weight=ql.int4(), input=ql.int8(per='token'))


def run(config: Any) -> dict[str, Any]:
  """A case for each model.

  Args:
    config: see `configs/bench/qat.py`.
  """
  keys = jax.random.split(jax.random.key(config.seed), 3)
  c = config.model
  model = transformer.Transformer(c.vocab, c.dim, c.heads, c.blocks, c.length)
  tokens = jax.random.randint(keys[0], (c.batch, c.length), 0, c.vocab)
  params = jax.jit(model.init)(keys[1], tokens)
  steps = _ours(model.apply, params, tokens, tokens, '/kernel$')
  peer, found = _qwix(model, tokens)
  if peer is not None:
    steps['qwix'] = peer
  images = jax.random.normal(keys[0], (config.images, 32, 32, 3))
  labels = jax.random.randint(keys[2], (config.images,), 0, 10)
  resnet = resnet_cifar.init(keys[2])
  cases = {
    'transformer': _case(steps, config),
    'resnet20': _case(
      _ours(resnet_cifar.apply, resnet, images, labels, ''), config
    ),
  }
  return {'cases': cases, 'peers': {'qwix': found}}


def _case(steps, config) -> dict[str, Any]:
  samples = timing.interleaved(
    {name: {'step': step} for name, step in steps.items()}, config.rounds
  )
  limits = {'lsq': config.limits.float}
  case = timing.case(
    samples, 'float', limits, 'W4A8; forward, backward and SGD with momentum'
  )
  if 'qwix' in steps:
    of_peer = timing.case(samples, 'qwix', {'lsq': config.limits.qwix})
    case['of_qwix'] = {k: of_peer[k] for k in ('ratios', 'limits', 'met')}
  return case


def _ours(apply, params, x, y, pattern) -> dict[str, Any]:
  """Steps in float, with learned steps, and with ranges of each batch."""
  steps = {'float': _step(apply, params, x, y)}
  for name, rule, estimator in (
    ('lsq', LEARNED, ql.estimators.lsq()),
    ('dynamic', DYNAMIC, ql.estimators.clipped_ste()),
  ):
    if name == 'dynamic' and x.ndim > 2:
      continue  # the inputs of convolutions have no tokens
    plan = ql.plan(apply, params, {pattern: rule}, x)
    train = ql.qat(apply, plan, estimator)
    steps[name] = _step(train.apply, train.init(params, [x]), x, y)
  return steps


def _step(apply, variables, x, y):
  """A compiled step; each call starts from the same variables."""
  optimizer = optax.sgd(1e-3, momentum=0.9)

  def loss(variables):
    found = optax.softmax_cross_entropy_with_integer_labels(
      apply(variables, x), y
    )
    return found.mean()

  @jax.jit
  def step(variables, state):
    value, gradient = jax.value_and_grad(loss)(variables)
    updates, state = optimizer.update(gradient, state, variables)
    return optax.apply_updates(variables, updates), state, value

  state = optimizer.init(variables)
  compiled = step.lower(variables, state).compile()
  return lambda _: jax.block_until_ready(compiled(variables, state))


def _qwix(model, tokens):
  """The peer's step on the same model, and what is known of it."""
  try:
    import qwix
  except ImportError as error:
    why = f"not compared: {error}; pip install 'quantlab[bench]'"
    return None, {'used': False, 'fair': None, 'version': None, 'why': why}
  rule = qwix.QtRule(
    module_path='.*',
    op_names=('dot_general',),  # Dense; attention's products are einsums
    weight_qtype=jnp.int4,
    act_qtype=jnp.int8,
  )
  trained = qwix.quantize_model(model, qwix.QtProvider([rule]))
  variables = jax.jit(trained.init)(jax.random.key(0), tokens)
  return _step(trained.apply, variables, tokens, tokens), {
    'used': True,
    'fair': True,
    'version': importlib.metadata.version('qwix'),
    'why': 'QtProvider on the same Linen model, shapes and dtypes; ranges of '
    'each batch, gradients in float',
  }
