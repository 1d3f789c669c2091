"""Sites fed by one value share what is done to it."""

import jax
import jax.numpy as jnp
import pytest
from graph import programs
from graph.programs import TOKENS, Random, mlp, mlp_params

from quantlab.graph.pairs import shared_inputs


def triple(at, names):
  return tuple(f'{at}/{n}' for n in names)


LINEN = ('query/kernel', 'key/kernel', 'value/kernel')
EXPECTED = {
  'transformer': [triple(f'params/block_{i}', LINEN) for i in range(2)],
  'scanned': [triple('params/blocks', LINEN)],
  'llama': [
    group
    for i in range(2)
    for group in (
      triple(f'blocks/{i}/attention', ('wq', 'wk', 'wv')),
      triple(f'blocks/{i}/mlp', ('gate', 'up')),
    )
  ],
  'bert': [triple(f'blocks/{i}/attention', LINEN) for i in range(2)],
  'resnet': [],
  # A projection on the shortcut sees what the first convolution sees.
  'linen_resnet': [
    ('params/Residual_1/Conv_0/kernel', 'params/Residual_1/Conv_2/kernel')
  ],
  'mobilenet': [],
  'unet': [],
}


@pytest.mark.parametrize('name', EXPECTED)
def test_the_groups_of_each_model(name):
  program = programs.MODELS[name]()
  found = shared_inputs(program.apply, program.params, *program.args)
  assert list(found) == EXPECTED[name]


def test_layout_and_casts_do_not_part_a_group():
  new = Random()
  params = {'a': new(8, 4), 'b': new(2, 4, 3), 'c': new(4, 8)}

  def apply(p, x):
    half = x.astype(jnp.bfloat16) @ p['a'].astype(jnp.bfloat16)
    heads = jnp.einsum('bthd,hdn->btn', x.reshape(2, 5, 2, 4), p['b'])
    flipped = p['c'] @ x.mT
    return half.sum() + heads.sum() + flipped.sum()

  # The last contracts other axes of the value: c's columns are not its input
  # channels, but it is the same value that enters.
  params['c'] = new(4, 8)
  assert shared_inputs(apply, params, new(2, 5, 8)) == (('a', 'b', 'c'),)


def test_a_half_of_a_value_is_another_value():
  new = Random()
  params = {'a': new(4, 3), 'b': new(4, 3)}

  def apply(p, x):
    return x[..., :4] @ p['a'] + x[..., 4:] @ p['b']

  assert shared_inputs(apply, params, new(2, 8)) == ()


def test_lookups_share_no_activation():
  new = Random()
  params = {'a': new(16, 8), 'b': new(16, 8), 'c': new(8, 4), 'd': new(8, 4)}

  def apply(p, ids):
    x = p['a'][ids] + p['b'][ids]
    return jnp.tanh(x @ p['c']) + jax.nn.relu(x @ p['d'])

  assert shared_inputs(apply, params, TOKENS) == (('c', 'd'),)


def test_the_keys_and_values_of_all_decoder_layers_share_the_encoder():
  new = Random()
  layers = [programs.attention_params(new) for _ in range(2)]
  params = {'m': mlp_params(new), 'l': layers}

  def apply(p, x, y):
    x = mlp(p['m'], x)
    for q in p['l']:
      y = y + programs.attention(q, y, x)
    return y

  assert shared_inputs(apply, params, new(2, 5, 8), new(2, 3, 8)) == (
    ('l/0/k', 'l/0/v', 'l/1/k', 'l/1/v'),
  )
