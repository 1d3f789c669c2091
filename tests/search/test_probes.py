"""Probes of the Hessian without weight gradients: the exact blocks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantlab as ql
from quantlab import quality, search
from quantlab.search import offsets, probes, taylor

KEY = jax.random.key(3)


def normal(i, *shape):
  return jax.random.normal(jax.random.fold_in(KEY, i), shape) / np.sqrt(
    shape[-2] if len(shape) > 1 else 1
  )


def dense(p, x):
  return jnp.tanh(x @ p['a']) @ p['b']


def scanned(p, x):
  x, _ = lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p['layers'])
  return x @ p['head']


def repeated(p, x):
  """One weight in every turn of a loop, and once more after it."""
  x, _ = lax.scan(lambda x, _: (jnp.tanh(x @ p['w']), None), x, length=3)
  return x @ p['w']


def shared(p, ids):
  """A table is looked up, and is the head."""
  return jnp.tanh(p['table'][ids] @ p['mix']) @ p['table'].T


def joined(p, x):
  both = jnp.concatenate([p['q'], p['k']], 1)
  return jnp.tanh(x @ both) @ p['o']


@jax.checkpoint
def convolved(p, x):
  x = lax.conv_general_dilated(
    x, p['c'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  x = jnp.tanh(x * p['gain'])
  return jnp.tanh(x.mean((1, 2))) @ p['d']


SQUARE = {'layers': normal(1, 3, 6, 6), 'head': normal(2, 6, 4)}
MODELS = {
  'dense': (dense, {'a': normal(1, 6, 5), 'b': normal(2, 5, 4)}, (6,)),
  'scanned': (scanned, SQUARE, (6,)),
  'repeated': (repeated, {'w': normal(1, 4, 4)}, (4,)),
  'shared': (shared, {'table': normal(1, 7, 5), 'mix': normal(2, 5, 5)}, None),
  'joined': (
    joined,
    {'q': normal(1, 6, 3), 'k': normal(2, 6, 3), 'o': normal(3, 6, 4)},
    (6,),
  ),
  'convolved': (
    convolved,
    {'c': normal(1, 3, 3, 2, 5), 'gain': normal(2, 5), 'd': normal(3, 5, 4)},
    (4, 4, 2),
  ),
}


def expansion(name, options, layers=False):
  apply, params, shape = MODELS[name]
  if shape is None:
    x = jax.random.randint(KEY, (8,), 0, 7)
  else:
    x = jax.random.normal(KEY, (8, *shape))
  found = search.space(apply, params, {'.*': options}, x, layers=layers)
  program = search.Program(apply, params, found, [(x,)])
  made = taylor.Expansion(program, quality.classification, 'loss')
  labels = jnp.arange(8) % 4
  return made, (x,), (labels,)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kind', ['weights', 'both', 'layers'])
def test_probes_are_the_products_with_the_hessian(name, kind):
  options = [ql.int4(), ql.int8()]
  if kind == 'both':
    if MODELS[name][2] is None:
      pytest.skip('indices are not quantized')
    options = [ql.rule(weight=o, input=ql.int8(per='token')) for o in options]
  if kind == 'layers' and name != 'scanned':
    pytest.skip('no layers')
  made, inputs, targets = expansion(name, options, layers=kind == 'layers')
  found = probes.Probes(made)
  params = made.program.params
  zero, linear = found.linearized(params, inputs, targets)
  got = found.products((zero, linear), KEY)

  v = probes.signs(KEY, zero)
  gradient = jax.grad(_loss(made, inputs, targets))
  products = jax.jvp(gradient, (zero,), (v,))[1]
  assert set(got) == set(zero)
  for operand, h in products.items():
    want = v[operand] * h
    layered = operand[0] in made.program.space.layers
    want = want.reshape(len(want) if layered else 1, -1).sum(1)
    assert np.abs(want).max() > 1e-6
    np.testing.assert_allclose(got[operand], want, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize('name', ['dense', 'convolved'])
def test_no_weight_has_a_gradient(name):
  made, inputs, targets = expansion(name, [ql.int4(), ql.int8()])
  found = probes.Probes(made)
  prepared = found.linearized(made.program.params, inputs, targets)
  text = str(jax.make_jaxpr(found.products)(prepared, KEY))
  given = str(
    jax.make_jaxpr(jax.grad(_loss(made, inputs, targets)))(prepared[0])
  )
  for x in made.program.params.values():
    orders = (x.shape, x.shape[::-1])
    sizes = '|'.join(','.join(map(str, o)) for o in orders)
    product = rf'f32\[({sizes})\] = (conv|dot)_general'
    assert not re.search(product, text)
    assert re.search(product, given) or x.ndim == 1


def _loss(made, inputs, targets):
  loss = offsets.Offsets(made).loss(made.program.params, inputs, targets)
  return lambda x: loss(x, {})
