"""Derivatives through integer products are those of their simulation."""

import hessians
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

import quantlab as ql
from quantlab_kernels import int_dot

TOKEN = ql.int8(per='token')
W8A8 = ql.rule(weight=ql.int8(), input=TOKEN)
INPUTS = {
  'token': TOKEN,
  'tensor': ql.int8(per='tensor'),
  'asymmetric': ql.int8(per='token', symmetric=False),
  'static': ql.int8(
    per='tensor', static=True, scale=ql.scales.percentile(90.0)
  ),
}
PARAMS = {'a': normal(0, 16, 24) / 4, 'g': normal(1, 24), 'b': normal(2, 24, 8)}
X = normal(3, 5, 16)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """The C++ kernels serve, where there are any."""
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: True)


def dense(p, x):
  return (jnp.tanh(x @ p['a']) * p['g']) @ p['b']


def scanned(p, x):
  step = lambda x, w: (x + jnp.tanh(x @ w), None)  # noqa: E731
  return jax.lax.scan(step, x, p['w'])[0]


def conv(p, x):
  return jax.lax.conv_general_dilated(
    x, p['w'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def attention(p, x):
  q, k = x @ p['q'], x @ p['k']
  return jax.nn.softmax(q @ k.T / 4) @ x


PROGRAMS = {
  'dense': (dense, PARAMS, X, W8A8),
  'groups of 4 bits': (
    dense,
    PARAMS,
    X,
    ql.rule(weight=ql.int4(group=8), input=TOKEN),
  ),
  'ternary': (dense, PARAMS, X, ql.rule(weight=ql.ternary(), input=TOKEN)),
  'small floats': (
    dense,
    PARAMS,
    X,
    ql.rule(weight=ql.fp4_e2m1(group=8), input=TOKEN),
  ),
  'scanned': (scanned, {'w': normal(4, 3, 16, 16) / 4}, X, W8A8),
  'conv': (
    conv,
    {'w': normal(5, 3, 3, 8, 8)},
    normal(6, 2, 5, 5, 8),
    ql.rule(weight=ql.int8(), input=ql.int8(per='tensor')),
  ),
  'activations': (
    attention,
    {'q': normal(7, 16, 16), 'k': normal(8, 16, 16)},
    X,
    {'site:dot_': ql.rule(lhs=TOKEN, rhs=TOKEN), '': W8A8},
  ),
}


def both(apply, params, x, rule, **options):
  """The model on integers, its simulation on floats."""
  recipe = rule if isinstance(rule, dict) else {'': rule}
  model = ql.ptq(apply, params, recipe, [x])
  simulated = ql.quantized(apply, model.plan, integer=False)
  return model, jax.jit(model.apply), jax.jit(simulated)


def loss(f, params, x):
  return jnp.sum(jnp.sin(f(params, x)))


def close(got, want):
  """Equal but for the order of sums, where 8 bits may round another way."""
  np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())


@pytest.mark.parametrize('name', PROGRAMS)
def test_of_each_product(name):
  model, integer, simulated = both(*PROGRAMS[name])
  x = PROGRAMS[name][2]
  for take in (jax.grad, jax.jacfwd):
    got, want = (
      take(loss, 2)(f, model.params, x) for f in (integer, simulated)
    )
    close(got, want)
    assert np.count_nonzero(want) == want.size


@pytest.mark.parametrize('name', INPUTS)
def test_of_each_kind_of_input(name):
  """Clipped entries of static ranges have none, as in the simulation."""
  rule = ql.rule(weight=ql.int8(), input=INPUTS[name])
  model, integer, simulated = both(dense, PARAMS, X, rule)
  got, want = (
    jax.grad(loss, 2)(f, model.params, X) for f in (integer, simulated)
  )
  close(got, want)
  if name == 'static':
    x = 3 * X
    got, want = (
      jax.grad(loss, 2)(f, model.params, x) for f in (integer, simulated)
    )
    np.testing.assert_array_equal(got == 0, want == 0)
    assert 0 < np.count_nonzero(want) < 0.9 * want.size


def test_of_parameters():
  """Of float parameters and of the scales of codes and of static ranges."""
  rule = ql.rule(weight=ql.int4(group=8), input=INPUTS['static'])
  model, integer, simulated = both(dense, PARAMS, X, rule)

  def gradients(f):
    found = jax.grad(lambda p: loss(f, p, X), allow_int=True)(model.params)
    paths = jax.tree.leaves_with_path(found)
    return {k: g for k, g in paths if g.dtype != jax.dtypes.float0}

  got, want = gradients(integer), gradients(simulated)
  assert len(got) == len(want) == 5
  for k, g in got.items():
    close(g, want[k])
    assert np.any(want[k])


@pytest.mark.parametrize('prepacked', [False, True])
def test_composes(prepacked):
  model, integer, simulated = both(dense, PARAMS, X, W8A8)
  packed = (ql.prepack(model) if prepacked else model).params
  g = jax.grad(lambda p, f, x: loss(f, p, x), 2)
  want = g(model.params, simulated, X)
  close(g(packed, integer, X), want)
  close(g(packed, jax.checkpoint(integer), X), want)
  xs = jnp.stack([X, 2 * X])
  close(
    jax.vmap(g, (None, None, 0))(packed, integer, xs),
    jnp.stack([want, g(model.params, simulated, 2 * X)]),
  )
  along = jnp.ones_like(X)
  second = lambda f, p: jax.jvp(lambda x: g(p, f, x), (X,), (along,))[1]  # noqa: E731
  close(second(integer, packed), second(simulated, model.params))


@pytest.mark.parametrize('integer', [False, True])
@pytest.mark.parametrize(
  'rule',
  [W8A8, ql.rule(weight=ql.int4(group=8)), ql.rule(weight=ql.nf4(group=8))],
  ids=['w8a8', 'w4a16', 'nf4'],
)
def test_second_derivatives_in_a_scan_are_those_of_the_layers(rule, integer):
  w = normal(4, 3, 16, 16) / 4

  def unrolled(p, x):
    for i in range(3):
      x = x + jnp.tanh(x @ p[str(i)])
    return x

  def found(apply, params):
    model = ql.ptq(apply, params, {'': rule}, [X])
    f = ql.quantized(apply, model.plan, integer=integer)
    return hessians.products(lambda x: loss(f, model.params, x), X)

  [want, *_] = found(unrolled, {str(i): v for i, v in enumerate(w)})
  assert np.count_nonzero(want) == want.size
  for got in found(scanned, {'w': w}):
    close(got, want)


def test_no_weight_is_kept_in_float():
  """What the backward pass needs of a weight is its codes."""
  model, integer, _ = both(dense, PARAMS, X, W8A8)
  _, back = jax.vjp(lambda x: integer(model.params, x), X)
  kept = [
    a for a in jax.tree.leaves(back) if jnp.issubdtype(a.dtype, jnp.floating)
  ]
  assert kept
  assert not [
    a
    for a in kept
    if a.size >= min(v.size for v in PARAMS.values() if v.ndim > 1)
  ]


def test_a_loss_falls_along_it():
  """It is a descent direction of the integer model's own loss."""
  model, integer, _ = both(dense, PARAMS, X, W8A8)
  g = jax.grad(loss, 2)(integer, model.params, X)
  at = loss(integer, model.params, X)
  step = 0.05 / np.linalg.norm(g)
  slope = (at - loss(integer, model.params, X - step * g)) / (
    step * np.sum(np.square(g))
  )
  assert 0.5 < slope < 1.5
