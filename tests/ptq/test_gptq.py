"""GPTQ along the block walk: programs of every shape, and the claim."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab as ql
from quantlab import core
from quantlab.ptq import transform
from quantlab.ptq.second_order import second_order


def dense(p, x):
  return jax.nn.relu(x @ p['a']) @ p['b']


def conv(p, x):
  kinds = ('NHWC', 'HWIO', 'NHWC')
  x = jax.lax.conv_general_dilated(
    x, p['full'], (1, 1), 'SAME', dimension_numbers=kinds
  )
  x = jax.lax.conv_general_dilated(
    jax.nn.relu(x),
    p['depthwise'],
    (2, 2),
    'SAME',
    dimension_numbers=kinds,
    feature_group_count=x.shape[-1],
  )
  return jax.nn.relu(x).mean((1, 2)) @ p['head']


def scanned(p, x):
  def layer(x, w):
    return x + jax.nn.gelu(x @ w['up']) @ w['down'], None

  return jax.lax.scan(layer, x, p['layers'])[0] @ p['head']


def experts(p, x):
  h = jax.nn.relu(jnp.einsum('ebk,ekn->ebn', x, p['w']))
  return jnp.einsum('ebn,enm->ebm', h, p['v'])


def fused(p, x):
  qkv = x @ jnp.concatenate([p['q'], p['k'], p['v']], 1)
  scaled = x @ (p['w'] / jnp.linalg.norm(p['w'], axis=0) * p['g'])
  return jnp.tanh(qkv)[..., :16] @ p['o'] + scaled


def arrays(seed, **shapes):
  r = np.random.default_rng(seed)
  return {
    k: (r.normal(size=s) / np.sqrt(s[-2])).astype(np.float32)
    for k, s in shapes.items()
  }


def inputs(seed, *shape):
  """Rows with correlated features, of one law for every seed."""
  r, law = np.random.default_rng(seed), np.random.default_rng(99)
  k = shape[-1]
  mix = np.diag(law.uniform(0.2, 2, k))
  mix += law.normal(size=(k, 3)) @ law.normal(size=(3, k))
  return (r.normal(size=shape) @ mix / 2).astype(np.float32)


CASES = {
  'dense': (dense, arrays(0, a=(32, 48), b=(48, 16)), (64, 32)),
  'conv': (
    conv,
    arrays(1, full=(3, 3, 4, 16), depthwise=(3, 3, 1, 16), head=(16, 8)),
    (16, 8, 8, 4),
  ),
  'scanned': (
    scanned,
    {
      'layers': arrays(2, up=(3, 16, 32), down=(3, 32, 16)),
      **arrays(3, head=(16, 8)),
    },
    (64, 16),
  ),
  'experts': (experts, arrays(4, w=(3, 16, 24), v=(3, 24, 8)), (3, 64, 16)),
  'fused': (
    fused,
    arrays(5, q=(16, 16), k=(16, 8), v=(16, 8), o=(16, 8), w=(16, 8))
    | {'g': np.ones(8, np.float32)},
    (64, 16),
  ),
}


@pytest.mark.parametrize('case', CASES)
def test_beats_rounding_on_fresh_data(case):
  apply, params, shape = CASES[case]
  batches = [inputs(s, *shape) for s in range(4)]
  fresh = inputs(9, *shape)
  want = apply(params, fresh)
  error = {}
  for name, method in (('rtn', ql.rtn()), ('gptq', ql.gptq())):
    model = ql.ptq(apply, params, {'.*': ql.int3()}, batches, method)
    got = jax.jit(model.apply)(model.params, fresh)
    error[name] = float(jnp.mean((got - want) ** 2))
  assert error['gptq'] < 0.85 * error['rtn'], error


@pytest.mark.parametrize(
  'q',
  [
    ql.int4(group=16, symmetric=False),
    ql.nf4(group=16),
    ql.codebook(bits=2),
  ],
  ids=repr,
)
def test_any_format(q):
  _, params, shape = CASES['dense']
  params = {'a': params['a'], 'b': params['b'][:32]}

  def narrow(p, x):
    return jax.nn.relu(x @ p['a'])[..., :32] @ p['b']

  batches = [inputs(s, *shape) for s in range(2)]
  model = ql.ptq(narrow, params, {'.*': q}, batches, ql.gptq())
  for path in ('a', 'b'):
    assert model.params['weights'][path].quantizer == q
  assert np.isfinite(np.asarray(model.apply(model.params, batches[0]))).all()


@pytest.mark.parametrize(
  ('q', 'options'),
  [
    (
      ql.int3(group=12),
      {'static_groups': False, 'act_order': False},
    ),
    (ql.int3(block=(12, 4)), {}),
  ],
  ids=repr,
)
def test_grouped_convolution(q, options):
  """Codes are those of the compensated weight, on the scales it was given."""

  def apply(p, x):
    return jax.lax.conv_general_dilated(
      x,
      p['w'],
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=2,
    )

  params = arrays(6, w=(3, 3, 4, 16))
  x = inputs(0, 8, 6, 6, 8)
  model = ql.ptq(apply, params, {'.*': q}, [x], ql.gptq(**options))
  patches = jax.lax.conv_general_dilated_patches(
    x, (3, 3), (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  rows = np.asarray(patches).reshape(-1, 2, 4, 9).transpose(1, 0, 3, 2)
  rows = rows.reshape(2, -1, 36)
  matrix = params['w'].reshape(36, 2, 8)
  got = np.asarray(model.params['weights']['w'].dequantize()).reshape(36, 2, 8)
  for i in range(2):
    one = q if q.block is None else ql.int3(block=(12, 4))
    out = second_order(
      jnp.asarray(matrix[:, i]),
      jnp.asarray(rows[i].T @ rows[i] / len(rows[i])),
      one,
      act_order=options.get('act_order', True),
      static_groups=options.get('static_groups', True),
    )
    # A different order of sums may turn a rounding here and there.
    assert np.mean(np.abs(got[:, i] - out.weight) > 1e-5) < 0.05


def test_the_second_layer_sees_the_quantized_stream():
  """Its Hessian is of what its weight meets: codes before it, and its own."""
  _, params, shape = CASES['dense']
  rule = ql.rule(weight=ql.int2(), input=ql.int3(per='token'))
  batches = [inputs(s, *shape) for s in range(3)]
  model = ql.ptq(dense, params, {'.*': rule}, batches, ql.gptq())
  weights = model.params['weights']

  def seen(x):
    return np.asarray(core.fake_quantize(x, rule.input, axis=-1), float)

  total = np.zeros((48, 48))
  for x in batches:
    h = jax.nn.relu(seen(x).astype(np.float32) @ weights['a'].dequantize())
    total += seen(h).T @ seen(h) / (3 * len(x))
  q = rule.weight
  want = second_order(
    params['b'], jnp.asarray(total, jnp.float32), q, act_order=True
  )
  got = np.asarray(weights['b'].dequantize())
  assert np.mean(got != want.weight) < 0.02
  floats = sum(
    (h := np.asarray(jax.nn.relu(x @ params['a']), float)).T @ h
    for x in batches
  )
  other = second_order(
    params['b'], jnp.asarray(floats, jnp.float32), q, act_order=True
  )
  assert np.mean(got != other.weight) > 0.05


def test_an_expert_that_got_few_tokens_is_named():
  """Rows of zeros pad what each was sent."""
  _, params, _ = CASES['experts']
  x = inputs(0, 3, 64, 16)
  x[1, 5:] = 0
  model = ql.ptq(experts, params, {'w': ql.int4()}, [x], ql.gptq())
  fact = model.report['weights']['w']
  assert fact['rows'] == 5
  assert 'entry 1 of 3' in fact['warning']


def test_arguments_out_of_range():
  with pytest.raises(ValueError, match='needs act_order=False'):
    ql.gptq(static_groups=False)
  with pytest.raises(ValueError, match='damp is a positive share'):
    ql.gptq(damp=-1)


def test_layers_of_a_scan_equal_the_unrolled_layers():
  apply, params, shape = CASES['scanned']

  def unrolled(p, x):
    for w in p['layers']:
      x = x + jax.nn.gelu(x @ w['up']) @ w['down']
    return x @ p['head']

  flat = {
    'layers': [
      {k: v[i] for k, v in params['layers'].items()} for i in range(3)
    ],
    'head': params['head'],
  }
  batches = [inputs(s, *shape) for s in range(2)]
  stacked = ql.ptq(apply, params, {'.*': ql.int4()}, batches, ql.gptq())
  listed = ql.ptq(unrolled, flat, {'.*': ql.int4()}, batches, ql.gptq())
  for i in range(3):
    for name in ('up', 'down'):
      a = stacked.params['weights']['layers'][name].dequantize()[i]
      b = listed.params['weights']['layers'][i][name].dequantize()
      assert np.mean(np.abs(np.asarray(a) - np.asarray(b)) > 1e-5) < 0.02


def test_folded_batch_norm():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(8, (3, 3), use_bias=False)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
      return nn.Dense(4)(x.mean((1, 2)))

  x = inputs(0, 16, 6, 6, 4)
  params = Net().init(jax.random.key(0), x)
  stats = params['batch_stats']['BatchNorm_0']
  stats['mean'], stats['var'] = stats['mean'] + 0.3, stats['var'] * 4
  error = {}
  for name, method in (('rtn', ql.rtn()), ('gptq', ql.gptq())):
    model = ql.ptq(Net().apply, params, {'kernel': ql.int3()}, [x], method)
    assert 'params/Conv_0/kernel' in model.params['effective']
    got = model.apply(model.params, x) - Net().apply(params, x)
    error[name] = float(jnp.mean(got**2))
  assert error['gptq'] < 0.85 * error['rtn'], error


def test_tied_parameter_is_rounded_to_nearest():
  def tied(p, ids):
    return jnp.tanh(p['e'][ids] @ p['w']) @ p['e'].T

  params = arrays(6, e=(24, 16), w=(16, 16))
  batches = [np.arange(12) * 2]
  gptq = ql.ptq(tied, params, {'.*': ql.int4()}, batches, ql.gptq())
  rtn = ql.ptq(tied, params, {'.*': ql.int4()}, batches)
  np.testing.assert_array_equal(
    gptq.params['weights']['e'].codes, rtn.params['weights']['e'].codes
  )
  assert np.any(
    gptq.params['weights']['w'].codes != rtn.params['weights']['w'].codes
  )


def test_too_few_rows_are_said():
  apply, params, _ = CASES['dense']
  model = ql.ptq(
    apply, params, {'.*': ql.int4()}, [inputs(0, 8, 32)], ql.gptq()
  )
  facts = model.report['weights']['a']
  assert facts['rows'] == 8
  assert '8 rows of calibration for 32 inputs' in facts['warning']


def test_calibration_that_is_not_finite_is_named():
  apply, params, shape = CASES['dense']
  bad = inputs(0, *shape)
  bad[3, 4] = np.nan
  with pytest.raises(ValueError, match="inputs of 'a' are not finite"):
    ql.ptq(apply, params, {'.*': ql.int4()}, [bad], ql.gptq())


def test_chain_refuses_disorder():
  later = transform.Transform('tweak', 'correct', lambda c: c)
  with pytest.raises(ValueError, match=r'gptq\(\) \(encode\) cannot follow'):
    ql.chain(later, ql.gptq())
  with pytest.raises(ValueError, match='one member that makes codes'):
    ql.chain(ql.rtn(), ql.gptq())
  with pytest.raises(TypeError, match='takes transforms such as'):
    ql.chain(ql.int4())
