"""Methods on the trained test bed with injected outliers (recipes, section 0).

The model is a fixture (`experiments.testbed`). The injections leave its
function as it was; what plain rounding loses by them, the methods win back.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graph import programs
from ptq import equivalents

import quantlab as ql
from quantlab.models.transformer import Transformer

MODEL = Transformer(vocab=96, dim=64, heads=4, blocks=3, context=96)
FILE = pathlib.Path(__file__).parents[1] / 'data' / 'text_model.npz'

STATIC = ql.rule(
  weight=ql.int8(),
  input=ql.int8(per='tensor', static=True, symmetric=False),
)
W4A4 = ql.rule(
  weight=ql.int4(symmetric=False), input=ql.int4(per='token', symmetric=False)
)


@functools.cache
def bed():
  """Parameters, calibration batches and held-out tokens."""
  found = dict(np.load(FILE))
  calibration = found.pop('calibration')[:16].astype(np.int32)
  held_out = found.pop('evaluation').astype(np.int32)
  shapes = jax.eval_shape(
    MODEL.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
  )
  flat = {k: jnp.asarray(v, jnp.float32) for k, v in found.items()}
  return programs.unflat(shapes, flat), [calibration[:, :-1]], held_out


@functools.cache
def _loss(apply):
  @jax.jit
  def loss(params, tokens):
    logits = apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    ).mean()

  return loss


def nats(params, apply=MODEL.apply):
  return float(_loss(apply)(params, bed()[2]))


def injected(seed):
  params = equivalents.outlier_channels(bed()[0], seed, channels=4)
  return equivalents.one_sided(params, seed, channels=4)


def after(params, rule, transform, seed=0):
  model = ql.ptq(
    MODEL.apply,
    params,
    {'block_.*/kernel$': rule},
    bed()[1],
    transform,
    key=jax.random.key(seed),
  )
  return nats(model.params, model.apply)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_injections_change_nothing(seed):
  assert nats(injected(seed)) == pytest.approx(nats(bed()[0]), abs=2e-5)


@pytest.mark.parametrize('seed', [0])  # the margin is that of two
def test_static_w8a8_survives_outliers(seed):
  """Recipes B2 and B3: near float where a plain range fails."""
  params, floor = injected(seed), nats(bed()[0])
  plain = after(params, STATIC, ql.rtn()) - floor
  smooth = after(params, STATIC, ql.smooth()) - floor
  suppressed = after(params, STATIC, ql.outlier_suppression(grid=10)) - floor
  assert plain > 0.02
  assert smooth < plain / 4
  assert suppressed < plain / 4


@pytest.mark.parametrize('seed', [0])  # the margin is that of two
def test_w4a4_survives_outliers_by_rotation(seed):
  """Recipes B7: near float where rounding fails."""
  params = equivalents.outlier_channels(bed()[0], seed, channels=4)
  floor = nats(bed()[0])
  plain = after(params, W4A4, ql.rtn()) - floor
  rotated = after(params, W4A4, ql.rotate(), seed) - floor
  assert plain > 0.5
  assert rotated < plain / 4


def test_norm_tweak_helps():
  """Recipes D6: one gentle pass, with gradients through quantized inputs."""
  params = bed()[0]
  rule = ql.rule(weight=ql.int3(), input=ql.int8(per='token'))
  plain = after(params, rule, ql.rtn())
  assert after(params, rule, ql.chain(ql.rtn(), ql.norm_tweak(1e-3))) < plain


def test_rotate_smooth_gptq_norm_tweak():
  params = equivalents.outlier_channels(bed()[0], 0, channels=4)
  chain = ql.chain(ql.rotate(), ql.smooth(), ql.gptq(), ql.norm_tweak(1e-3))
  assert after(params, W4A4, chain) < after(params, W4A4, ql.rtn())
