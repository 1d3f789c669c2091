"""Transforms that scale, shift or balance keep the function of any model."""

import functools

import jax
import numpy as np
import pytest
from graph import programs
from ptq import equivalents

import quantlab as ql
from quantlab import rewrites
from quantlab.ptq import inputs

# Each finds what the ones before it left, at run time too.
MEMBERS = (
  ql.outlier_suppression(grid=4),
  ql.smooth(),
  ql.cross_layer_equalization(),
  ql.awq(grid=4),
)


def outputs(ctx, program):
  run = rewrites.transformed(program.apply, ctx.plan)
  return run({'weights': ctx.params, 'sites': dict(ctx.state)}, *program.args)


@functools.cache
def after_all(name):
  """The float error after all members, what was refused, and the context.

  One comparison at the end: errors of several members do not cancel.
  """
  make, rules = equivalents.MODELS[name]
  program = make()
  want = jax.jit(program.apply)(program.params, *program.args)
  ctx = equivalents.context(program, rules)
  refused = {}
  for member in MEMBERS:
    try:
      changed = member.run(ctx)
    except ValueError as e:
      refused[member.name] = str(e)
      continue
    assert changed.params is not ctx.params
    ctx = changed
  return programs.error(outputs(ctx, program), want), refused, ctx


UNPAIRED = {'unet', 'fused'}  # no ReLU between two weights


@pytest.mark.parametrize('name', equivalents.MODELS)
def test_the_float_function_stays(name):
  error, refused, _ = after_all(name)
  assert error < 1e-5
  assert set(refused) == (
    {'cross_layer_equalization'} if name in UNPAIRED else set()
  )
  for message in refused.values():
    assert 'nothing to act on' in message


@pytest.mark.parametrize('name', equivalents.MODELS)
def test_every_input_is_reported(name):
  *_, ctx = after_all(name)
  quantized = {k for k, s in ctx.plan.quantized.items() if s.rule.input}
  for member in ('smooth', 'outlier_suppression', 'awq'):
    facts = ctx.report[member]
    # 'a, b from c': what pair c feeds of the inputs of a and b.
    ids = {i for key in facts for i in key.split(' from ')[0].split(', ')}
    assert ids == quantized
    for fact in facts.values():
      assert 'left' in fact or 0 < fact['smallest'] <= fact['largest']


def test_folds_where_it_can():
  def folded(name, member='smooth'):
    facts = after_all(name)[-1].report[member]
    return {k: f['folded'] for k, f in facts.items() if 'left' not in f}

  llama = folded('llama')
  assert all(llama.values())
  assert len(llama) == 4
  bert = folded('bert')  # a norm's output enters the residual sum as well
  assert [k for k, f in bert.items() if f] == ['blocks/1/attention/out/kernel']
  assert not any(folded('unet').values())


def test_a_shift_follows_the_scale_of_its_input_and_product():
  # Llama has no biases: shifts stay at run time, at both ends of `up`.
  program, rules = programs.bare_llama(), equivalents.MODELS['llama'][1]
  ctx = equivalents.context(program, rules)
  rng = np.random.default_rng(0)
  order = inputs.inputs(ctx)
  for where in order:
    z = rng.normal(size=where.shape).astype(np.float32)
    ctx = inputs.shift_input(ctx, where, z)
  assert all(s.get('bias') is not None for s in ctx.state.values())
  for where in order:
    s = np.exp(rng.normal(size=where.shape)).astype(np.float32)
    ctx = inputs.scale_input(ctx, where, s)
  want = program.apply(program.params, *program.args)
  assert programs.error(outputs(ctx, program), want) < 1e-5


def test_what_is_rotated_is_not_scaled():
  program, rules = programs.bare_llama(), equivalents.MODELS['llama'][1]
  ctx = equivalents.context(program, rules)
  where = inputs.inputs(ctx)[0]
  signs = np.ones(16, np.float32)
  turned = inputs.rotate_input(ctx, where, signs, (np.eye(4),))
  found = ql.smooth().run(turned).report['smooth']
  assert 'rotated at run time already' in found[where.name]['left']
  with pytest.raises(ValueError, match='before rotations'):
    inputs.scale_input(turned, where, np.ones(where.shape))
