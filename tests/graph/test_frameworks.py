"""Models of several frameworks, quantized by their dataflow."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax
from oracle import snap

import quantlab as ql

pytestmark = pytest.mark.as_for_users

W8 = ql.int8()
W8A8 = ql.rule(weight=ql.int8(), input=ql.int8(per='token'))
STATIC = ql.rule(
  weight=ql.int8(), input=ql.int8(per='tensor', static=True, symmetric=False)
)


W, V, X = normal(0, 8, 8), normal(1, 8, 8), normal(2, 4, 8)
W_HAT, V_HAT = snap.symmetric(W, 0), snap.symmetric(V, 0)


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def run(apply, params, *args, rules=None):
  model = ql.ptq(apply, params, rules or {'': W8}, [args])
  return model.apply(model.params, *args), model


# Branches and loops ----------------------------------------------------------


def test_recurrent_network_has_one_range_over_time():
  cell = nn.RNN(nn.LSTMCell(8))
  x = normal(0, 2, 6, 4)
  params = cell.init(jax.random.key(1), x)
  model = ql.ptq(cell.apply, params, {'kernel': STATIC}, [x])
  for site in model.params['sites'].values():
    assert site['input']['scale'].shape == (1, 1)
  inputs = model.params['sites']['params/cell/ii/kernel']['input']['scale']
  np.testing.assert_allclose(inputs[0, 0], (x.max() - x.min()) / 255, rtol=1e-5)
  out = model.apply(model.params, x)
  assert 1e-4 < snap.error(out, cell.apply(params, x)) < 5e-2


def test_experts_by_einsum():
  params = {'w': normal(0, 3, 8, 6)}
  x = normal(1, 3, 5, 8)

  def apply(p, x):
    return jnp.einsum('ecd,edf->ecf', x, p['w'])

  for rule in (W8, W8A8):
    out, model = run(apply, params, x, rules={'w': rule})
    w = snap.symmetric(params['w'], 1)
    x_hat = snap.symmetric(x, 2) if rule is W8A8 else x
    close(out, np.einsum('ecd,edf->ecf', x_hat, w))
    assert model.params['weights']['w'].scale.shape == (3, 1, 6)


def test_attention_kernels_of_three_axes():
  attention = nn.MultiHeadDotProductAttention(2)
  x = normal(0, 2, 5, 8)
  params = attention.init(jax.random.key(1), x)
  model = ql.ptq(attention.apply, params, {'kernel': W8A8}, [x])
  found = model.params['weights']['params']
  kernels = params['params']
  for name, axes in (('query', 0), ('key', 0), ('value', 0), ('out', (0, 1))):
    want = snap.symmetric(kernels[name]['kernel'], axes)
    np.testing.assert_array_equal(found[name]['kernel'].dequantize(), want)
  out = model.apply(model.params, x)
  assert 1e-4 < snap.error(out, attention.apply(params, x)) < 3e-2


def test_keywords_flags_and_mutable_statistics():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, scale=1.0):
      x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
      return nn.Dense(4)(x * scale)

  params = Model().init(jax.random.key(0), X, train=False)

  def apply(params, x, train=False, scale=1.0):
    if not train:
      return Model().apply(params, x, train=False, scale=scale)
    return Model().apply(
      params, x, train=True, scale=scale, mutable=['batch_stats']
    )

  model = ql.ptq(apply, params, {'kernel': W8}, [X])
  assert model.plan.folded == {'params/Dense_0/kernel'}
  out = jax.jit(lambda p, x: model.apply(p, x, scale=2.0))(model.params, X)
  assert snap.error(out, apply(params, X, scale=2.0)) < 3e-2
  # In training the norm depends on the batch: nothing is folded.
  plan = ql.plan(apply, params, {'kernel': W8}, X, train=True)
  assert not plan.folded
  assert not plan.dropped
  simulated = ql.fake_quantized(apply, plan)
  out, stats = simulated(params, X, train=True)
  want, want_stats = apply(params, X, train=True)
  assert 1e-4 < snap.error(out, want) < 3e-2
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=3e-2), stats, want_stats
  )


def test_equinox():
  eqx = pytest.importorskip('equinox')
  mlp = eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0))

  def apply(model, x):
    return jax.vmap(model)(x)

  model = ql.ptq(apply, mlp, {'weight': W8A8}, [X])
  assert list(model.plan.sites) == [f'layers/{i}/weight' for i in range(3)]
  out = eqx.filter_jit(model.apply)(model.params, X)
  np.testing.assert_array_equal(model.apply(model.params, X), out)
  h = np.asarray(X)
  for i, layer in enumerate(mlp.layers):
    h = snap.symmetric(h, 1) @ snap.symmetric(layer.weight, 1).T + layer.bias
    h = np.maximum(h, 0) if i < 2 else h
  close(out, h)


def test_haiku():
  hk = pytest.importorskip('haiku')
  net = hk.transform(lambda x: hk.nets.MLP([8, 4])(x))
  params = net.init(jax.random.key(0), X)
  key = jax.random.key(1)

  def apply(params, x):
    return net.apply(params, key, x)

  out, model = run(apply, params, X, rules={'/w$': W8})
  first, second = params['mlp/~/linear_0'], params['mlp/~/linear_1']
  h = np.maximum(X @ snap.symmetric(first['w'], 0) + first['b'], 0)
  close(out, h @ snap.symmetric(second['w'], 0) + second['b'])
  assert list(model.plan.sites) == ['mlp/~/linear_0/w', 'mlp/~/linear_1/w']


def test_a_dataclass_of_parameters():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass
  class Net:
    w: jax.Array
    inner: dict

  params = Net(W, {'v': [V]})
  out, model = run(lambda p, x: (x @ p.w) @ p.inner['v'][0], params, X)
  assert isinstance(model.params['weights'], Net)
  assert list(model.plan.sites) == ['w', 'inner/v/0']
  close(out, (X @ W_HAT) @ V_HAT)


class Count:
  """How often each site is evaluated."""

  def init(self, site):
    return jnp.zeros((), jnp.int32)

  def update(self, site, stat, lhs, rhs, out, state):
    return stat + 1

  def merge(self, site, a, b):
    return a + b


def test_statistics_are_stacked_by_layer_and_merged_over_steps():
  def apply(params, x):
    def layer(x, w):
      x = lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ w), x)

      def step(carry):
        h, i = carry
        return lax.scan(lambda h, _: (h @ w, None), h, None, length=3)[0], i + 1

      return lax.while_loop(lambda c: c[1] < 2, step, (x, 0))[0], None

    x, _ = lax.scan(layer, x, params['w'])
    return lax.cond(
      x.sum() > 1e9, lambda: x @ params['v'], lambda: (x @ params['u']) * 2
    )

  params = {'w': normal(0, 2, 8, 8) / 3, 'v': V, 'u': W}
  out, counts = ql.observe(apply, Count())(params, X)
  np.testing.assert_array_equal(out, jax.jit(apply)(params, X))
  assert jax.tree.map(lambda n: np.asarray(n).tolist(), counts) == {
    'w': [4, 4],  # by layer, over the steps of the for loop
    'w:1': [6, 6],  # over a scan in a while loop
    'u': 1,
    'v': 0,  # the branch that was not taken
  }
