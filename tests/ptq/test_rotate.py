"""Rotations keep the function and spread outliers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs
from jax import lax

import quantlab as ql
from quantlab import planner, rewrites
from quantlab.graph import tracing
from quantlab.models import digits
from quantlab.ptq import hadamard
from quantlab.ptq.transform import Context

KEY = jax.random.key(5)
W4A4 = ql.rule(weight=ql.int4(), input=ql.int4(per='token'))


def context(program, rules, state=None):
  traced, leaves, inputs = tracing.Tracer(program.apply)(
    program.params, program.args, {}
  )
  plan = planner.make(traced, leaves, inputs, ql.recipe(rules))
  return Context(
    program.apply, traced, plan, program.params, [program.args], state or {}
  )


def rotated(program, rules, **options):
  return ql.rotate(KEY, **options).run(context(program, rules))


def outputs(ctx, program):
  run = rewrites.transformed(ctx.apply, ctx.plan)
  return run({'weights': ctx.params, 'sites': ctx.state}, *program.args)


# Matrices ---------------------------------------------------------------------


@pytest.mark.parametrize('n', [2, 7, 12, 48, 64, 128, 172, 384])
def test_matrices_are_orthogonal_and_keep_the_mean(n):
  rng = np.random.default_rng(n)
  for make in (hadamard.rotation, hadamard.mean_keeping):
    matrix = make(rng, n)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-6)
    if n in (12, 48, 64, 128, 384):  # no large odd part
      # One channel goes to all: 1 of a Hadamard matrix, sqrt(n) of none.
      assert np.abs(matrix).max() * np.sqrt(n) < 2.2
  np.testing.assert_allclose(matrix @ np.ones(n), np.ones(n), atol=1e-6)


@pytest.mark.parametrize(
  'n', [1, 6, 64, 128, 172, 384, 1536, 4096, 3 * 43 * 47]
)
def test_factors_multiply_to_the_channels(n):
  sizes = hadamard.sizes(n)
  assert np.prod(sizes, dtype=int) == n
  assert all(k <= hadamard.LARGEST for k in sizes)


def test_powers_of_two_are_flat():
  matrix = hadamard.rotation(np.random.default_rng(0), 256)
  np.testing.assert_allclose(abs(matrix), 1 / 16)


def test_odd_parts_are_not_near_the_identity():
  for seed in range(5):
    [three] = hadamard.factors(np.random.default_rng(seed), 3)
    assert abs(three).max() < 0.85


# The function stays -----------------------------------------------------------


def vit():
  model = digits.Vit(dim=12, blocks=2, heads=2)
  x = programs.Random()(2, 8, 8, 1, scale=1.0)
  shapes = jax.eval_shape(model.init, programs.KEY, x)
  return programs.Program(model.apply, programs.filled(shapes), (x,))


MODELS = {
  'linen': (
    programs.linen_transformer,
    '/kernel$',
    {'residual', 'heads', 'online'},
  ),
  'scanned': (
    functools.partial(programs.linen_transformer, True),
    '/kernel$',
    {'residual', 'heads', 'online'},
  ),
  'llama': (programs.bare_llama, '/blocks/', {'heads', 'online'}),
  'bert': (programs.masked_bert, '/kernel$', {'heads', 'online'}),
  'vit': (vit, '/kernel$', {'residual', 'heads', 'online'}),
}


@pytest.mark.parametrize('name', MODELS)
def test_the_float_function_stays(name):
  make, pattern, parts = MODELS[name]
  program = make()
  ctx = rotated(program, {pattern: W4A4})
  want = program.apply(program.params, *program.args)
  assert programs.error(outputs(ctx, program), want) < 1e-5
  facts = ctx.report['rotate']
  assert set(facts) == {*parts, 'left'}
  # Every input is rotated once: in the weights or at run time.
  online = {s for names in facts.get('online', {}) for s in names.split(', ')}
  assert online == set(ctx.state)
  assert online < set(ctx.plan.quantized)
  assert any(
    not np.array_equal(a, b)
    for a, b in zip(
      jax.tree.leaves(ctx.params), jax.tree.leaves(program.params), strict=True
    )
  )


def test_what_is_covered_is_not_rotated_at_run_time():
  program = programs.linen_transformer()
  ctx = rotated(program, {'/kernel$': W4A4})
  down = {f'params/block_{i}/down/kernel' for i in (0, 1)}
  assert set(ctx.state) == down
  assert ctx.report['rotate']['residual'] == {'params/embed/embedding': 8}
  assert set(ctx.report['rotate']['heads'].values()) == {4}


def test_only_quantized_inputs_are_rotated_at_run_time():
  program = programs.masked_bert()
  rules = {'/up/': W4A4, '/kernel$': ql.rule(weight=ql.int4())}
  ctx = rotated(program, rules)
  assert set(ctx.state) == {f'blocks/{i}/mlp/up/kernel' for i in (0, 1)}


def test_dtypes_stay():
  program = programs.linen_transformer()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), program.params)
  ctx = rotated(program._replace(params=half), {'/kernel$': W4A4})
  kinds = {str(x.dtype) for x in jax.tree.leaves(ctx.params)}
  assert kinds == {'bfloat16'}


def test_one_key_one_rotation():
  program = programs.linen_transformer(True)
  runs = [rotated(program, {'/kernel$': W4A4}) for _ in range(2)]
  other = ql.rotate(jax.random.key(6)).run(context(program, {'/kernel$': W4A4}))

  def leaves(ctx):
    return jax.tree.leaves((ctx.params, dict(ctx.state)))

  same = [
    all(
      np.array_equal(a, b)
      for a, b in zip(leaves(runs[0]), leaves(x), strict=True)
    )
    for x in (runs[1], other)
  ]
  assert same == [True, False]


# What it is good for ----------------------------------------------------------


def concentrated(seed, dim=64, layers=1):
  """Pre-norm MLPs whose stream lies in few channels, with a head."""
  new = programs.Random(seed)
  fat = np.where(np.arange(dim) % 32 == seed, 30.0, 1.0).astype(np.float32)
  params = {
    'embed': new(32, dim, scale=1.0) * fat,
    'blocks': [
      {
        'gain': 1 + new(dim, scale=0.1),
        'up': new(dim, 2 * dim, scale=dim**-0.5),
        'down': new(2 * dim, dim, scale=dim**-0.5),
      }
      for _ in range(layers)
    ],
    'last': 1 + new(dim, scale=0.1),
    'head': new(dim, 16, scale=dim**-0.5),
  }

  def apply(p, tokens):
    x = p['embed'][tokens]
    for b in p['blocks']:
      y = programs.rms_norm(b['gain'], x) @ b['up']
      x = x + jax.nn.gelu(y) @ b['down']
    return programs.rms_norm(p['last'], x) @ p['head']

  tokens = np.arange(32).reshape(2, 16)
  return programs.Program(apply, params, (tokens,))


def peaks(x):
  """Largest over mean magnitude of each row, averaged."""
  x = np.abs(np.asarray(x))
  return float((x.max(-1) / x.mean(-1)).mean())


def test_peaks_of_the_stream_fall():
  program = concentrated(1)
  ctx = rotated(program, {'/(up|down|head)$': W4A4})
  before, after = peaks(program.params['embed']), peaks(ctx.params['embed'])
  assert before > 15
  assert after < 5


def test_folding_alone_removes_what_gains_make():
  program = concentrated(0)
  params = jax.tree.map(lambda x: x, program.params)
  params['embed'] = programs.Random(3)(32, 64, scale=1.0)
  for block in params['blocks']:
    s = jnp.where(jnp.arange(64) % 16 == 0, 40.0, 1.0)
    block['gain'], block['up'] = block['gain'] * s, block['up'] / s[:, None]
  program = program._replace(params=params)
  ctx = ql.fold_norms().run(context(program, {'/(up|down)$': W4A4}))
  want = program.apply(program.params, *program.args)
  assert programs.error(outputs(ctx, program), want) < 1e-5
  assert np.allclose(ctx.params['blocks'][0]['gain'], 1)
  assert ctx.report['fold_norms']['residual'] == {
    'embed': ['blocks/0/gain', 'last']
  }


# Refused ----------------------------------------------------------------------


def test_a_tied_head_behind_a_gain_is_left_and_said_so():
  program = programs.bare_llama()
  ctx = rotated(program, {'/blocks/': W4A4})
  [why] = ctx.report['rotate']['left'].values()
  assert 'norm/scale' in why
  assert 'embed/embedding' in why
  with pytest.raises(ValueError, match=r'nothing to rotate.*streams[^$]*tied'):
    rotated(program, {'/blocks/': W4A4}, heads=False, online=False)


def test_post_norm_has_no_residual_part():
  with pytest.raises(ValueError, match='post-norm'):
    rotated(
      programs.masked_bert(), {'/kernel$': W4A4}, heads=False, online=False
    )


def test_a_gain_with_a_zero():
  program = concentrated(0)
  program.params['last'] = program.params['last'].at[3].set(0)
  ctx = rotated(program, {'/(up|down|head)$': W4A4})
  [why] = ctx.report['rotate']['left'].values()
  assert why == "its gain 'last' has zeros"


def test_nothing_to_rotate():
  program = programs.cifar_resnet()
  rules = {'/kernel$': ql.rule(weight=ql.int4())}
  with pytest.raises(ValueError, match='quantized inputs of matrix products'):
    rotated(program, rules)
  with pytest.raises(ValueError, match='looked for nothing'):
    rotated(program, rules, residual=False, heads=False, online=False)


def test_convolutions_are_left():
  new = programs.Random(4)
  params = {'conv': new(3, 3, 2, 4), 'up': new(64, 8), 'head': new(8, 3)}

  def apply(p, x):
    dims = ('NHWC', 'HWIO', 'NHWC')
    x = lax.conv_general_dilated(
      x, p['conv'], (1, 1), 'SAME', dimension_numbers=dims
    )
    x = jnp.tanh(jax.nn.relu(x).reshape(2, -1) @ p['up'])
    return x @ p['head']

  program = programs.Program(apply, params, (new(2, 4, 4, 2, scale=1.0),))
  ctx = rotated(program, {'.*': W4A4})
  facts = ctx.report['rotate']
  assert 'convolution' in facts['left']['conv']
  assert facts['online'] == {'up': [64], 'head': [8]}
  want = apply(params, *program.args)
  assert programs.error(outputs(ctx, program), want) < 1e-5


def test_no_key():
  with pytest.raises(ValueError, match='key='):
    ql.rotate().run(context(programs.masked_bert(), {'/kernel$': W4A4}))


def test_inputs_changed_at_run_time_before():
  program = concentrated(0)
  state = {'blocks/0/up': {'transform': {'gain': jnp.ones(64)}}}
  ctx = context(program, {'/(up|down|head)$': W4A4}, state)
  with pytest.raises(ValueError, match='rotate first'):
    ql.rotate(KEY, heads=False, online=False).run(ctx)


def test_an_input_that_one_product_reads_in_part():
  """Products of other sizes on one input are rotated by matrices of theirs."""
  keys = jax.random.split(jax.random.key(0), 4)

  def apply(p, a, b):
    both = jnp.concatenate([a, b], -1)
    return both @ p['wide'] + a @ p['part']

  params = {
    'wide': jax.random.normal(keys[0], (20, 6)),
    'part': jax.random.normal(keys[1], (8, 6)),
  }
  a = jax.random.normal(keys[2], (5, 8))
  b = jax.random.normal(keys[3], (5, 12))
  rule = ql.rule(weight=ql.int8(), input=ql.int8(per='token'))
  member = ql.rotate(jax.random.key(1), residual=False, heads=False)
  model = ql.ptq(apply, params, {'.*': rule}, [(a, b)], member)
  sizes = [np.prod(v) for v in model.report['rotate']['online'].values()]
  assert sorted(sizes) == [8, 20]
  assert not model.report['rotate']['left']
  out, want = model.apply(model.params, a, b), apply(params, a, b)
  assert jnp.abs(out - want).max() < 0.03 * jnp.abs(want).max()
