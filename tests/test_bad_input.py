"""Bad input is refused before work starts, by name, with what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax
from oracle import snap

import quantlab as ql

W8 = ql.int8()
STATIC = ql.rule(weight=W8, input=ql.int8(per='tensor', static=True))


X = normal(9, 4, 8)
PARAMS = {
  'params': {'up': {'kernel': normal(0, 8, 12)}, 'down': normal(1, 12, 8)}
}


def apply(variables, x):
  p = variables['params']
  return jnp.tanh(x @ p['up']['kernel']) @ p['down']


def plan(rules, params=PARAMS, apply=apply, x=X):
  return ql.plan(apply, params, rules, x)


def message_of(error, call):
  with pytest.raises(error) as caught:
    call()
  return ' '.join(str(caught.value).split())


# Recipe and format -----------------------------------------------------------


def test_group_does_not_divide():
  message = message_of(ValueError, lambda: plan({'kernel': ql.int4(group=128)}))
  assert message == (
    "int4(group=128) does not divide 'params/up/kernel' along its contraction "
    'axis: shape=(8, 12), axis=-2. Use group=8 (divides 8), group=128 with '
    "ragged=True (a shorter last group), or None for '.*/up/.*'."
  )
  plan({'kernel': ql.int4(group=128, ragged=True)})


def test_group_does_not_divide_the_input():
  rule = ql.rule(weight=W8, input=ql.int8(group=5))
  message = message_of(ValueError, lambda: plan({'kernel': rule}))
  assert "int8(group=5) does not divide the input of 'params/up/kernel'" in (
    message
  )


def test_block_does_not_divide():
  message = message_of(
    ValueError, lambda: plan({'down': ql.int8(block=(4, 3))})
  )
  assert 'block=(4, 2)' in message
  assert "'params/down'" in message


def test_unknown_format():
  with pytest.raises(ValueError, match=r'int9.*did you mean'):
    ql.Quantizer('int9')


def test_granularity_given_twice():
  with pytest.raises(ValueError, match='two granularities at once'):
    ql.int8(per='tensor', group=4)


def test_nothing_is_quantized():
  message = message_of(ValueError, lambda: plan({'kernel': None}))
  assert message == 'every rule of the recipe is None: nothing is quantized'


def test_rule_of_the_wrong_kind():
  def attend(p, x):
    return (x @ p['w']) @ x.T

  params = {'w': normal(0, 8, 8)}
  message = message_of(
    ValueError, lambda: plan({'site:dot': W8}, params, attend)
  )
  assert "'w/dot_0' is a product of two activations" in message
  assert "takes ['lhs', 'rhs'], got ['weight']" in message
  pair = ql.rule(lhs=W8, rhs=W8)
  message = message_of(ValueError, lambda: plan({'w': pair}, params, attend))
  assert "'w' is a product with a weight" in message


@pytest.mark.parametrize(
  ('quantizer', 'reason'),
  [
    (ql.int8(per='token', static=True), "a static range needs per='tensor'"),
    (ql.int8(), 'a scale per channel cannot be taken out of the sum'),
    (ql.int8(per='token', rounding='stochastic'), 'needs a key in every call'),
  ],
)
def test_activation_quantizers_that_cannot_be(quantizer, reason):
  rule = ql.rule(weight=W8, input=quantizer)
  message = message_of(ValueError, lambda: plan({'kernel': rule}))
  assert "input of site 'params/up/kernel'" in message
  assert reason in message


def test_convolution_takes_one_scale_an_image():
  def conv(p, x):
    return lax.conv(x, p['w'], (1, 1), 'SAME')

  rule = ql.rule(weight=W8, input=ql.int8(group=3))
  params = {'w': normal(0, 4, 3, 3, 3)}
  x = normal(1, 2, 3, 5, 5)
  message = message_of(ValueError, lambda: plan({'': rule}, params, conv, x))
  assert "of convolution 'w'" in message
  assert 'one scale per image' in message


def test_stochastic_weights_need_a_key():
  rules = {'kernel': ql.int8(rounding='stochastic')}
  with pytest.raises(ValueError, match=r"'params/up/kernel'.*needs ptq"):
    ql.ptq(apply, PARAMS, rules, [X])
  a, b = (
    ql.ptq(apply, PARAMS, rules, [X], key=jax.random.key(seed))
    for seed in (0, 0)
  )
  kernel = a.params['weights']['params']['up']['kernel']
  np.testing.assert_array_equal(
    kernel.codes, b.params['weights']['params']['up']['kernel'].codes
  )


# Parameters ------------------------------------------------------------------


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_parameters_that_are_not_finite(bad):
  params = {'params': dict(PARAMS['params'])}
  params['params']['down'] = params['params']['down'].at[3, 2].set(bad)
  with pytest.raises(ValueError, match='NaN or infinity: params/down;'):
    ql.ptq(apply, params, {'': W8}, [X])
  ql.ptq(apply, params, {'kernel': W8}, [X])  # not among the chosen


def test_an_all_zero_channel_is_fine():
  params = {'params': dict(PARAMS['params'])}
  params['params']['down'] = params['params']['down'].at[:, 2].set(0)
  for rule in (W8, ql.int4(group=4, symmetric=False), ql.mxfp4(group=4)):
    model = ql.ptq(apply, params, {'': rule}, [X])
    out = model.apply(model.params, X)
    assert np.isfinite(out).all()
    assert not np.any(out[:, 2])
  zeros = jax.tree.map(jnp.zeros_like, params)
  both = ql.rule(weight=W8, input=ql.int8(per='token'))
  for rule in (both, STATIC):
    model = ql.ptq(apply, zeros, {'': rule}, [jnp.zeros_like(X)])
    assert not np.any(model.apply(model.params, jnp.zeros_like(X)))


def test_integer_parameters():
  params = {'w': jnp.ones((8, 8), jnp.int8)}
  x = jnp.ones((4, 8), jnp.int8)
  message = message_of(
    TypeError, lambda: plan({'w': W8}, params, lambda p, x: x @ p['w'], x)
  )
  assert message == (
    "site 'w' has int8 parameters; only floating-point parameters are "
    'quantized. Leave it in float (rule None).'
  )


def test_integer_parameters_that_are_cast():
  """Someone else's codes, cast and scaled, are an effective weight."""
  params = {'w': jnp.arange(-32, 32, dtype=jnp.int8).reshape(8, 8), 's': 0.1}
  model = ql.ptq(lambda p, x: x @ (p['w'] * p['s']), params, {'w': W8}, [X])
  w = snap.symmetric(np.asarray(params['w']) * np.float32(0.1), 0)
  np.testing.assert_allclose(
    model.apply(model.params, X), X @ w, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_half_precision_parameters(dtype):
  params = jax.tree.map(lambda w: (w / 4).astype(dtype), PARAMS)
  x = X.astype(dtype)
  both = ql.rule(weight=W8, input=ql.int8(per='token'))
  for rule in (W8, both, STATIC, ql.int4(group=4)):
    model = ql.ptq(apply, params, {'': rule}, [x])
    out = model.apply(model.params, x)
    assert out.dtype == dtype
    kernel = model.params['weights']['params']['up']['kernel']
    assert kernel.dtype == dtype
    limit = 0.3 if rule.__class__ is ql.Quantizer and rule.bits == 4 else 3e-2
    assert snap.error(out, apply(params, x)) < limit
    simulated = ql.fake_quantized(apply, model.plan)
    variables = {'weights': params, 'sites': model.params['sites']}
    assert snap.error(simulated(variables, x), out) < 2e-2
  kernel = np.asarray(params['params']['up']['kernel'], np.float32)
  model = ql.ptq(apply, params, {'kernel': W8}, [x])
  got = model.params['weights']['params']['up']['kernel'].dequantize()
  want = snap.symmetric(kernel, 0).astype(dtype)
  np.testing.assert_array_equal(got, want)


def test_parameters_that_are_codes_already():
  model = ql.ptq(apply, PARAMS, {'down': W8}, [X])
  coded = model.params['weights']
  for call in (
    lambda: plan({'': W8}, coded),
    lambda: ql.ptq(apply, coded, {'': W8}, [X]),
  ):
    assert 'quantized already: params/down; a plan' in message_of(
      TypeError, call
    )


def test_weights_without_elements():
  params = {'params': {**PARAMS['params'], 'down': jnp.zeros((12, 0))}}
  for q in (W8, ql.int4(group=4, symmetric=False), ql.nvfp4(group=4)):
    model = ql.ptq(apply, params, {'': q}, [X])
    assert model.apply(model.params, X).shape == (4, 0)
  params['params']['up'] = {'kernel': jnp.zeros((0, 12))}
  message = message_of(
    ValueError, lambda: plan({'kernel': W8}, params, apply, X[:, :0])
  )
  assert "weight of site 'params/up/kernel' has no elements" in message
  assert '(0, 12). Leave it in float' in message


# Calibration -----------------------------------------------------------------


def test_calibration_is_empty():
  with pytest.raises(ValueError, match='there is no batch'):
    ql.ptq(apply, PARAMS, {'': W8}, [])


def test_calibration_cannot_be_read_twice():
  with pytest.raises(
    TypeError, match=r're-iterable.*one-shot iterator generat'
  ):
    ql.ptq(apply, PARAMS, {'': W8}, (x for x in [X]))
  with pytest.raises(TypeError, match=r'one-shot iterator list_iterator'):
    ql.ptq(apply, PARAMS, {'': W8}, iter([X]))


@pytest.mark.parametrize('batches', [X, np.asarray(X), {'x': X}, 'path'])
def test_one_batch_is_no_list_of_batches(batches):
  with pytest.raises(TypeError, match=r'given as a list, got one .*\[batch\]'):
    ql.ptq(apply, PARAMS, {'': W8}, batches)


@pytest.mark.parametrize('batches', [None, 3, lambda: [X]])
def test_calibration_is_nothing_to_iterate(batches):
  with pytest.raises(TypeError, match='given as a list, got'):
    ql.ptq(apply, PARAMS, {'': W8}, batches)


@pytest.mark.parametrize('batches', [[X[:0]], [X, X[:0]]])
def test_a_batch_without_examples(batches):
  at = len(batches) - 1
  with pytest.raises(ValueError, match=f'calibration batch {at} is empty'):
    ql.ptq(apply, PARAMS, {'': STATIC}, batches)


def test_batches_that_end_after_the_first_reading():
  class Once:
    def __init__(self):
      self.left = [X]

    def __iter__(self):
      while self.left:
        yield self.left.pop()

  with pytest.raises(ValueError, match=r'there is no batch.*more than once'):
    ql.ptq(apply, PARAMS, {'': STATIC}, Once())


def test_calibration_batches_of_another_shape():
  with pytest.raises(ValueError, match=r'calibration batch 1 is .*7\].*8\]'):
    ql.ptq(apply, PARAMS, {'': STATIC}, [X, normal(0, 4, 7)])
  with pytest.raises(ValueError, match=r'calibration batch 2 is .*float16'):
    ql.ptq(apply, PARAMS, {'': STATIC}, [X, X, X.astype(jnp.float16)])
  # A shorter last batch is no other shape.
  ql.ptq(apply, PARAMS, {'': STATIC}, [X, X[:2]])


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_calibration_is_not_finite(bad):
  batches = [X, X.at[1, 2].set(bad)]
  with pytest.raises(
    ValueError,
    match=r"calibration batch 1 .*input of site 'params/up/kernel'; remove",
  ):
    ql.ptq(apply, PARAMS, {'': STATIC}, batches)


@pytest.mark.parametrize('count', [1, 128 * 64])
def test_nan_among_many_values_is_not_passed_over(count):
  """XLA's minimum and maximum over a large array drop it on CPUs."""
  fine = normal(0, 128, 64)
  bad = fine.reshape(-1).at[:count].set(jnp.nan).reshape(fine.shape)
  params = {'w': normal(1, 64, 8)}
  dynamic = ql.rule(weight=W8, input=ql.int8(per='token'))
  for rule, how in ((STATIC, ql.rtn()), (dynamic, ql.chain(ql.smooth()))):
    with pytest.raises(ValueError, match='not finite'):
      ql.ptq(lambda p, x: x @ p['w'], params, {'': rule}, [fine, bad], how)


def test_errors_leave_nothing_computed():
  """A plan is refused from shapes: the function is never run on numbers."""
  ran = []

  def noisy(variables, x):
    jax.debug.callback(lambda: ran.append(1))
    return apply(variables, x)

  with pytest.raises(ValueError, match='does not divide'):
    ql.ptq(noisy, PARAMS, {'kernel': ql.int4(group=128)}, [X])
  jax.effects_barrier()
  assert not ran


@pytest.mark.parametrize(
  ('rule', 'reason'),
  [
    (ql.int8(static=True), 'static ranges are for activations'),
    (
      ql.rule(weight=W8, input=ql.codebook(bits=3, per='tensor')),
      'a learned table is for weights',
    ),
    (
      ql.rule(weight=W8, input=ql.ternary(per='tensor', static=True)),
      'absmean() is no range that calibration finds',
    ),
  ],
)
def test_quantizers_in_the_wrong_place(rule, reason):
  message = message_of(ValueError, lambda: plan({'kernel': rule}))
  assert "of site 'params/up/kernel'" in message
  assert reason in message


# The function ----------------------------------------------------------------


@pytest.mark.parametrize('bad', [None, 'apply', PARAMS])
def test_apply_is_no_function(bad):
  for call in (
    lambda: ql.ptq(bad, PARAMS, {'': W8}, [X]),
    lambda: ql.plan(bad, PARAMS, {'': W8}, X),
    lambda: ql.quantized(bad),
  ):
    assert 'apply must be a function of (params, *args), got' in message_of(
      TypeError, call
    )


@pytest.mark.parametrize(
  ('params', 'args', 'note'),
  [
    (PARAMS, (X[:, :7],), 'params=a dict of [params], args=(float32[4, 7],)'),
    (PARAMS, ([X],), 'args=([float32[4, 8]],)'),
    (PARAMS['params'], (X,), 'params=a dict of [down, up], args='),
    (PARAMS, ('x',), 'args=(str,)'),
    (None, (X,), 'params=NoneType'),
  ],
)
def test_an_error_of_the_function_says_what_it_was_given(params, args, note):
  with pytest.raises((TypeError, KeyError)) as caught:
    ql.plan(apply, params, {'': W8}, *args)
  notes = caught.value.__notes__  # JAX adds one of its own
  (found,) = [n for n in notes if n.startswith('quantlab was tracing apply(')]
  assert note in found


# Variables -------------------------------------------------------------------


def test_parameters_that_are_not_as_planned():
  model = ql.ptq(apply, PARAMS, {'': W8}, [X])
  for variables in (PARAMS, {**model.params, 'weights': PARAMS}):
    message = message_of(TypeError, lambda v=variables: model.apply(v, X))
    assert "'params/up/kernel' is planned as int8(), got a float arr" in message
    assert 'ql.fake_quantized(apply, plan)' in message
  other = ql.ptq(apply, PARAMS, {'': ql.int4(group=4)}, [X])
  message = message_of(ValueError, lambda: model.apply(other.params, X))
  assert 'planned as int8(), got codes of int4(group=4): these are' in message
  # The codes alone are all that this model needs.
  whole = model.apply(model.params, X)
  assert np.array_equal(model.apply(model.params['weights'], X), whole)


@pytest.mark.parametrize(
  ('state', 'message'),
  [
    ({'down': {}}, "unknown sites ['down']; known: ['params/up/kernel', 'par"),
    ({'params/down': {'wieght': {'bits': 4}}}, "'params/down' for 'wieght'"),
    (
      {'params/down': {'weight': {'bit': 4}}},
      "'params/down' gives the weight ['bit']; known: ['bits', 'scale',",
    ),
  ],
)
def test_slips_in_the_state_of_a_site(state, message):
  simulated = ql.fake_quantized(apply, plan({'': W8}))
  assert message in message_of(
    ValueError, lambda: simulated({'weights': PARAMS, 'sites': state}, X)
  )


@pytest.mark.parametrize('bad', [{'': W8}, 'plan', ql.recipe({'': W8})])
def test_a_plan_of_another_type(bad):
  for transform in (ql.quantized, ql.fake_quantized):
    with pytest.raises(TypeError, match=r'the plan is what ql\.plan.*got'):
      transform(apply, bad)


@pytest.mark.parametrize('key', [0, 'seed', jnp.zeros(2, jnp.uint32)])
def test_a_key_that_is_none(key):
  params, x = {'w': jnp.ones((4, 4))}, jnp.ones((2, 4))
  with pytest.raises(TypeError, match=r'one random key.*random\.key'):
    ql.ptq(lambda p, x: x @ p['w'], params, {'w': ql.int8()}, [x], key=key)


def test_shapes_are_no_parameters():
  params = {'w': jax.ShapeDtypeStruct((4, 4), jnp.float32)}
  with pytest.raises(TypeError, match=r"\['w'\] are shapes without values"):
    ql.ptq(
      lambda p, x: x @ p['w'], params, {'w': ql.int8()}, [jnp.ones((2, 4))]
    )
