"""Models of any size with random weights: what their structure promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quantlab.interop import from_nnx
from quantlab.models import (
  bert,
  llama,
  nnx_mlp,
  resnet_cifar,
  transformer,
  unet,
)

KEY = jax.random.key(0)
LLAMA = llama.Config(vocab=31, dim=16, hidden=24, blocks=2, heads=4, kv_heads=2)
BERT = bert.Config(vocab=31, positions=12, dim=16, hidden=24, blocks=2, heads=4)


def drawn(shapes, scale=0.3):
  """Random leaves of the shapes: compiling an init is the slower way."""
  rng = np.random.RandomState(0)
  return jax.tree.map(
    lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes
  )


def causal(apply, params):
  """Largest change of earlier logits when the last token changes."""
  tokens = jax.random.randint(KEY, (2, 9), 0, 31)
  changed = tokens.at[:, -1].set((tokens[:, -1] + 1) % 31)
  apply = jax.jit(apply)
  a, b = apply(params, tokens), apply(params, changed)
  assert jnp.abs(a[:, -1] - b[:, -1]).max() > 1e-3
  return float(jnp.abs(a[:, :-1] - b[:, :-1]).max())


def test_llama_step_by_step_equals_the_whole():
  """A prompt, then single tokens, through the cache."""
  params = llama.init(KEY, LLAMA)
  tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, LLAMA.vocab)
  whole = jax.jit(functools.partial(llama.apply, config=LLAMA))(params, tokens)
  step = jax.jit(functools.partial(llama.step, config=LLAMA))
  cache = llama.empty_cache(2, 9, LLAMA)
  logits, cache = step(params, cache, tokens[:, :4], 0)
  found = [logits]
  for i in range(4, 7):
    logits, cache = step(params, cache, tokens[:, i : i + 1], i)
    found.append(logits)
  np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=1e-5)


def test_llama_is_causal():
  apply = functools.partial(llama.apply, config=LLAMA)
  assert causal(apply, llama.init(KEY, LLAMA)) < 1e-5


@pytest.mark.parametrize('scanned', [False, True])
def test_transformer_is_causal(scanned):
  model = transformer.Transformer(vocab=31, dim=16, scanned=scanned)
  variables = drawn(jax.eval_shape(model.init, KEY, jnp.zeros((1, 9), int)))
  assert causal(model.apply, variables) < 1e-5


def test_rope_depends_on_distances_only():
  q, k = jax.random.normal(KEY, (2, 1, 1, 1, 8))
  angles = llama.rope_angles(20, 8, 100.0)

  def product(i, j):
    a = llama.rotate(q, angles[i : i + 1])
    b = llama.rotate(k, angles[j : j + 1])
    return float((a * b).sum())

  assert product(3, 5) == pytest.approx(product(11, 13), abs=1e-5)
  assert abs(product(3, 5) - product(3, 9)) > 1e-3


def test_rope_rotates_by_the_published_angles():
  # As complex numbers: pair i of position m is multiplied by exp(i m theta_i).
  x = np.asarray(jax.random.normal(KEY, (1, 5, 2, 6)), np.float64)
  theta = 10000.0 ** (-np.arange(0, 6, 2) / 6)
  turn = np.exp(1j * np.arange(5)[:, None, None] * theta)
  expected = (x[..., ::2] + 1j * x[..., 1::2]) * turn
  found = llama.rotate(jnp.asarray(x), llama.rope_angles(5, 6, 10000.0))
  np.testing.assert_allclose(found[..., ::2], expected.real, atol=1e-5)
  np.testing.assert_allclose(found[..., 1::2], expected.imag, atol=1e-5)


def test_grouped_queries_equal_repeated_keys_and_values():
  params = llama.init(KEY, LLAMA)

  def widen(p):
    attention = dict(p['attention'])
    for name in ('wk', 'wv'):
      w = attention[name].reshape(16, 2, 4)
      attention[name] = jnp.repeat(w, 2, axis=1).reshape(16, 16)
    return {**p, 'attention': attention}

  wide = {**params, 'blocks': [widen(p) for p in params['blocks']]}
  full = dataclasses.replace(LLAMA, kv_heads=4)
  tokens = jax.random.randint(KEY, (2, 9), 0, 31)
  apply = jax.jit(llama.apply, static_argnames='config')
  np.testing.assert_allclose(
    apply(params, tokens, config=LLAMA),
    apply(wide, tokens, config=full),
    rtol=1e-4,
    atol=1e-5,
  )


def test_llama_refuses_heads_that_do_not_divide():
  with pytest.raises(ValueError, match='heads must divide dim'):
    llama.Config(dim=10, heads=4)


def test_llama_init_has_the_shapes_of_the_real_one():
  params = jax.eval_shape(lambda key: llama.init(key, llama.STORIES260K), KEY)
  assert sum(a.size for a in jax.tree.leaves(params)) == 260_032
  untied = dataclasses.replace(llama.STORIES260K, tied=False)
  shapes = jax.eval_shape(lambda key: llama.init(key, untied), KEY)
  assert shapes['head']['kernel'].shape == (untied.dim, untied.vocab)
  deep = dataclasses.replace(LLAMA, blocks=24)
  shapes = jax.eval_shape(lambda key: llama.init(key, deep), KEY)
  assert len(shapes['blocks']) == 24


def test_bert_ignores_what_is_padded():
  params = bert.init(KEY, BERT)
  ids = jax.random.randint(KEY, (3, 10), 0, 31)
  mask = jnp.arange(10) < jnp.array([[4], [7], [10]])
  apply = jax.jit(functools.partial(bert.apply, params, config=BERT))
  found = apply(ids, mask)
  other = apply(jnp.where(mask, ids, 5), mask)
  np.testing.assert_allclose(found, other, atol=1e-6)
  np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), 1, rtol=1e-5)
  np.testing.assert_allclose(
    found[0], apply(ids[:1, :4], mask[:1, :4])[0], 1e-4, 1e-5
  )


@pytest.mark.parametrize('tied', [False, True])
def test_scanned_transformer_is_the_unrolled_one(tied):
  model = transformer.Transformer(vocab=31, dim=16, blocks=3, tied=tied)
  tokens = jax.random.randint(KEY, (2, 9), 0, 31)
  variables = drawn(jax.eval_shape(model.init, KEY, tokens))
  scanned = model.clone(scanned=True)
  stacked = transformer.stack_blocks(variables)
  np.testing.assert_allclose(
    jax.jit(scanned.apply)(stacked, tokens),
    jax.jit(model.apply)(variables, tokens),
    rtol=1e-4,
    atol=1e-5,
  )
  fresh = jax.eval_shape(scanned.init, KEY, tokens)
  shapes = jax.tree.map(jnp.shape, (fresh, stacked))
  assert shapes[0] == shapes[1]
  assert ('head' in variables['params']) is not tied


def test_blocks_are_stacked_in_order():
  blocks = {f'block_{i}': {'w': np.full(2, i)} for i in reversed(range(11))}
  stacked = transformer.stack_blocks({'params': {**blocks, 'head': 1}})
  assert stacked['params']['head'] == 1
  # block_10 comes after block_9, not after block_1
  w = stacked['params']['blocks']['w']
  np.testing.assert_array_equal(w[:, 0], np.arange(11))


def test_transformer_refuses_a_long_sequence():
  with pytest.raises(ValueError, match='9 > 8'):
    transformer.Transformer(context=8).init(KEY, jnp.zeros((1, 9), int))


def test_unet_keeps_the_shape_and_reads_time_and_skips():
  model = unet.Unet(widths=(8, 16))
  x = jax.random.normal(KEY, (2, 8, 8, 1))
  variables = drawn(jax.eval_shape(model.init, KEY, x, jnp.zeros(2)))
  apply = jax.jit(model.apply)
  early, late = (apply(variables, x, jnp.full(2, t)) for t in (1.0, 900.0))
  assert early.shape == x.shape
  assert jnp.abs(early - late).max() > 1e-3
  # The second half of what `up_0` normalises is the skip: it must be read.
  loud = jax.tree.map(lambda p: p, variables)
  scale = loud['params']['up_0']['norm1']['scale']
  loud['params']['up_0']['norm1']['scale'] = scale.at[-8:].mul(2)
  assert jnp.abs(apply(loud, x, jnp.ones(2)) - early).max() > 1e-3


def test_resnet_of_any_depth():
  params = jax.eval_shape(lambda key: resnet_cifar.init(key, blocks=2), KEY)
  x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  assert jax.eval_shape(resnet_cifar.apply, params, x).shape == (2, 10)
  assert [len(stage) for stage in params['stages']] == [2, 2, 2]
  twenty = jax.eval_shape(resnet_cifar.init, KEY)
  assert sum(a.size for a in jax.tree.leaves(twenty)) == 271_098


class Dropped(nnx.Module):
  """Layers in a list, statistics, and a random stream."""

  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

  def __call__(self, x):
    x = self.drop(self.norm(x))
    for layer in self.layers:
      x = layer(x)
    return x

  def features(self, x):
    return self.norm(x)


def test_nnx_module_as_a_function():
  module = nnx_mlp.Mlp(5, 8, 3, nnx.Rngs(0))
  apply, params = from_nnx(module)
  x = jax.random.normal(KEY, (4, 5))
  np.testing.assert_allclose(apply(params, x), module(x), rtol=1e-6)
  np.testing.assert_allclose(jax.jit(apply)(params, x), module(x), rtol=1e-5)
  assert {name: set(p) for name, p in params.items() if name != 'mix'} == {
    'up': {'kernel', 'bias'},
    'norm': {'scale', 'bias'},
    'head': {'kernel', 'bias'},
  }
  assert isinstance(params['mix'], jax.Array)


def test_nnx_statistics_are_in_the_tree_and_nothing_is_written():
  module = Dropped(nnx.Rngs(0))
  module.eval()
  apply, params = from_nnx(module)
  x = jax.random.normal(KEY, (6, 4))
  before = np.asarray(apply(params, x))
  np.testing.assert_allclose(before, module(x), rtol=1e-6)
  assert set(params) == {'norm', 'layers'}  # no random state
  assert set(params['norm']) == {'scale', 'bias', 'mean', 'var'}
  assert [set(layer) for layer in params['layers']] == [{'kernel', 'bias'}] * 2
  moved = jax.tree.map(lambda p: p, params)
  moved['norm']['mean'] = params['norm']['mean'] + 1
  assert np.abs(np.asarray(apply(moved, x)) - before).max() > 1e-2
  np.testing.assert_array_equal(apply(params, x), before)


def test_nnx_other_methods_and_refusals():
  module = Dropped(nnx.Rngs(0))
  module.eval()
  apply, params = from_nnx(module, method='features')
  x = jax.random.normal(KEY, (6, 4))
  np.testing.assert_allclose(apply(params, x), module.features(x), rtol=1e-6)
  with pytest.raises(TypeError, match="no method 'feature'"):
    from_nnx(module, method='feature')
  with pytest.raises(TypeError, match='needs no adapter'):
    from_nnx(unet.Unet())


def test_resnet_in_training_takes_the_statistics_of_the_batch():
  """And moves the running ones, those of one norm checked against NumPy."""
  params = resnet_cifar.init(KEY, blocks=1, widths=(4, 8))
  params['head']['kernel'] = params['head']['kernel'][:, :10]
  x = 2 + 3 * jax.random.normal(KEY, (6, 8, 8, 3))
  train_apply = jax.jit(resnet_cifar.train_apply)
  logits, after = train_apply(params, x)
  y = np.asarray(
    jax.lax.conv_general_dilated(
      x,
      params['stem']['conv']['kernel'],
      (1, 1),
      ((1, 1), (1, 1)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
  )
  bn = after['stem']['bn']
  np.testing.assert_allclose(
    bn['mean'], 0.1 * y.mean((0, 1, 2)), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    bn['var'], 0.9 + 0.1 * y.var((0, 1, 2), ddof=1), rtol=1e-4
  )
  same = jax.tree.map(lambda a, b: bool((a == b).all()), params, after)
  kept = jax.tree_util.tree_leaves_with_path(same)
  for path, equal in kept:
    assert equal == (path[-1].key not in ('mean', 'var')), path
  # Not live, by a traced choice, it is `apply`.
  found, still = train_apply(params, x, jnp.bool_(False))
  expected = jax.jit(resnet_cifar.apply)(params, x)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, still, params)
  # With running statistics that are the batch's, both modes agree.
  for _ in range(60):
    _, params = train_apply(params, x)
  np.testing.assert_allclose(
    jax.jit(resnet_cifar.apply)(params, x), logits, rtol=0.05, atol=0.03
  )
