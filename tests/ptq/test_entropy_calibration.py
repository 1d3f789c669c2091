"""Ranges of least divergence, against TensorRT's algorithm in NumPy."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import quantlab as ql
from quantlab.core import quantizer as quantizer_lib

KL = ql.scales.kl()
STATIC = {'per': 'tensor', 'static': True}
BINS = 2048


def product(params, x):
  return x @ params['w']


def scale(q, x):
  """The step of a static input that saw these values, two batches of them."""
  params = {'w': jnp.eye(x.shape[-1])}
  half = len(x) // 2
  model = ql.ptq(product, params, {'': ql.rule(input=q)}, [x[:half], x[half:]])
  return float(model.params['sites']['w']['input']['scale'].squeeze())


def threshold(x, levels, ratios):
  """Entropy calibration of a symmetric range, literally.

  Of |x| one half of a histogram over [-max, max]; the zero bin dropped.
  """
  top = np.float32(np.abs(x).max())
  counts, edges = np.histogram(x, BINS, (-top, top))
  counts = counts.astype(float)
  counts[np.digitize(0, edges) - 1] = 0
  centres = (edges[:-1] + edges[1:]) / 2
  found = []
  for ratio in ratios:
    step = top * ratio / levels
    codes = np.clip(np.round(centres / step), -levels - 1, levels)
    low, high = (-levels - 1) * step, levels * step
    inside = np.flatnonzero((centres >= low) & (centres <= high))
    p = counts[inside].copy()
    p[0] += counts[centres < low].sum()
    p[-1] += counts[centres > high].sum()
    q = np.zeros(len(inside))
    for code in set(codes[inside]):
      at = (codes[inside] == code) & (counts[inside] > 0)
      if at.any():
        q[at] = counts[inside][at].mean()
    p, q = ((1 - 1e-4) * v / counts.sum() + 1e-4 / len(inside) for v in (p, q))
    found.append((p * np.log(p / q)).sum())
  return top * ratios[int(np.argmin(found))] / levels


@pytest.mark.parametrize('bits', [4, 8])
def test_the_range_is_that_of_the_algorithm(bits):
  rng = np.random.default_rng(bits)
  half = rng.laplace(size=(3000, 4))
  x = np.concatenate([half, -half]).astype(np.float32)  # as wide on both sides
  q = getattr(ql, f'int{bits}')(**STATIC, scale=ql.scales.kl(64))
  ratios = np.linspace(1, 2**bits / BINS, 64)
  want = threshold(x, 2 ** (bits - 1) - 1, ratios)
  # Values on the edge of a bin may fall to either side: by a candidate.
  near = (ratios[0] - ratios[1]) * np.abs(x).max() / (2 ** (bits - 1) - 1)
  assert scale(q, x) == pytest.approx(want, abs=1.5 * near)
  if bits == 4:
    assert want < 0.8 * np.abs(x).max() / 7


def test_tails_are_cut_less_the_more_bits_there_are_and_flat_ones_never():
  rng = np.random.default_rng(0)
  tails = rng.laplace(size=(8000, 4)).astype(np.float32)
  flat = rng.uniform(-1, 1, (8000, 4)).astype(np.float32)
  formats = [ql.int3, ql.int4, ql.int8]

  def share(x, q):
    return scale(q(**STATIC, scale=KL), x) / scale(q(**STATIC), x)

  kept = [share(tails, q) for q in formats]
  assert kept == sorted(kept)
  assert kept[0] < 0.5
  assert kept[-1] < 0.97
  for q in formats:
    assert share(flat, q) > 0.97


def test_at_few_bits_it_beats_the_whole_range():
  """Products of activations with tails: less error than by their maximum."""
  for seed in range(3):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, (4000, 32)).astype(np.float32)
    params = {'w': jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)}

    def error(rule, x=x, params=params):
      q = ql.int4(**STATIC, **({'scale': rule} if rule else {}))
      model = ql.ptq(product, params, {'': ql.rule(input=q)}, [x])
      off = model.apply(model.params, x) - product(params, x)
      return float(jnp.square(off).mean())

    assert error(KL) < 0.5 * error(None)


@pytest.mark.parametrize('symmetric', [True, False])
def test_what_lies_away_from_zero_is_kept(symmetric):
  """Where a small range holds nothing, nothing diverges in it."""
  rng = np.random.default_rng(3)
  for x in (
    1 + np.tanh(0.3 * rng.normal(size=(2000, 4))) / 2,
    5 + np.abs(rng.normal(size=(2000, 4))),
    -3 - rng.random((2000, 4)),
    np.full((20, 4), 3.0),
    np.zeros((20, 4)),
  ):
    x = x.astype(np.float32)
    q = ql.int8(**STATIC, scale=KL, symmetric=symmetric)
    whole = ql.int8(**STATIC, symmetric=symmetric)
    assert scale(q, x) > 0.8 * scale(whole, x)


def test_one_candidate_is_the_whole_range():
  x = np.random.default_rng(0).laplace(size=(500, 4)).astype(np.float32)
  q = ql.int4(**STATIC, scale=ql.scales.kl(1))
  assert scale(q, x) == scale(ql.int4(**STATIC), x)


def test_it_is_of_static_activations_alone():
  for fields in ({}, {'per': 'tensor'}, {'group': 4}):
    with pytest.raises(ValueError, match=r'kl\(\) compares .* static=True'):
      ql.int8(scale=KL, **fields)
  with pytest.raises(ValueError, match='kl takes an integer'):
    ql.scales.kl(0)
  with pytest.raises(ValueError, match='kl takes an integer'):
    ql.scales.kl(True)
  q = ql.int8(**STATIC, scale=ql.scales.kl(7), symmetric=False)
  assert repr(q.scale) == 'kl(candidates=7)'
  again = quantizer_lib.Quantizer.from_json(json.loads(json.dumps(q.to_json())))
  assert again == q


def test_it_goes_with_methods_that_simulate_samples():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(64, 8)).astype(np.float32)
  params = {'w': jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)}
  recipe = {'': ql.rule(weight=ql.int4(), input=ql.int8(**STATIC, scale=KL))}
  model = ql.ptq(product, params, recipe, [x], ql.gptq())
  off = model.apply(model.params, x) - product(params, x)
  assert float(jnp.square(off).mean()) < 0.2
