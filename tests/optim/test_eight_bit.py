"""8-bit optimizer states: what is stored, what it costs, how it trains."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from oracle import formats as oracle

from quantlab.core import is_qtensor, nbytes
from quantlab.data import embedded
from quantlab.optim import FIELDS, eight_bit
from quantlab.runtime import make_mesh

pytestmark = pytest.mark.as_for_users


class Signed(NamedTuple):
  mu: Any


class Unsigned(NamedTuple):
  nu: Any


def keeping(record):
  """A transformation whose state is what it was given."""
  return optax.GradientTransformation(
    record, lambda updates, state, params: (updates, record(updates))
  )


def leaves(tree):
  return jax.tree.leaves(tree, is_leaf=is_qtensor)


def blocks(x, block=256):
  """Blocks along the last axis, the last one padded with zeros."""
  pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
  return np.pad(x, pad).reshape(*x.shape[:-1], -1, block)


@pytest.mark.parametrize('shape', [(7, 700), (4096,), (2, 9, 300)])
@pytest.mark.parametrize('record', [Signed, Unsigned])
def test_stored_moments_are_the_nearest_values(shape, record):
  name = {Signed: 'dynamic8', Unsigned: 'udynamic8'}[record]
  rng = np.random.default_rng(len(shape))
  x = rng.normal(size=shape) * np.exp2(rng.uniform(-24, 0, shape))
  x[..., :9] = 0
  x = (x if record is Signed else x * x).astype(np.float32)
  state = jax.jit(eight_bit(keeping(record)).init)(x)
  got = np.asarray(leaves(state)[0].dequantize())
  table, split = oracle.table(name), blocks(x)
  scale = np.abs(split).max(-1, keepdims=True)
  scaled = split / np.where(scale > 0, scale, 1)
  codes = oracle.nearest(name, scaled)
  if record is Unsigned:
    codes = np.maximum(codes, split > 0)  # no second moment is lost
    assert ((got > 0) == (x > 0)).all()
  want = table[codes] * scale
  # Next to a midpoint of two values the last bit of x / scale may decide.
  middle = np.abs(scaled[..., None] - (table[1:] + table[:-1]) / 2).min(-1)
  clear = middle > 1e-6 * np.abs(scaled)
  assert clear.mean() > 0.99
  np.testing.assert_allclose(blocks(got)[clear], want[clear], rtol=1e-6)


@pytest.mark.parametrize(
  'shape', [(64, 64), (3, 3, 16, 32), (4096,), (2048, 10), (16, 257), (4, 1024)]
)
def test_bytes_of_any_shape(shape):
  params = jnp.ones(shape)
  whole = jax.eval_shape(optax.adam(1e-3).init, params)
  small = jax.eval_shape(eight_bit(optax.adam(1e-3)).init, params)
  assert nbytes(small) <= 0.27 * nbytes(whole)


def test_what_is_quantized_is_read_from_the_structure():
  """Names below a field of the state are the user's own."""
  params = {'nu': jnp.ones((64, 64)), 'small': jnp.ones(4095)}
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.trace(0.9),
    optax.masked(optax.scale_by_adam(), {'nu': True, 'small': False}),
    optax.scale_by_rss(),
  )
  _, trace, masked, rss = eight_bit(optimizer).init(params)
  adam = masked.inner_state
  names = [
    s.quantizer.format.name
    for s in (trace.trace['nu'], adam.mu['nu'], adam.nu['nu'])
  ]
  assert names == ['dynamic8', 'dynamic8', 'udynamic8']
  assert rss.sum_of_squares['nu'].quantizer.format.name == 'udynamic8'
  assert isinstance(trace.trace['small'], jax.Array)
  half = eight_bit(optimizer).init(
    jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  )
  assert not any(map(is_qtensor, leaves(half)))


def test_fields_say_what_is_signed_and_what_stays():
  params = jnp.ones((64, 64))
  fields = {**FIELDS, 'nu': 'float', 'ScaleByAdamState.mu': 'unsigned'}
  state = eight_bit(optax.scale_by_adam(), fields=fields).init(params)
  assert state.mu.quantizer.format.name == 'udynamic8'
  assert isinstance(state.nu, jax.Array)


class Strange(NamedTuple):
  momentum: Any


