"""BitNet's networks: norms where they belong, stacked or not, any size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab as ql
from quantlab.models import bitnet, llama, mlp

KEY = jax.random.key(0)
LISTED = bitnet.language_model(31, 16, 2, heads=2)
STACKED = bitnet.language_model(31, 16, 2, heads=2, scanned=True)
SQUARED = bitnet.language_model(31, 16, 2, heads=2, squared_relu=True)


def stacked(params):
  blocks = jax.tree.map(lambda *xs: jnp.stack(xs), *params['blocks'])
  return {**params, 'blocks': blocks}


@pytest.mark.parametrize('config', [LISTED, STACKED])
def test_step_by_step_equals_the_whole(config):
  params = llama.init(KEY, config)
  tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, config.vocab)
  whole = jax.jit(functools.partial(llama.apply, config=config))(params, tokens)
  step = jax.jit(functools.partial(llama.step, config=config))
  logits, cache = step(
    params, llama.empty_cache(2, 8, config), tokens[:, :4], 0
  )
  found = [logits]
  for i in (4, 5):
    logits, cache = step(params, cache, tokens[:, i : i + 1], i)
    found.append(logits)
  np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=1e-5)


def test_a_stack_computes_what_the_list_does():
  listed = llama.init(KEY, LISTED)
  stack = llama.init(KEY, STACKED)
  jax.tree.map(np.testing.assert_array_equal, stacked(listed), stack)
  tokens = jax.random.randint(KEY, (2, 5), 0, 31)
  a = jax.jit(functools.partial(llama.apply, config=LISTED))(listed, tokens)
  b = jax.jit(functools.partial(llama.apply, config=STACKED))(stack, tokens)
  np.testing.assert_allclose(a, b, atol=1e-5)


def reference(params, tokens, c):
  """One block in float64 NumPy, squared ReLU, from the papers."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(g, x):
    return g['scale'] * x / np.sqrt((x * x).mean(-1, keepdims=True) + c.epsilon)

  x = p['embed']['embedding'][tokens]
  t, d = len(tokens), c.dim // c.heads
  angle = np.arange(t)[:, None] / c.theta ** (np.arange(0, d, 2) / d)

  def turned(v):  # pairs as complex numbers
    z = v.reshape(t, c.heads, d // 2, 2)
    z = (z[..., 0] + 1j * z[..., 1]) * np.exp(1j * angle)[:, None]
    return np.stack([z.real, z.imag], -1).reshape(t, c.heads, d)

  for b in p['blocks']:
    a, y = b['attention'], norm(b['attention_norm'], x)
    q, k = turned(y @ a['wq']), turned(y @ a['wk'])
    v = (y @ a['wv']).reshape(t, c.heads, d)
    out = np.zeros((t, c.heads, d))
    for h in range(c.heads):
      for i in range(t):
        s = k[: i + 1, h] @ q[i, h] / np.sqrt(d)
        w = np.exp(s - s.max())
        out[i, h] = w / w.sum() @ v[: i + 1, h]
    x = x + norm(a['sub_norm'], out.reshape(t, -1)) @ a['wo']
    m, y = b['mlp'], norm(b['mlp_norm'], x)
    hidden = np.maximum(y @ m['gate'], 0) ** 2 * (y @ m['up'])
    x = x + norm(m['sub_norm'], hidden) @ m['down']
  return norm(p['norm'], x) @ p['head']['kernel']


def test_it_is_the_network_of_the_papers():
  params = llama.init(KEY, SQUARED)
  gains = np.random.RandomState(0)
  params = jax.tree.map(
    lambda x: (
      jnp.asarray(gains.uniform(0.5, 2, x.shape), x.dtype) if x.ndim == 1 else x
    ),
    params,
  )
  tokens = np.array([3, 1, 4, 1, 5])
  found = jax.jit(functools.partial(llama.apply, config=SQUARED))(
    params, tokens[None]
  )
  np.testing.assert_allclose(
    found[0], reference(params, tokens, SQUARED), atol=1e-4
  )


class Sizes:
  """Keeps the root mean square of what enters each product."""

  def init(self, site):
    return () if site.kind != 'embed' and site.path else None

  def update(self, site, stat, lhs, rhs, out, state):
    del site, stat, rhs, out, state
    return jnp.sqrt(jnp.square(lhs).mean(-1))

  def merge(self, a, b):
    raise AssertionError('nothing is met twice')


def networks():
  tokens = jax.random.randint(KEY, (2, 5), 0, 31)
  images = 3 + 5 * jax.random.normal(KEY, (2, 8, 8, 1))
  vit = bitnet.language_model(10, 16, 1, heads=2)
  return {
    'language': (
      functools.partial(llama.apply, config=LISTED),
      llama.init(KEY, LISTED),
      tokens,
    ),
    'mlp': (
      functools.partial(mlp.apply, norm=True),
      mlp.init(KEY, (64, 16, 10), norm=True),
      images,
    ),
    'vit': (
      functools.partial(bitnet.vit_apply, config=vit, patch=4),
      bitnet.vit_init(KEY, vit, (8, 8, 1), 4),
      images,
    ),
  }


@pytest.mark.parametrize('name', ['language', 'mlp', 'vit'])
def test_every_product_in_a_block_reads_what_a_norm_gives(name):
  """Gains are one at the start, so that a norm's output has unit power."""
  apply, params, x = networks()[name]
  for gain in (5, 50):  # large beside the norm's epsilon
    p = jax.tree.map(lambda w, g=gain: g * w if w.ndim > 1 else w, params)
    _, found = jax.jit(ql.observe(apply, Sizes()))(p, x)
    inside = {
      k: v for k, v in found.items() if not k.startswith(('embed', 'patches'))
    }
    assert len(inside) > 1
    for site, power in inside.items():
      np.testing.assert_allclose(power, 1, rtol=2e-2, err_msg=site)


def test_vit_averages_over_places():
  """Patches in another order, with their places, give the same logits."""
  apply, params, x = networks()['vit']
  flipped = jnp.concatenate([x[:, 4:], x[:, :4]], axis=1)  # rows of patches
  places = params['position'].reshape(2, 2, -1)[::-1].reshape(4, -1)
  a = apply(params, x)
  b = apply({**params, 'position': places}, flipped)
  np.testing.assert_allclose(a, b, atol=1e-5)
  assert jnp.abs(apply(params, flipped) - a).max() > 1e-3  # places do matter


@pytest.mark.parametrize(
  ('dim', 'blocks', 'least', 'most'),
  [(48, 3, 80_000, 130_000), (512, 12, 35_000_000, 40_000_000)],
)
def test_sizes(dim, blocks, least, most):
  config = bitnet.language_model(96, dim, blocks)
  shapes = jax.eval_shape(lambda: llama.init(KEY, config))
  assert least < bitnet.count(shapes) < most


def test_patches_must_fit():
  with pytest.raises(ValueError, match='patch=3 must divide'):
    bitnet.vit_init(KEY, LISTED, (8, 8, 1), 3)


def test_a_plain_perceptron():
  """Against NumPy, with biases."""
  params = mlp.init(KEY, (6, 5, 3))
  params['layer_1']['bias'] = jnp.array([1.0, -2.0, 0.5])
  x = np.random.RandomState(0).normal(size=(4, 3, 2)).astype(np.float32)
  hidden = np.maximum(x.reshape(4, 6) @ params['layer_0']['kernel'], 0)
  expected = hidden @ params['layer_1']['kernel'] + np.array([1, -2, 0.5])
  np.testing.assert_allclose(mlp.apply(params, x), expected, rtol=1e-5)
