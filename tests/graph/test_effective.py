"""Effective weights: what is quantized is Q(T(w)), T(w) worked out by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax
from oracle import snap

import quantlab as ql
from quantlab.graph.values import Dropped

W8 = ql.int8()


X = normal(9, 4, 8)


def close(got, want, tolerance=1e-5):
  np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def run(apply, params, *args, rules=None):
  """Deployed and simulated results agree; returns them with the model."""
  model = ql.ptq(apply, params, rules or {'': W8}, [args])
  out = model.apply(model.params, *args)
  simulated = ql.fake_quantized(apply, model.plan)
  variables = {'weights': params, 'sites': model.params['sites']}
  close(simulated(variables, *args), out, 1e-5)
  return out, model


# Layout-only: codes are pushed through ---------------------------------------


@pytest.mark.parametrize('rule', [W8, ql.int4(group=4), ql.nf4(group=8)])
def test_fused_projections_by_concatenation(rule):
  params = {k: normal(i, 8, 4) for i, k in enumerate('qkv')}

  def apply(p, x):
    return jnp.tanh(x @ jnp.concatenate([p['q'], p['k'], p['v']], axis=1))

  out, model = run(apply, params, X, rules={'': rule})
  weights = model.params['weights']
  dense = np.concatenate([weights[k].dequantize() for k in 'qkv'], axis=1)
  close(out, np.tanh(X @ dense))
  assert not model.params['effective']
  if rule is W8:
    for k in 'qkv':
      np.testing.assert_array_equal(
        weights[k].dequantize(), snap.symmetric(params[k], 0)
      )


def test_joined_weights_take_one_rule():
  params = {'q': normal(0, 8, 4), 'k': normal(1, 8, 4)}

  def apply(p, x):
    return x @ jnp.concatenate([p['q'], p['k']], axis=1)

  with pytest.raises(ValueError, match='joins q, k, which match different'):
    ql.plan(apply, params, {'q': W8, 'k': ql.int4()}, X)


def test_one_scale_for_joined_weights_is_an_effective_weight():
  """Per-tensor scales cannot be joined: the joined weight is stored."""
  params = {'q': normal(0, 8, 4), 'k': 3 * normal(1, 8, 4)}

  def apply(p, x):
    return x @ jnp.concatenate([p['q'], p['k']], axis=1)

  out, model = run(apply, params, X, rules={'': ql.int8(per='tensor')})
  dense = snap.symmetric(np.concatenate([params['q'], params['k']], 1), (0, 1))
  close(out, X @ dense)
  assert list(model.params['effective']) == ['q']
  assert set(model.plan.dropped) == {'q', 'k'}


def test_split_reshaped_and_cast_weights():
  params = {'qkv': normal(0, 8, 12), 'heads': normal(1, 2, 4, 8)}

  def apply(p, x):
    q, k, v = jnp.split(p['qkv'].astype(jnp.bfloat16), 3, axis=1)
    x = x.astype(jnp.bfloat16)
    y = jnp.concatenate([x @ q + x @ k, x @ v], -1).astype(jnp.float32)
    w = p['heads'].reshape(8, 8)  # contracted over (2, 4) as one
    return y @ w

  out, model = run(apply, params, X)
  assert not model.params['effective']
  codes = snap.symmetric(params['qkv'], 0)
  q, k, v = np.split(codes.astype(jnp.bfloat16).astype(np.float32), 3, axis=1)
  x = np.asarray(X.astype(jnp.bfloat16), np.float32)
  w = snap.symmetric(np.reshape(params['heads'], (8, 8)), 0)
  want = np.concatenate([x @ q + x @ k, x @ v], -1) @ w
  assert snap.error(out, want) < 1e-2  # sums rounded to bfloat16


def test_a_part_of_the_contraction_is_an_effective_weight():
  """Codes are packed along the contraction: a slice of it is stored anew."""
  params = {'w': normal(0, 8, 4)}

  def apply(p, x):
    return x[:, :4] @ p['w'][:4] - x[:, 4:] @ p['w'][4:]

  out, model = run(apply, params, X)
  top, bottom = (
    snap.symmetric(params['w'][:4], 0),
    snap.symmetric(params['w'][4:], 0),
  )
  close(out, X[:, :4] @ top - X[:, 4:] @ bottom)
  assert list(model.params['effective']) == ['w', 'w:1']
  assert model.plan.dropped == ('w',)


def test_stages_of_a_reshaped_stack():
  params = {'w': normal(0, 6, 8, 8)}

  def apply(p, x):
    def layer(x, w):
      return jnp.tanh(x @ w), None

    def stage(x, w):
      return lax.scan(layer, x, w)[0], None

    return lax.scan(stage, x, p['w'].reshape(2, 3, 8, 8))[0]

  out, model = run(apply, params, X)
  want = X
  for w in params['w']:
    want = np.tanh(want @ snap.symmetric(w, 0))
  close(out, want, 1e-4)
  assert model.plan.dropped == ('w',)
  assert model.params['effective']['w'].scale.shape == (2, 3, 1, 8)


# Computed from parameters ----------------------------------------------------


def test_weight_norm():
  params = {'v': normal(0, 8, 4), 'g': normal(1, 4)}

  def apply(p, x):
    v = p['v']
    return x @ (v * (p['g'] / jnp.linalg.norm(v, axis=0)))

  out, model = run(apply, params, X)
  v = np.asarray(params['v'])
  w = v * (params['g'] / np.linalg.norm(v, axis=0))
  close(out, X @ snap.symmetric(w, 0), 1e-4)
  assert set(model.plan.dropped) == {'v', 'g'}
  assert isinstance(model.params['weights']['v'], Dropped)
  assert model.nbytes == 8 * 4 + 4 * 4  # codes and scales, nothing else
  assert 'no longer stored: g, v' in model.summary()


def test_merged_low_rank_update():
  params = {'w': normal(0, 8, 4), 'a': normal(1, 8, 2), 'b': normal(2, 2, 4)}

  def apply(p, x):
    return x @ (p['w'] + p['a'] @ p['b'])

  out, model = run(apply, params, X)
  dense = params['w'] + params['a'] @ params['b']
  close(out, X @ snap.symmetric(dense, 0), 1e-4)
  assert set(model.plan.dropped) == {'w', 'a', 'b'}
  assert model.plan.sites['w'].paths[0] == 'w'  # the largest names it


def test_an_original_that_is_needed_elsewhere_stays():
  params = {'w': normal(0, 8, 4), 'g': normal(1, 4)}

  def apply(p, x):
    return x @ (p['w'] * p['g']) + p['g'] * jnp.sum(p['w'] ** 2)

  out, model = run(apply, params, X)
  w, g = params['w'], params['g']
  close(out, X @ snap.symmetric(w * g, 0) + g * np.sum(w**2), 1e-4)
  assert model.plan.dropped == ()


def test_parameter_stored_as_codes_and_computed_with_is_refused():
  params = {'w': normal(0, 8, 8)}

  def apply(p, x):
    return x @ p['w'] + jnp.sum(p['w'] ** 2)

  with pytest.raises(ValueError) as caught:
    ql.plan(apply, params, {'w': W8}, X)
  message = str(caught.value)
  assert "quantized parameter 'w' reaches 'integer_pow'" in message or (
    "quantized parameter 'w' reaches 'square'" in message
  )
  assert "Leave 'w' in float (rule None), or pass strict=False" in message
  assert 'also read by' in message


def test_lenient_recipe_dequantizes_and_says_so():
  params = {'w': normal(0, 8, 8)}

  def apply(p, x):
    return x @ p['w'] + jnp.sum(jnp.abs(p['w']))

  recipe = ql.recipe({'w': W8}, strict=False)
  model = ql.ptq(apply, params, recipe, [X])
  w = snap.symmetric(params['w'], 0)
  close(model.apply(model.params, X), X @ w + np.abs(w).sum(), 1e-4)
  assert any('w: dequantized for abs' in n for n in model.plan.notes)
  lenient = ql.quantized(apply, strict=False)
  with pytest.warns(UserWarning, match='w: dequantized for abs'):
    close(lenient(model.params['weights'], X), X @ w + np.abs(w).sum(), 1e-4)
  with pytest.raises(TypeError, match="'w' reaches 'abs'"):
    ql.quantized(apply)(model.params['weights'], X)


def test_scanned_weight_norm():
  params = {'v': normal(0, 3, 8, 8), 'g': normal(1, 3, 8)}

  def apply(p, x):
    def layer(x, p):
      w = p['v'] * (p['g'] / jnp.linalg.norm(p['v'], axis=0))
      return jnp.tanh(x @ w), None

    return lax.scan(layer, x, p)[0]

  out, model = run(apply, params, X)
  want = X
  for v, g in zip(params['v'], params['g'], strict=True):
    w = v * (g / np.linalg.norm(v, axis=0))
    want = np.tanh(want @ snap.symmetric(w, 0))
  close(out, want, 1e-4)
  assert model.params['effective']['v'].scale.shape == (3, 1, 8)


def test_weight_computed_in_a_carry_of_layers():
  """A weight that depends on the layers before: known, one for each."""
  params = {'w': normal(0, 3, 8, 8) / 3}

  def apply(p, x):
    def layer(carry, w):
      x, total = carry
      total = total + w
      return (jnp.tanh(x @ total), total), None

    return lax.scan(layer, (x, jnp.zeros((8, 8))), p['w'])[0][0]

  out, _ = run(apply, params, X)
  want = X
  for w in np.cumsum(params['w'], axis=0):
    want = np.tanh(want @ snap.symmetric(w, 0))
  close(out, want, 1e-4)


def test_effective_weights_in_both_branches():
  """Planning runs on one batch; both branches have their weights."""
  params = {'w': normal(0, 8, 4), 'g': normal(1, 4)}

  def apply(p, x, flag):
    return lax.cond(
      flag, lambda: x @ (p['w'] * p['g']), lambda: x @ (p['w'] + p['g'])
    )

  model = ql.ptq(apply, params, {'': W8}, [(X, jnp.array(True))])
  w, g = params['w'], params['g']
  close(
    model.apply(model.params, X, jnp.array(True)),
    X @ snap.symmetric(w * g, 0),
    1e-4,
  )
  close(
    model.apply(model.params, X, jnp.array(False)),
    X @ snap.symmetric(w + g, 0),
    1e-4,
  )


def test_computed_weight_on_the_left_of_time_steps():
  """One weight, computed inside a loop over time, the same at each step."""
  params = {'w': normal(0, 8, 8), 'g': normal(1, 8)}

  def apply(p, xs):
    def step(h, x):
      return jnp.tanh((p['w'] * p['g']) @ (h + x)), None

    return lax.scan(step, jnp.zeros((8, 2)), xs)[0]

  xs = normal(3, 5, 8, 2)
  out, _ = run(apply, params, xs)
  w = snap.symmetric(params['w'] * params['g'], 1)
  h = np.zeros((8, 2), np.float32)
  for x in xs:
    h = np.tanh(w @ (h + x))
  close(out, h, 1e-4)


# BatchNorm -------------------------------------------------------------------


class Normed(nn.Module):
  kind: str

  @nn.compact
  def __call__(self, x):
    if self.kind == 'dense':
      x = nn.Dense(4)(x)
    else:
      groups = x.shape[-1] if self.kind == 'depthwise' else 1
      x = nn.Conv(4, (3, 3), feature_group_count=groups)(x)
    return nn.relu(nn.BatchNorm(use_running_average=True, name='norm')(x))


def normed(kind):
  x = X if kind == 'dense' else normal(0, 2, 5, 5, 4)
  params = Normed(kind).init(jax.random.key(1), x)
  noise = iter(jax.random.split(jax.random.key(2), 8))
  params = jax.tree.map(
    lambda a: a + jax.random.uniform(next(noise), a.shape), params
  )
  return Normed(kind).apply, params, x


def fold(params, kind):
  """(kernel, bias) with the norm folded in, by NumPy."""
  p = params['params']
  layer = p['Dense_0' if kind == 'dense' else 'Conv_0']
  stats = params['batch_stats']['norm']
  a = p['norm']['scale'] / np.sqrt(stats['var'] + 1e-5)
  return layer['kernel'] * a, (layer['bias'] - stats['mean']) * a + p['norm'][
    'bias'
  ]


@pytest.mark.parametrize('kind', ['conv', 'depthwise', 'dense'])
@pytest.mark.parametrize('per', ['channel', 'tensor'])
def test_batch_norm_folding(kind, per):
  apply, params, x = normed(kind)
  out, model = run(apply, params, x, rules={'kernel': ql.int8(per=per)})
  kernel, bias = fold(params, kind)
  axes = tuple(range(kernel.ndim - (per == 'channel')))
  kernel = jnp.asarray(snap.symmetric(kernel, axes))
  if kind == 'dense':
    y = x @ kernel
  else:
    y = lax.conv_general_dilated(
      x,
      kernel,
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=4 if kind == 'depthwise' else 1,
    )
  close(out, np.maximum(y + bias, 0), 1e-4)
  assert len(model.plan.folded) == 1
  assert not any(
    isinstance(v, jax.Array) for v in jax.tree.leaves(model.params['weights'])
  )
  if per == 'channel':  # scales move with the channels: folding is free
    plain = ql.ptq(
      apply, params, {'kernel': ql.rule(weight=W8, fold=False)}, [x]
    )
    assert not plain.plan.folded
    close(plain.apply(plain.params, x), out, 1e-4)


def test_folding_with_integer_products_and_output_ranges():
  apply, params, x = normed('conv')
  rule = ql.rule(
    weight=W8,
    input=ql.int8(per='tensor', static=True),
    output=ql.int8(per='tensor', static=True, symmetric=False),
  )
  out, model = run(apply, params, x, rules={'kernel': rule})
  kernel, bias = fold(params, 'conv')

  def conv(x, kernel):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(
      x, jnp.asarray(kernel), (1, 1), 'SAME', dimension_numbers=numbers
    )

  # The output's range is that of the folded product, not of the bare one.
  y = np.asarray(conv(x, kernel) + bias)
  scale = model.params['sites']['params/Conv_0/kernel']['output']['scale']
  np.testing.assert_allclose(scale[0, 0], (y.max() - y.min()) / 255, rtol=1e-4)
  x_hat = jnp.asarray(snap.symmetric(x, None))
  y_hat = conv(x_hat, snap.symmetric(kernel, (0, 1, 2))) + bias
  want = np.maximum(snap.fixed(y_hat, y.min(), y.max()), 0)
  assert snap.error(out, want) < 5e-3


def test_folded_simulation_is_differentiable():
  apply, params, x = normed('conv')
  plan = ql.plan(apply, params, {'kernel': ql.int8(per='tensor')}, x)
  simulated = ql.fake_quantized(apply, plan)

  def loss(f, params):
    return jnp.sum(f(params, x) ** 2)

  got = jax.grad(lambda p: loss(simulated, p))(params)
  want = jax.grad(lambda p: loss(apply, p))(params)
  # Straight through: close to the float gradient, not zero, for every leaf.
  jax.tree.map(lambda a, b: close(snap.error(a, b), 0, 0.1), got, want)


def test_two_users_of_a_product_are_not_folded():
  def apply(p, x):
    y = x @ p['w']
    return y * p['g'] + jnp.sum(y)

  params = {'w': normal(0, 8, 4), 'g': normal(1, 4)}
  out, model = run(apply, params, X)
  assert not model.plan.folded
  y = X @ snap.symmetric(params['w'], 0)
  close(out, y * params['g'] + np.sum(y), 1e-4)


def test_scanned_norms_fold_layer_by_layer():
  params = {'w': normal(0, 3, 8, 8), 'a': normal(1, 3, 8), 'b': normal(2, 3, 8)}

  def apply(p, x):
    def layer(x, p):
      return jnp.tanh((x @ p['w'] - p['b']) * p['a'] + p['b']), None

    return lax.scan(layer, x, p)[0]

  out, model = run(apply, params, X, rules={'w': ql.int8(per='tensor')})
  want = X
  for w, a, b in zip(*(params[k] for k in 'wab'), strict=True):
    want = np.tanh(want @ snap.symmetric(w * a, (0, 1)) - b * a + b)
  close(out, want, 1e-3)
  assert model.params['sites']['w']['fold']['shift'].shape == (3, 8)
  assert set(model.plan.dropped) == {'w', 'a', 'b'}


def test_a_weight_that_grows_is_noted_and_bound_to_its_shape():
  params = {'w': normal(0, 8, 4)}

  def apply(p, x):
    return jnp.einsum('bi,bij->bj', x, jnp.broadcast_to(p['w'], (len(x), 8, 4)))

  out, model = run(apply, params, X)
  close(out, X @ snap.symmetric(params['w'], 0))
  [note] = model.plan.notes
  assert 'w: its effective weight has 128 elements' in note
  with pytest.raises(
    ValueError, match=r'has shape \(4, 8, 4\), this call needs'
  ):
    model.apply(model.params, X[:2])


def test_what_is_read_from_a_ref_is_no_weight():
  params = {'w': normal(0, 8, 8)}

  def apply(p, x):
    ref = jax.new_ref(jnp.zeros((4, 8)))
    ref[...] = jnp.tanh(x) + ref[...]
    return ref[...] @ p['w']

  model = ql.ptq(apply, params, {'w': W8}, [X])
  want = np.tanh(X) @ snap.symmetric(params['w'], 0)
  close(model.apply(model.params, X), want)
