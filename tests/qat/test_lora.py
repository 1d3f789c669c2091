"""Adapters on quantized bases: what is computed, trained, stored and merged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graph import programs
from jax import lax
from scipy import stats

import quantlab as ql
from quantlab.core import is_qtensor
from quantlab.qat import low_bit

R = programs.Random(5)
BASES = {
  'w4a16': ql.int4(group=16),
  'nf4': ql.nf4(group=16),
  'w4a8': ql.rule(weight=ql.int4(group=16), input=ql.int8(per='token')),
  'w8a8': ql.rule(weight=ql.int8(), input=ql.int8(per='token')),
}


def mlp(p, x):
  y = jax.nn.relu(jnp.einsum('btk,khd->bthd', x, p['up']))
  return jnp.einsum('bthd,hdn->btn', y, p['down'])


def scanned(p, x):
  def layer(h, w):
    return h + jnp.tanh(h @ w), None

  return lax.scan(layer, x, p['layers'])[0] @ p['head']


CASES = {
  'mlp': (mlp, {'up': R(32, 4, 8), 'down': R(4, 8, 16)}, R(2, 5, 32)),
  'scan': (scanned, {'layers': R(3, 32, 32), 'head': R(32, 16)}, R(6, 32)),
}


def setup(case, base, pattern='.', **options):
  apply, params, x = CASES[case]
  model = ql.ptq(apply, params, ql.recipe({'.': BASES[base]}), [x])
  adapted = ql.lora(apply, model.plan, pattern, rank=3, alpha=6.0, **options)
  return model, adapted, adapted.init(jax.random.key(0), model.params), x


def random_adapters(variables, seed=0, size=0.3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda v: jnp.asarray(rng.normal(size=v.shape) * size, v.dtype),
    ql.adapters(variables),
  )


def matrix(a, b):
  return 2.0 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)


def with_product(case, params, adapters):
  """Float parameters with alpha / rank A B added, by NumPy."""
  new = {}
  for name, w in params.items():
    delta = matrix(adapters[name]['a'], adapters[name]['b'])
    new[name] = jnp.asarray(w + delta.reshape(w.shape), jnp.float32)
  return new


def dense(model):
  return jax.tree.map(
    lambda q: q.dequantize(), model.params['weights'], is_leaf=is_qtensor
  )


@pytest.mark.parametrize(
  ('case', 'base'),
  [('scan', 'w4a16'), ('mlp', 'nf4'), ('scan', 'w4a8'), ('mlp', 'w4a8')],
)
def test_the_product_has_ab_added(case, base):
  apply, _, _ = CASES[case]
  model, adapted, variables, x = setup(case, base)
  run = jax.jit(adapted.apply)
  np.testing.assert_allclose(  # B is zero to begin with
    run(variables, x), model.apply(model.params, x), atol=2e-4
  )
  new = random_adapters(variables)
  variables = ql.with_adapters(variables, new)
  got = run(variables, x)
  frozen = adapted.freeze(variables)
  np.testing.assert_allclose(
    frozen.apply(frozen.params, x), got, rtol=0, atol=2e-3
  )
  if base != 'w4a8':  # activations are what they are
    want = apply(with_product(case, dense(model), new), x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    merged = adapted.merge(variables)
    assert jax.tree.structure(merged) == jax.tree.structure(dense(model))
    np.testing.assert_allclose(apply(merged, x), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize('case', ['scan'])
def test_gradients_are_those_of_the_dequantized_model(case):
  apply, _, _ = CASES[case]
  model, adapted, variables, x = setup(case, 'nf4')
  new = random_adapters(variables, 1)

  def loss(adapters):
    y = adapted.apply(ql.with_adapters(variables, adapters), x)
    return jnp.sum(jnp.sin(y))

  def float_loss(adapters):
    p = {
      k: w + (2 * adapters[k]['a'] @ adapters[k]['b']).reshape(w.shape)
      for k, w in dense(model).items()
    }
    return jnp.sum(jnp.sin(apply(p, x)))

  got, want = (jax.jit(jax.grad(f))(new) for f in (loss, float_loss))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * np.abs(b).max())


def test_quantized_activations_pass_gradients_straight_through():
  _, adapted, variables, x = setup('scan', 'w8a8')

  def loss(adapters):
    y = adapted.apply(ql.with_adapters(variables, adapters), x)
    return jnp.mean(y**2)

  grads = jax.grad(loss)(random_adapters(variables, 2))
  for layer in grads['layers']['a']:
    assert np.abs(layer).max() > 1e-5


def test_labels_name_the_adapters_and_leave_the_codes_alone():
  model, _, variables, _ = setup('scan', 'w4a16')
  labels = model.plan.labels(variables)
  assert labels['sites']['head']['adapter'] == {
    'a': 'adapter',
    'b': 'adapter',
    'scale': 'state',
  }
  assert set(jax.tree.leaves(labels['weights'])) == {'state'}


def test_requantized_after_merging():
  apply, _, _ = CASES['scan']
  model, adapted, variables, x = setup('scan', 'w4a16')
  new = random_adapters(variables, 3, 0.1)
  merged = adapted.merge(ql.with_adapters(variables, new), requantize=True)
  want = ql.ptq(
    apply,
    with_product('scan', dense(model), new),
    ql.recipe({'.': BASES['w4a16']}),
    [x],
  )
  for name in ('layers', 'head'):
    a, b = (m.params['weights'][name] for m in (merged, want))
    assert a.quantizer == b.quantizer
    np.testing.assert_allclose(a.dequantize(), b.dequantize(), atol=0.2)
    same = np.asarray(a.unpack()) == np.asarray(b.unpack())
    assert same.mean() > 0.999  # at a midpoint the last bit may decide
  assert merged.params['sites'] == {}
  merged.apply(merged.params, x)


def test_gaussian_levels():
  """arXiv 2307.16867: quantiles, each the median of its part of the law."""
  np.testing.assert_allclose(
    low_bit.normal_levels(1), [-0.67449, 0.67449], atol=1e-5
  )
  levels = low_bit.normal_levels(2)
  np.testing.assert_allclose(levels[2:], [0.37775, 1.26572], atol=1e-5)
  sample = stats.norm.ppf((np.arange(400_000) + 0.5) / 400_000)

  def error(levels):
    return np.abs(sample[:, None] - levels).min(1).mean()

  for bits in (1, 2, 3):
    best = low_bit.normal_levels(bits)
    for other in (best * 1.02, best * 0.98, best + 0.02):
      assert error(best) < error(other)


def test_low_bit_adapters(tmp_path):
  """Codes of each matrix by NumPy; trained is frozen is saved."""
  bits = 2
  _, adapted, variables, x = setup('scan', 'w4a16', '^/layers', bits=bits)
  assert np.abs(variables['sites']['layers']['adapter']['b']).min() > 0
  variables = ql.with_adapters(variables, random_adapters(variables, 4))
  frozen = adapted.freeze(variables)
  for name, leaves in ql.adapters(variables).items():
    for k, w in leaves.items():
      q = frozen.params['sites'][name]['adapter'][k]
      w = np.asarray(w, np.float64)
      mean, std = (
        f(w, axis=(-2, -1), keepdims=True) for f in (np.mean, np.std)
      )
      levels = low_bit.normal_levels(bits)
      z = (w - mean) / (std + 1e-5)
      code = np.abs(z[..., None] - levels).argmin(-1)
      want = levels[code] * (std + 1e-5) + mean
      np.testing.assert_array_equal(q.unpack(), code)
      np.testing.assert_allclose(q.dequantize(), want, rtol=0, atol=1e-6)
      matrices = w.size // (w.shape[-1] * w.shape[-2])
      tables = 4 * (1 + 2**bits) * matrices
      assert q.codes.nbytes <= np.ceil(w.size * bits / 8) + w.shape[-1] * 3
      assert q.nbytes == q.codes.nbytes + tables
  got = adapted.apply(variables, x)
  np.testing.assert_allclose(frozen.apply(frozen.params, x), got, atol=1e-4)
  ql.save(tmp_path / 'model', frozen)
  loaded = ql.load(tmp_path / 'model', CASES['scan'][0])
  np.testing.assert_array_equal(
    loaded.apply(loaded.params, x), frozen.apply(frozen.params, x)
  )


def test_gradients_through_low_bit_adapters():
  """Straight through rounding, with mean and spread in the graph."""
  w = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
  g = np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32)
  quantizer = ql.codebook(bits=1, per='tensor')
  got = jax.grad(lambda w: jnp.sum(g * low_bit.simulate(w, quantizer)))(w)

  def pieces(w):
    spread = w.std() + 1e-5
    z = (w - w.mean()) / spread
    levels = low_bit.normal_levels(1)
    return levels[np.abs(z[..., None] - levels).argmin(-1)] - z

  fixed = pieces(w.astype(np.float64))  # what rounding adds, a constant

  def value(w):
    spread = w.std() + 1e-5
    return (g * (((w - w.mean()) / spread + fixed) * spread + w.mean())).sum()

  want = np.zeros_like(w, np.float64)
  for i in np.ndindex(w.shape):
    step = np.zeros(w.shape)
    step[i] = 1e-5
    want[i] = (value(w + step) - value(w - step)) / 2e-5
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('bits', [None, 1])
def test_training_adapters_serves_another_task(bits):
  """The base is quantized for one task and adapted to another."""
  model, adapted, variables, x = setup('mlp', 'nf4', bits=bits)
  base = dense(model)
  goal = mlp({**base, 'up': base['up'] + 0.3 * R(32, 1, 1) * R(4, 8)}, x)
  optimizer = optax.adam(0.01)

  def loss(adapters):
    y = adapted.apply(ql.with_adapters(variables, adapters), x)
    return jnp.mean((y - goal) ** 2)

  def step(carry, _):
    adapters, state = carry
    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(adapters, updates), state), value

  start = ql.adapters(variables)
  carry = start, optimizer.init(start)
  _, values = jax.jit(lambda c: lax.scan(step, c, length=150))(carry)
  assert values[-1] < (0.1 if bits is None else 0.5) * values[0]


def conv(p, x):
  y = lax.conv_general_dilated(
    x, p['kernel'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  return y.mean((1, 2)) @ p['head']


def test_refusals():
  apply, params, x = CASES['scan']
  plan = ql.plan(apply, params, {'.': ql.int4()}, x)
  with pytest.raises(ValueError, match=r"'mlp' meets none .*'layers', 'head'"):
    ql.lora(apply, plan, 'mlp')
  for rank in (0, -1, 2.0, True):
    with pytest.raises(ValueError, match='rank takes a positive integer'):
      ql.lora(apply, plan, '.', rank=rank)
  with pytest.raises(ValueError, match=r"rank=17 .*'head', a matrix 32 x 16"):
    ql.lora(apply, plan, '.', rank=17)
  ql.lora(apply, plan, '^/layers', rank=17)
  with pytest.raises(ValueError, match='not a regular expression'):
    ql.lora(apply, plan, '(')
  with pytest.raises(ValueError, match='bits takes 1 to 8'):
    ql.lora(apply, plan, '.', bits=9)
  model = ql.ptq(apply, params, plan, [x])
  with pytest.raises(TypeError, match=r'model\.plan, found Quantized'):
    ql.lora(apply, model, '.')
  narrow, wide = (
    ql.lora(apply, plan, '.', rank=r).init(jax.random.key(0), model.params)
    for r in (2, 4)
  )
  with pytest.raises(ValueError, match='has the shapes'):
    ql.with_adapters(wide, ql.adapters(narrow))
  with pytest.raises(ValueError, match='alpha is positive'):
    ql.lora(apply, plan, '.', alpha=0)
  with pytest.raises(TypeError, match='params of a quantized model'):
    ql.lora(apply, plan, '.').init(jax.random.key(0), params)
  weights = {'kernel': R(3, 3, 2, 8), 'head': R(8, 4)}
  image = R(2, 5, 5, 2)
  mixed = ql.plan(conv, weights, {'.': ql.int4()}, image)
  with pytest.raises(ValueError, match=r"'kernel': 'conv'.*narrow"):
    ql.lora(conv, mixed, '.', rank=2)
  ql.lora(conv, mixed, 'site:head', rank=2)


def tied(p, ids):
  h = jnp.tanh(p['embed'][ids] @ p['w'])
  return h @ p['embed'].T


def test_a_shared_weight_takes_an_adapter_but_no_merging():
  params, ids = {'embed': R(12, 8), 'w': R(8, 8)}, jnp.arange(5)
  model = ql.ptq(tied, params, ql.recipe({'.': ql.int8()}), [ids])
  name = next(
    k
    for k, s in model.plan.sites.items()
    if s.kind == 'dot' and 'embed' in s.paths
  )
  adapted = ql.lora(tied, model.plan, f'site:^{name}$', rank=2)
  variables = adapted.init(jax.random.key(0), model.params)
  variables = ql.with_adapters(variables, random_adapters(variables))
  a, b = (ql.adapters(variables)[name][k] for k in 'ab')
  p = dense(model)
  h = jnp.tanh(p['embed'][ids] @ p['w'])
  want = h @ p['embed'].T + 8 * (h @ a) @ b
  got = adapted.apply(variables, ids)
  np.testing.assert_allclose(got, want, atol=1e-4)
  with pytest.raises(ValueError, match='shared by'):
    adapted.merge(variables)
