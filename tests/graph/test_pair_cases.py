"""Pairs of small functions, one thing at a time, and of random nets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs
from graph.folding import check_folds, described
from graph.programs import TOKENS, Random, mlp, rms_norm
from jax import lax

from quantlab.graph.migrate import scale_pair
from quantlab.graph.pairs import pairs

new = Random(3)
X = new(2, 5, 8)
IMAGE = new(2, 6, 6, 4)


def convolve(x, w, groups=1, padding='SAME'):
  return lax.conv_general_dilated(
    x,
    w,
    (1, 1),
    padding,
    feature_group_count=groups,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def fused_attention(p, x):
  y = rms_norm(p['g'], x) @ p['qkv'] + p['b']
  q, k, v = jnp.moveaxis(y.reshape(2, 5, 3, 2, 4), 2, 0)
  weights = jax.nn.softmax(jnp.einsum('bthd,bshd->bhts', q, k))
  y = jnp.einsum('bhts,bshd->bthd', weights, v)
  return x + y.reshape(2, 5, 8) @ p['o']


def concatenated_attention(p, x):
  weight = jnp.concatenate([p['q'], p['k'], p['v']], 1)
  q, k, v = jnp.split(rms_norm(p['g'], x) @ weight, 3, -1)
  return x + jax.nn.softmax(q @ k.mT) @ v @ p['o']


def fused_gate(p, x):
  gate, up = jnp.split(x @ p['w'], 2, -1)
  return (jax.nn.gelu(gate) * up) @ p['o']


def experts(p, x):
  route = jax.nn.softmax(x @ p['r'])
  gate = jnp.einsum('btd,edf->btef', x, p['g'])
  up = jnp.einsum('btd,edf->btef', x, p['u'])
  y = jax.nn.silu(gate) * up
  return jnp.einsum('bte,btef,efd->btd', route, y, p['d'])


def excited(p, x):
  y = convolve(x, p['a'])
  gate = jax.nn.relu(y.mean((1, 2)) @ p['s']) @ p['t']
  return convolve(y * jax.nn.sigmoid(gate)[:, None, None], p['c'])


def class_token(p, x):
  tokens = jnp.broadcast_to(p['cls'], (2, 1, 8))
  x = jnp.concatenate([tokens, rms_norm(p['g'], x)], 1)
  return (x @ p['w'])[:, 0]


def norm_and_bias(p, x):
  y = (x - x.mean(-1, keepdims=True)) * p['g'] + p['b']
  return jax.nn.gelu(y @ p['w'] + p['c']) @ p['o']


def weight_norm(p, x):
  unit = p['v'] / jnp.linalg.norm(p['v'], axis=0)
  return jax.nn.relu(x @ (unit * p['g'])) @ p['o']


def lower_triangle(p, x):
  def body(carry, q):
    return mlp({**p, 'w': q}, carry), None

  return lax.scan(body, x, p['stack'])[0]


CASES = {
  # name: (function, shapes of its parameters, input, pairs)
  'a gain of one plus': (
    lambda p, x: jax.nn.silu(rms_norm(1 + p['g'], x) @ p['w']),
    {'g': (8,), 'w': (8, 6)},
    X,
    [('norm', 'g', ('w',), (8,), 'scale')],
  ),
  'identity between': (
    lambda p, x: ((x @ p['a'] + p['b']) @ p['c'] + p['d']) ** 2,
    {'a': (8, 6), 'b': (6,), 'c': (6, 4), 'd': (4,)},
    X,
    [('linear', 'a', ('c',), (6,), 'rotate scale shift')],
  ),
  'relu between': (
    lambda p, x: jax.nn.relu(x @ p['a'] + p['b']) @ p['c'],
    {'a': (8, 6), 'b': (6,), 'c': (6, 4)},
    X,
    [('linear', 'a', ('c',), (6,), 'scale')],
  ),
  'leaky relu between': (
    lambda p, x: jax.nn.leaky_relu(x @ p['a'] + p['b']) @ p['c'],
    {'a': (8, 6), 'b': (6,), 'c': (6, 4)},
    X,
    [('linear', 'a', ('c',), (6,), 'scale')],
  ),
  'a norm with biases all along': (
    norm_and_bias,
    {'g': (8,), 'b': (8,), 'w': (8, 6), 'c': (6,), 'o': (6, 3)},
    X,
    [('norm', 'g', ('w',), (8,), 'scale shift')],
  ),
  'relu6, gelu, a square': (
    lambda p, x: (
      jnp.square(jax.nn.gelu(jax.nn.relu6(x @ p['a']) @ p['b']) @ p['c'])
      @ p['d']
    ),
    {'a': (8, 6), 'b': (6, 6), 'c': (6, 6), 'd': (6, 4)},
    X,
    [],
  ),
  'also returned': (
    lambda p, x: (jax.nn.relu(y := x @ p['a']) @ p['c'], y),
    {'a': (8, 6), 'c': (6, 4)},
    X,
    [],
  ),
  'one weight twice': (
    lambda p, x: jax.nn.relu(x @ p['a']) @ p['a'],
    {'a': (8, 8)},
    X,
    [],
  ),
  'a weight used elsewhere too': (
    lambda p, x: jax.nn.relu(x @ p['a']) @ p['c'] + p['c'].sum(),
    {'a': (8, 6), 'c': (6, 4)},
    X,
    [],
  ),
  'one layer applied three times': (
    lambda p, x: mlp(p, mlp(p, mlp(p, x))),
    {'g': (8,), 'w': (8, 6), 'b': (6,), 'o': (6, 8)},
    X,
    [
      ('norm', 'g', ('w',), (8,), 'scale'),
      ('linear', 'w', ('o',), (6,), 'scale'),
    ],
  ),
  'fused query, key, value': (
    fused_attention,
    {'g': (8,), 'qkv': (8, 24), 'b': (24,), 'o': (8, 8)},
    X,
    [
      ('norm', 'g', ('qkv',), (8,), 'scale'),
      ('v_out', 'qkv', ('o',), (8,), 'rotate scale'),
    ],
  ),
  'concatenated query, key, value': (
    concatenated_attention,
    {'g': (8,), 'q': (8, 8), 'k': (8, 8), 'v': (8, 8), 'o': (8, 8)},
    X,
    [
      ('norm', 'g', ('v', 'k', 'q'), (8,), 'scale'),
      ('v_out', 'q', ('o',), (8,), 'rotate scale'),
    ],
  ),
  'fused gate and up': (
    fused_gate,
    {'w': (8, 12), 'o': (6, 8)},
    X,
    [('up_down', 'w', ('o',), (6,), 'scale')],
  ),
  'heads stacked, tiled and unstacked': (
    lambda p, x: (
      jax.nn.relu(
        jnp.tile(
          jnp.stack(jnp.unstack((x @ p['a']).reshape(2, 5, 2, 3), axis=2), 3),
          (1, 1, 1, 2),
        ).reshape(2, 5, 12)
      )
      @ p['c']
    ),
    {'a': (8, 6), 'c': (12, 4)},
    X,
    [('linear', 'a', ('c',), (6,), 'scale')],
  ),
  'weights stacked, and unstacked after the product': (
    lambda p, x: (
      (
        y := jnp.unstack(
          jnp.einsum('btd,jdf->jbtf', x, jnp.stack([p['a'], p['b']]))
        )
      )[0]
      @ p['c']
      + jax.nn.relu(y[1]) @ p['d']
    ),
    {'a': (8, 6), 'b': (8, 6), 'c': (6, 4), 'd': (6, 4)},
    X,
    [
      ('linear', 'a', ('c',), (6,), 'rotate scale'),
      ('linear', 'a', ('d',), (6,), 'scale'),
    ],
  ),
  'weights with a factor': (  # a shift and a rotation would have to know it
    lambda p, x: jnp.square(
      (x @ (3 * p['a']) + p['b']) @ (p['c'] / 4) + p['d']
    ),
    {'a': (8, 6), 'b': (6,), 'c': (6, 4), 'd': (4,)},
    X,
    [('linear', 'a', ('c',), (6,), 'scale')],
  ),
  'a bias with a factor, and one taken off': (
    lambda p, x: jnp.square((2 - (x @ p['a'] + 2 * p['b'])) @ p['c'] + p['d']),
    {'a': (8, 6), 'b': (6,), 'c': (6, 4), 'd': (4,)},
    X,
    [],
  ),
  'the sign turned': (
    lambda p, x: jnp.square(-(x @ p['a'] + p['b']) @ p['c'] + p['d']),
    {'a': (8, 6), 'b': (6,), 'c': (6, 4), 'd': (4,)},
    X,
    [('linear', 'a', ('c',), (6,), 'rotate scale')],
  ),
  'a weight for each head': (
    lambda p, x: jnp.einsum(
      'bthe,hef->bthf',
      jnp.einsum('bthd,hde->bthe', x.reshape(2, 5, 2, 4), p['a']) + p['b'],
      p['c'],
    ),
    {'a': (2, 4, 3), 'b': (2, 3), 'c': (2, 3, 4)},
    X,
    [('linear', 'a', ('c',), (6,), 'rotate scale')],
  ),
  'biases shared by stacked layers': (
    lambda p, x: lax.scan(
      lambda c, q: (c + ((c @ q['a'] + q['b']) @ q['c'] + p['d']), None),
      x,
      {k: p[k] for k in 'abc'},
    )[0],
    {'a': (3, 8, 6), 'b': (3, 6), 'c': (3, 6, 8), 'd': (8,)},
    X,
    [('linear', 'a', ('c',), (3, 6), 'rotate scale')],
  ),
  'experts': (
    experts,
    {'r': (8, 3), 'g': (3, 8, 6), 'u': (3, 8, 6), 'd': (3, 6, 8)},
    X,
    [('up_down', 'u', ('d',), (18,), 'scale')],
  ),
  'a residual sum': (
    lambda p, x: x @ p['a'] + jax.nn.relu(x @ p['a']) @ p['c'],
    {'a': (8, 8), 'c': (8, 8)},
    X,
    [],
  ),
  'two branches concatenated': (
    lambda p, x: (
      jnp.concatenate([jax.nn.relu(x @ p['a']), jax.nn.relu(x @ p['b'])], -1)
      @ p['c']
    ),
    {'a': (8, 6), 'b': (8, 3), 'c': (9, 4)},
    X,
    [
      ('linear', 'a', ('c',), (6,), 'scale'),
      ('linear', 'b', ('c',), (3,), 'scale'),
    ],
  ),
  'weight normalization': (
    weight_norm,
    {'v': (8, 6), 'g': (6,), 'o': (6, 4)},
    X,
    [('linear', 'v', ('o',), (6,), 'scale')],
  ),
  'a class token before the rest': (
    class_token,
    {'g': (8,), 'cls': (8,), 'w': (8, 4)},
    X,
    [('norm', 'g', ('w',), (8,), 'scale')],
  ),
  'grouped convolutions': (
    lambda p, x: convolve(
      jax.nn.relu(convolve(x, p['a'], 2) + p['b']), p['c'], 2
    ),
    {'a': (3, 3, 2, 8), 'b': (8,), 'c': (3, 3, 4, 6)},
    IMAGE,
    [('conv', 'a', ('c',), (8,), 'scale')],
  ),
  'depthwise with a multiplier': (
    lambda p, x: (
      convolve(jax.nn.relu(convolve(x, p['a'])), p['c'], 8, 'VALID').mean(
        (1, 2)
      )
      @ p['d']
    ),
    {'a': (3, 3, 4, 8), 'c': (3, 3, 1, 16), 'd': (16, 3)},
    IMAGE,
    [
      ('conv', 'a', ('c',), (8,), 'scale'),
      # Only the two outputs of one input channel may be mixed.
      ('conv', 'c', ('d',), (16,), 'rotate scale'),
    ],
  ),
  'channels first': (
    lambda p, x: lax.conv_general_dilated(
      jax.nn.relu(
        lax.conv_general_dilated(x.mT, p['a'], (1, 1), 'SAME')
        + p['b'][:, None, None]
      ),
      p['c'],
      (1, 1),
      'VALID',
    ),
    {'a': (8, 6, 3, 3), 'b': (8,), 'c': (5, 8, 1, 1)},
    IMAGE,
    [('conv', 'a', ('c',), (8,), 'scale')],
  ),
  'pooled and flattened': (
    lambda p, x: (
      nn.max_pool(jax.nn.relu(convolve(x, p['a'])), (2, 2), (2, 2)).reshape(
        2, -1
      )
      @ p['d']
    ),
    {'a': (3, 3, 4, 8), 'd': (72, 5)},
    IMAGE,
    [('conv', 'a', ('d',), (8,), 'scale')],
  ),
  'squeeze and excitation': (
    excited,
    {'a': (3, 3, 4, 8), 's': (8, 2), 't': (2, 8), 'c': (1, 1, 8, 4)},
    IMAGE,
    [
      ('conv', 'a', ('s', 'c'), (8,), 'scale'),
      ('linear', 's', ('t',), (2,), 'scale'),
    ],
  ),
  'layers indexed out of a stack': (
    lambda p, x: mlp(
      {k: v[1] for k, v in p.items()}, mlp({k: v[0] for k, v in p.items()}, x)
    ),
    {'g': (2, 8), 'w': (2, 8, 6), 'b': (2, 6), 'o': (2, 6, 8)},
    X,
    [
      ('norm', 'g', ('w',), (8,), 'scale'),
      ('linear', 'w', ('o',), (6,), 'scale'),
      ('norm', 'g', ('w',), (8,), 'scale'),
      ('linear', 'w:1', ('o',), (6,), 'scale'),
    ],
  ),
  'a stack in a stack': (
    lambda p, x: lax.scan(
      lambda c, q: (lax.scan(lambda d, r: (mlp(r, d), None), c, q)[0], None),
      x,
      p,
    )[0],
    {'g': (2, 3, 8), 'w': (2, 3, 8, 6), 'b': (2, 3, 6), 'o': (2, 3, 6, 8)},
    X,
    [
      ('norm', 'g', ('w',), (2, 3, 8), 'scale'),
      ('linear', 'w', ('o',), (2, 3, 6), 'scale'),
    ],
  ),
  # One gain for all layers cannot take a scale for each.
  'a gain shared by stacked layers': (
    lower_triangle,
    {'g': (8,), 'stack': (3, 8, 6), 'b': (6,), 'o': (6, 8)},
    X,
    [],
  ),
  'vmap over models': (
    jax.vmap(mlp, in_axes=(0, None)),
    {'g': (3, 8), 'w': (3, 8, 6), 'b': (3, 6), 'o': (3, 6, 8)},
    X,
    [('linear', 'w', ('o',), (18,), 'scale')],
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_one_thing_at_a_time(name):
  apply, shapes, x, expected = CASES[name]
  fresh = Random(5)
  params = {k: fresh(*shape) for k, shape in shapes.items()}
  here = pairs(apply, params, x)
  assert [described(p) for p in here] == expected
  check_folds(programs.Program(apply, params, (x,)), here)


def test_rotations_of_values_stay_inside_their_heads():
  """Values of two heads may be mixed within a head, never across."""
  apply, shapes, x, _ = CASES['fused query, key, value']
  fresh = Random(5)
  params = {k: fresh(*shape) for k, shape in shapes.items()}
  pair = pairs(apply, params, x)[1]
  assert pair.heads == 2
  # Only the last third of the fused outputs is touched.
  kernel = next(m for m in pair.producers if m.path == 'qkv')
  assert (kernel.index[0, :16] == -1).all()
  np.testing.assert_array_equal(kernel.index[0, 16:], np.arange(8))


def test_half_precision_parameters_keep_their_dtype():
  params = {'a': new(8, 6), 'c': new(6, 4)}
  params = {k: v.astype(jnp.bfloat16) for k, v in params.items()}
  x = X.astype(jnp.bfloat16)

  def apply(p, x):
    return jax.nn.relu(x @ p['a']) @ p['c']

  [pair] = pairs(apply, params, x)
  moved = scale_pair(params, pair, np.full(6, 2.0, np.float32))
  assert {v.dtype for v in moved.values()} == {jnp.dtype('bfloat16')}
  # Powers of two are exact in any float format.
  np.testing.assert_array_equal(
    np.asarray(apply(moved, x), np.float32),
    np.asarray(apply(params, x), np.float32),
  )


def random_net(seed):
  """A chain of products with random things between."""
  rng = np.random.default_rng(seed)
  fresh = Random(seed)
  kinds = rng.choice(
    ['relu', 'none', 'gelu', 'norm', 'gate', 'skip', 'cut', 'turn'], 5
  )
  params = {
    str(i): {'w': fresh(8, 8), 'b': fresh(8), 'g': fresh(8), 'u': fresh(8, 8)}
    for i in range(len(kinds) + 1)
  }

  def apply(p, x):
    for i, kind in enumerate(kinds):
      q = p[str(i)]
      y = x @ q['w'] + q['b']
      if kind == 'relu':
        y = jax.nn.relu(y)
      elif kind == 'gelu':
        y = jax.nn.gelu(y)
      elif kind == 'norm':
        y = rms_norm(q['g'], y)
      elif kind == 'gate':
        y = jax.nn.sigmoid(x @ q['u']) * y
      elif kind == 'skip':
        y = y + x
      elif kind == 'cut':
        y = jnp.concatenate([y[..., 4:], jax.nn.relu(y[..., :4])], -1)
      elif kind == 'turn':
        y = y.reshape(2, 5, 2, 4).swapaxes(1, 2)
        y = y.swapaxes(1, 2)[..., ::-1, :].reshape(2, 5, 8)
      x = y
    return x @ p[str(len(kinds))]['w']

  return programs.Program(apply, params, (fresh(2, 5, 8),))


@pytest.mark.parametrize('seed', range(12))
def test_folds_of_random_nets_keep_the_function(seed):
  program = random_net(seed)
  here = pairs(program.apply, program.params, *program.args)
  check_folds(program, here)


def test_tokens_that_feed_a_linear_map_are_no_pair():
  """An embedding is looked up: its columns are not a producer here."""
  params = {'e': new(16, 8), 'w': new(8, 4)}
  assert pairs(lambda p, i: p['e'][i] @ p['w'], params, TOKENS) == ()
