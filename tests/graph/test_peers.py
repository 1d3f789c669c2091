"""Programs on which other quantizers fail: silent floats, guesses, crashes.

Each model is compared with its float self (the quantization error of 8 bits)
and with the same product written out on weights that NumPy quantized.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from jax import lax
from oracle import snap

import quantlab as ql

W8 = ql.int8()
W8A8 = ql.rule(weight=ql.int8(), input=ql.int8(per='token'))
EXACT = 2e-6


def quantized(apply, params, *args, rules=None):
  """A quantized model, its result, and that of the float model."""
  model = ql.ptq(apply, params, rules or {'': W8}, [args])
  return model, model.apply(model.params, *args), apply(params, *args)


def is_quantized(out, float_out):
  """The result differs from the float one, by no more than 8 bits do."""
  return 1e-4 < snap.error(out, float_out) < 3e-2


# A, B: jit caches ------------------------------------------------------------


@jax.jit
def helper(x, w):
  return jnp.tanh(x @ w)


def with_helper(params, x):
  return helper(helper(x, params['a']), params['b'])


def with_matmul(params, x):
  return jnp.tanh(jnp.tanh(x @ params['a']) @ params['b'])


@pytest.mark.parametrize('apply', [with_helper, with_matmul])
@pytest.mark.parametrize('first', ['float', 'quantized'])
def test_jit_caches_do_not_leak(apply, first):
  params = {'a': normal(0, 8, 8), 'b': normal(1, 8, 8)}
  x = normal(2, 4, 8)
  want = np.tanh(np.tanh(x @ params['a']) @ params['b'])
  if first == 'float':
    np.testing.assert_allclose(apply(params, x), want, atol=1e-6)
  model = ql.ptq(apply, params, {'': W8}, [x])
  out = jax.jit(model.apply)(model.params, x)
  np.testing.assert_allclose(jax.jit(apply)(params, x), want, atol=1e-6)
  a, b = (snap.symmetric(params[k], 0) for k in 'ab')
  np.testing.assert_allclose(out, np.tanh(np.tanh(x @ a) @ b), atol=1e-6)
  assert is_quantized(out, want)


# C: two parameters of one shape ----------------------------------------------


def test_equal_shapes_are_two_weights():
  params = {'a': normal(0, 8, 8), 'b': normal(1, 8, 8)}
  x = normal(2, 4, 8)
  model, out, float_out = quantized(
    lambda p, x: (x @ p['a']) @ p['b'], params, x
  )
  assert all(
    isinstance(w, ql.QTensor) for w in model.params['weights'].values()
  )
  a, b = (snap.symmetric(params[k], 0) for k in 'ab')
  np.testing.assert_allclose(out, (x @ a) @ b, rtol=1e-5, atol=1e-5)
  assert is_quantized(out, float_out)


# D: a square weight and a batch of its size ----------------------------------


def test_square_weight_at_every_batch_size():
  params = {'w': normal(0, 16, 16)}
  plan = ql.plan(lambda p, x: x @ p['w'], params, {'w': W8A8}, normal(1, 4, 16))
  simulated = ql.fake_quantized(lambda p, x: x @ p['w'], plan)
  grad = jax.jit(jax.grad(lambda p, x: jnp.sum(simulated(p, x) ** 2)))
  w = snap.symmetric(params['w'], 0)
  for batch in (4, 8, 16, 32):
    x = normal(batch, batch, 16)
    x_hat = snap.symmetric(x, 1)
    # Straight through: d/dw of sum((x_hat @ w_hat)^2), w_hat taken for w.
    want = 2 * x_hat.T @ (x_hat @ w)
    np.testing.assert_allclose(grad(params, x)['w'], want, rtol=1e-4, atol=1e-4)


# E: activations that look like the parameter ---------------------------------


def test_activation_product_of_the_parameters_shape():
  def apply(params, x):
    h = x @ params['w']  # (8, 8), as the parameter
    return (h @ x) @ params['w']

  params, x = {'w': normal(0, 8, 8)}, normal(1, 8, 8)
  model, out, float_out = quantized(apply, params, x)
  assert [s.derivation for s in model.plan.sites.values()] == [
    'leaf',
    'activations',
    'leaf',
  ]
  w = snap.symmetric(params['w'], 0)
  np.testing.assert_allclose(out, ((x @ w) @ x) @ w, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(model.params['weights']['w'].dequantize(), w)
  assert is_quantized(out, float_out)


# F, G, H: stacked layers -----------------------------------------------------


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    h = nn.tanh(nn.Dense(8, name='up')(x))
    return x + nn.Dense(8, use_bias=False, name='down')(h), None


class Stack(nn.Module):
  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=3
    )
    return layers()(x, None)[0]


def explicit_stack(params, x, quantize_w, quantize_x):
  found = params['params']['ScanLayer_0']
  first, second = found['up'], found['down']
  for i in range(3):
    w = quantize_w(first['kernel'][i])
    h = np.tanh(quantize_x(0, i, x) @ w + first['bias'][i])
    x = x + quantize_x(1, i, h) @ quantize_w(second['kernel'][i])
  return x


@pytest.fixture(scope='module')
def stack():
  x = normal(0, 4, 8)
  return Stack().apply, Stack().init(jax.random.key(1), x), x


def test_scanned_layers_have_scales_of_their_own(stack):
  apply, params, x = stack
  model, out, float_out = quantized(apply, params, x, rules={'kernel': W8})
  kernel = model.params['weights']['params']['ScanLayer_0']['up']['kernel']
  assert kernel.scale.shape == (3, 1, 8)
  want = explicit_stack(
    params, x, lambda w: snap.symmetric(w, 0), lambda k, i, x: x
  )
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  assert is_quantized(out, float_out)


def test_scanned_layers_with_static_ranges_need_no_edit(stack):
  apply, params, x = stack
  rule = ql.rule(
    weight=W8, input=ql.int8(per='tensor', symmetric=False, static=True)
  )
  model, out, float_out = quantized(apply, params, x, rules={'kernel': rule})
  ranges = {}

  def record(k, i, x):  # what calibration must see: the float activations
    ranges[k, i] = x.min(), x.max()
    return x

  explicit_stack(params, np.asarray(x), np.asarray, record)
  want = explicit_stack(
    params,
    np.asarray(x),
    lambda w: snap.symmetric(w, 0),
    lambda k, i, x: snap.fixed(x, *ranges[k, i]),
  )
  assert snap.error(out, want) < 2e-3  # a tie may fall to the other side
  assert is_quantized(out, float_out)
  for state in model.params['sites'].values():
    assert state['input']['scale'].shape == (3, 1, 1)
    assert len(set(np.ravel(state['input']['scale']))) == 3


# I: tied embedding, transposes, einsum, convolution --------------------------


def test_tied_embedding():
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
      embed = nn.Embed(11, 8)
      return embed.attend(jnp.tanh(embed(ids)))

  ids = jnp.arange(6).reshape(2, 3)
  params = Tied().init(jax.random.key(0), ids)
  model, out, float_out = quantized(Tied().apply, params, ids)
  table = snap.symmetric(
    params['params']['Embed_0']['embedding'], 1
  )  # a scale per row
  np.testing.assert_allclose(out, np.tanh(table[ids]) @ table.T, atol=1e-6)
  assert is_quantized(out, float_out)
  sites = list(model.plan.sites)
  assert sites == [
    'params/Embed_0/embedding',
    'params/Embed_0/embedding:1',
  ]


@pytest.mark.parametrize('rule', [W8, W8A8])
def test_transposed_weight(rule):
  params, x = {'w': normal(0, 6, 8)}, normal(1, 4, 8)
  _, out, float_out = quantized(
    lambda p, x: x @ p['w'].T, params, x, rules={'w': rule}
  )
  w, x_hat = snap.symmetric(params['w'], 1), x
  if rule is W8A8:
    x_hat = snap.symmetric(x, 1)
  np.testing.assert_allclose(out, x_hat @ w.T, rtol=1e-5, atol=1e-5)
  assert is_quantized(out, float_out)


def test_einsum_of_three():
  params, x = {'a': normal(0, 8, 6), 'b': normal(1, 6, 5)}, normal(2, 4, 8)

  def apply(p, x):
    return jnp.einsum('mi,ij,jn->mn', x, p['a'], p['b'])

  model, out, float_out = quantized(apply, params, x)
  assert is_quantized(out, float_out)
  products = [s for s in model.plan.sites.values() if s.derivation == 'leaf']
  if len(products) == 2:  # x @ a first
    a, b = (snap.symmetric(params[k], 0) for k in 'ab')
    want = (x @ a) @ b
  else:  # a @ b first: one effective weight
    want = x @ snap.symmetric(params['a'] @ params['b'], 0)
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)


def test_convolution_weight_only():
  params, x = {'w': normal(0, 3, 3, 2, 4)}, normal(1, 2, 6, 6, 2)

  def apply(p, x):
    return lax.conv_general_dilated(
      x, p['w'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  _, out, float_out = quantized(apply, params, x)
  w = jnp.asarray(snap.symmetric(params['w'], (0, 1, 2)))
  np.testing.assert_allclose(out, apply({'w': w}, x), rtol=1e-5, atol=1e-5)
  assert is_quantized(out, float_out)


# J: weight on the left, grouped rows -----------------------------------------


@pytest.mark.parametrize('rule', [W8, W8A8])
def test_weight_on_the_left(rule):
  params, x = {'w': normal(0, 6, 8)}, normal(1, 8, 4)
  _, out, float_out = quantized(
    lambda p, x: p['w'] @ x, params, x, rules={'w': rule}
  )
  w = snap.symmetric(params['w'], 1)
  x_hat = snap.symmetric(x, 0) if rule is W8A8 else x
  np.testing.assert_allclose(out, w @ x_hat, rtol=1e-5, atol=1e-5)
  assert is_quantized(out, float_out)


@pytest.mark.parametrize('rule', [W8, W8A8])
def test_ragged_dot(rule):
  params, x = {'w': normal(0, 3, 8, 6)}, normal(1, 7, 8)
  sizes = jnp.array([2, 4, 1])
  _, out, float_out = quantized(
    lambda p, x, n: lax.ragged_dot(x, p['w'], n),
    params,
    x,
    sizes,
    rules={'w': rule},
  )
  w = snap.symmetric(params['w'], 1)
  x_hat = snap.symmetric(x, 1) if rule is W8A8 else np.asarray(x)
  expert = np.repeat([0, 1, 2], sizes)
  want = np.stack([x_hat[i] @ w[e] for i, e in enumerate(expert)])
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  assert is_quantized(out, float_out)


# K, L: NNX -------------------------------------------------------------------


class Plain(nnx.Module):
  def __init__(self, rngs):
    self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 6)))
    self.inner = nnx.Linear(6, 6, rngs=rngs)

  def __call__(this, x):
    return this.inner(x @ this.w)


def test_nnx_module():
  graph, state = nnx.split(Plain(nnx.Rngs(0)))
  x = normal(1, 4, 8)

  def apply(params, x):
    return nnx.merge(graph, params)(x)

  model, out, float_out = quantized(apply, state, x, rules={'w|kernel': W8})
  assert list(model.plan.sites) == ['w', 'inner/kernel']
  flat = nnx.to_pure_dict(state)
  w, kernel = (
    snap.symmetric(v, 0) for v in (flat['w'], flat['inner']['kernel'])
  )
  want = (x @ w) @ kernel + flat['inner']['bias']
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  assert is_quantized(out, float_out)


# M: a misspelt rule ----------------------------------------------------------


def test_misspelt_rule_is_an_error():
  params, x = {'kernel': normal(0, 8, 8)}, normal(1, 4, 8)
  with pytest.raises(ValueError, match=r"rule 'kernle' decides no site"):
    ql.plan(lambda p, x: x @ p['kernel'], params, {'kernle': W8, '': W8}, x)
  with pytest.raises(ValueError, match='no rule of the recipe matches'):
    ql.plan(lambda p, x: x @ p['kernel'], params, {'kernle': W8}, x)


# N: a Pallas kernel inside the model -----------------------------------------


def pallas_matmul(x, w):
  from jax.experimental import pallas as pl

  def kernel(x_ref, w_ref, o_ref):
    o_ref[...] = x_ref[...] @ w_ref[...]

  shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
  return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, w)


def with_pallas(params, x):
  return pallas_matmul(jnp.tanh(x @ params['a']), params['b'])


def test_pallas_kernel_is_left_alone_and_reported():
  params, x = {'a': normal(0, 8, 8), 'b': normal(1, 8, 8)}, normal(2, 8, 8)
  model, out, float_out = quantized(with_pallas, params, x, rules={'a$': W8})
  want = np.tanh(x @ snap.symmetric(params['a'], 0)) @ params['b']
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  assert is_quantized(out, float_out)
  [note] = [n for n in model.plan.notes if 'pallas_call' in n]
  assert note.startswith('1 product')
  assert list(model.plan.sites) == ['a']


def test_quantized_parameter_in_a_pallas_kernel_is_refused():
  def apply(params, x):
    return pallas_matmul(x @ params['w'], params['w'])

  params, x = {'w': normal(0, 8, 8)}, normal(1, 8, 8)
  with pytest.raises(ValueError, match=r"'w' reaches 'pallas_call'"):
    ql.plan(apply, params, {'w': W8}, x)


# O: custom derivative rules --------------------------------------------------


@jax.custom_vjp
def doubled_gradient(x):
  return jnp.sin(x)


doubled_gradient.defvjp(
  lambda x: (jnp.sin(x), x), lambda x, c: (2 * jnp.cos(x) * c,)
)


@jax.custom_vjp
def linear(x, w):
  return x @ w


linear.defvjp(
  lambda x, w: (x @ w, (x, w)),
  lambda saved, c: (3 * c @ saved[1].T, saved[0].T @ c),
)


def test_custom_rule_without_a_site_survives():
  def apply(params, x):
    return doubled_gradient(x @ params['w'])

  params, x = {'w': normal(0, 8, 8)}, normal(1, 4, 8)
  plan = ql.plan(apply, params, {'w': W8}, x)
  simulated = ql.fake_quantized(apply, plan)
  got = jax.grad(lambda p: jnp.sum(simulated(p, x)))(params)['w']
  w = snap.symmetric(params['w'], 0)
  want = x.T @ (2 * np.cos(x @ w))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert plan.notes == ()


def test_custom_rule_around_a_chosen_site_is_walked_and_reported():
  def apply(params, x):
    return linear(x, params['w']) @ params['v']

  params = {'w': normal(0, 8, 8), 'v': normal(1, 8, 8)}
  x = normal(2, 4, 8)

  def input_gradient(plan):
    simulated = ql.fake_quantized(apply, plan)
    return jax.grad(lambda x: jnp.sum(simulated(params, x)))(x)

  inside = ql.plan(apply, params, {'w': W8}, x)
  [note] = inside.notes
  assert 'custom derivative rule of linear' in note
  w = snap.symmetric(params['w'], 0)
  ones = np.ones((4, 8), np.float32)
  want = ones @ params['v'].T @ w.T  # the product's own derivative
  np.testing.assert_allclose(input_gradient(inside), want, rtol=1e-4, atol=1e-4)
  outside = ql.plan(apply, params, {'v': W8}, x)
  assert outside.notes == ()
  v = snap.symmetric(params['v'], 0)
  want = 3 * ones @ v.T @ params['w'].T  # the user's rule
  np.testing.assert_allclose(
    input_gradient(outside), want, rtol=1e-4, atol=1e-4
  )