def test_refusals():
  with pytest.raises(ValueError, match=r'Strange\.momentum.*momentum'):
    eight_bit(keeping(Strange)).init(jnp.ones((64, 64)))
  known = eight_bit(keeping(Strange), fields={'momentum': 'signed'})
  assert is_qtensor(known.init(jnp.ones((64, 64))).momentum)
  with pytest.raises(TypeError, match='takes an optax transformation'):
    eight_bit(optax.adam)
  with pytest.raises(ValueError, match='block takes a positive integer'):
    eight_bit(optax.adam(1e-3), block=0)
  with pytest.raises(ValueError, match='min_size takes a positive integer'):
    eight_bit(optax.adam(1e-3), min_size=1.5)
  with pytest.raises(ValueError, match=r"fields= takes .* \{'mu': 'int8'\}"):
    eight_bit(optax.adam(1e-3), fields={'mu': 'int8'})


def walk(optimizer, params, gradients):
  """Parameters and state after a scan over gradients."""

  def step(carry, gradient):
    params, state = carry
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  start = params, optimizer.init(params)
  return jax.lax.scan(step, start, gradients)[0]


def test_sharded_moments_stay_sharded_and_the_same(tmp_path):
  """On eight devices, inside a scan, through a checkpoint."""
  rng = np.random.default_rng(0)
  params = jnp.asarray(rng.normal(size=(16, 512)), jnp.float32)
  gradients = jnp.asarray(rng.normal(size=(5, 16, 512)), jnp.float32)
  optimizer = eight_bit(optax.adam(0.01))
  run = jax.jit(functools.partial(walk, optimizer))
  want, state = run(params, gradients)
  rows = NamedSharding(make_mesh(data=8), PartitionSpec('data'))
  got, spread = run(jax.device_put(params, rows), gradients)
  # Devices may round a + b c in one step or in two.
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-3)
  mu = spread[0].mu
  assert mu.codes.sharding.shard_shape(mu.codes.shape)[0] == 2
  assert mu.scale.sharding.shard_shape(mu.scale.shape)[0] == 2
  with ocp.StandardCheckpointer() as keeper:
    keeper.save(tmp_path / 'state', state)
    keeper.wait_until_finished()
    back = keeper.restore(tmp_path / 'state', state)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
    np.testing.assert_array_equal(a, b)
  jax.tree.map(lambda a, b: None, state, back)  # the same static fields


def test_a_moment_is_worth_its_codes():
  """One update from quantized moments is Adam's, on what they stand for."""
  rng = np.random.default_rng(1)
  params, g1, g2 = rng.normal(size=(3, 8, 512)).astype(np.float32)
  adam, small = optax.adam(0.1), eight_bit(optax.adam(0.1))
  update = jax.jit(small.update)
  _, stored = update(g1, small.init(params), params)
  dense = jax.tree.map(
    lambda x: x.dequantize() if is_qtensor(x) else x,
    stored,
    is_leaf=is_qtensor,
  )
  want, _ = jax.jit(adam.update)(g2, dense, params)
  got, _ = update(g2, stored, params)
  np.testing.assert_array_equal(got, want)


SEEDS = 4


def losses(optimizer):
  """Validation loss of a small MLP on digits, one for each seed."""
  d = embedded.digits()
  x, y = d.train_x.reshape(-1, 64) / 16.0, d.train_y
  test_x, test_y = d.test_x.reshape(-1, 64) / 16.0, d.test_y
  sizes = [(64, 64), (64, 10)]

  def loss(params, x, y):
    for w in params[:-1]:
      x = jax.nn.relu(x @ w)
    logits = x @ params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  def one(key):
    keys = jax.random.split(key, len(sizes))
    params = [
      jax.random.normal(k, s) * np.sqrt(2 / s[0])
      for k, s in zip(keys, sizes, strict=True)
    ]

    def step(carry, key):
      params, state = carry
      at = jax.random.randint(key, (64,), 0, len(x))
      updates, state = optimizer.update(
        jax.grad(loss)(params, jnp.asarray(x)[at], jnp.asarray(y)[at]),
        state,
        params,
      )
      return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(step, start, jax.random.split(key, 120))
    return loss(params, jnp.asarray(test_x), jnp.asarray(test_y))

  return np.asarray(
    jax.lax.map(one, jax.random.split(jax.random.key(0), SEEDS))
  )


def test_trains_like_32_bits():
  """Within the spread of seeds, as arXiv 2110.02861, table 1, has it."""
  adam = optax.adam(3e-3)
  float_, small = losses(adam), losses(eight_bit(adam, min_size=512))
  assert float_.mean() < 0.3
  assert abs(small.mean() - float_.mean()) < float_.std(ddof=1)
