"""Range rules against NumPy, padding included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import quantize as oracle

from quantlab import core
from quantlab.core import presets, scales

K, N = 22, 5


def weights(seed=0, k=K):
  w = np.random.default_rng(seed).standard_t(3, size=(k, N))
  return w.astype(np.float32)


def groups(w, size):
  return [w[i : i + size] for i in range(0, len(w), size)]


@pytest.mark.parametrize('group', [11, 8])
def test_absmean_and_absmedian_skip_padding(group):
  """22 = 2 groups of 11, or 8 + 8 + 6."""
  w, ragged = weights(), K % group != 0
  for rule, f in ((scales.absmean(), np.mean), (scales.absmedian(), np.median)):
    q = presets.ternary(group=group, ragged=ragged, scale=rule)
    want = [f(np.abs(g), axis=0) for g in groups(w, group)]
    np.testing.assert_allclose(core.fit(w, q).scale, want, rtol=1e-6)


def test_the_median_of_a_sparse_unit_is_not_its_scale():
  """Mostly zeros have the median zero; a tenth of the mean stands in."""
  w = weights(2)
  w[np.arange(K) % 4 != 0] = 0
  got = core.fit(w, presets.ternary(scale=scales.absmedian())).scale
  np.testing.assert_allclose(got[0], 0.1 * np.abs(w).mean(0), rtol=1e-5)


def test_bitnet_ternary():
  """clip(round(w / mean|w|), -1, 1) mean|w|, arXiv 2402.17764 equations 1-3."""
  w = weights(1)
  gamma = np.abs(w).mean()
  want = np.clip(np.round(w / gamma), -1, 1) * gamma
  got = core.fake_quantize(w, presets.ternary(per='tensor'))
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_binary_is_sign_times_mean():
  w = weights(2)
  want = np.sign(w) * np.abs(w).mean(0)
  got = core.fake_quantize(w, presets.binary())
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize('p', [90.0, 99.0, 100.0])
def test_percentile(p):
  w = weights(3)
  q = presets.int8(scale=scales.percentile(p=p))
  want = np.percentile(np.abs(w), p, axis=0) / 127
  np.testing.assert_allclose(core.fit(w, q).scale[0], want, rtol=1e-5)
  q = presets.int8(scale=scales.percentile(p=p), symmetric=False)
  lo, hi = np.percentile(w, 100 - p, axis=0), np.percentile(w, p, axis=0)
  np.testing.assert_allclose(
    core.fit(w, q).scale[0], (hi - lo) / 255, rtol=1e-4
  )


def test_percentile_skips_padding():
  w = weights(4)
  q = presets.int8(scale=scales.percentile(p=80.0), group=8, ragged=True)
  want = [np.percentile(np.abs(g), 80, axis=0) / 127 for g in groups(w, 8)]
  np.testing.assert_allclose(core.fit(w, q).scale, want, rtol=1e-5)


def test_ragged_group_equals_the_group_alone():
  """What padding would change: every rule, on the last short group."""
  w = weights(5)
  for q in (
    presets.int4(group=8, ragged=True, symmetric=False),
    presets.int4(
      group=8,
      ragged=True,
      symmetric=False,
      scale=scales.mse(candidates=20, p=2.4),
    ),
    presets.binary(group=8, ragged=True, scale=scales.mse(candidates=20)),
    presets.ternary(group=8, ragged=True, scale=scales.absmedian()),
  ):
    alone = core.fit(w[16:], q)
    among = core.fit(w, q)
    np.testing.assert_allclose(among.scale[-1:], alone.scale, rtol=1e-6)
    tail = core.fake_quantize(w, q)[16:]
    np.testing.assert_allclose(tail, core.fake_quantize(w[16:], q), rtol=1e-6)


def test_padding_count():
  """K = 172 in groups of 32: six groups, the last of 12 (ptq.md, 13.8)."""
  w = weights(6, k=172)
  q = presets.int4(group=32, ragged=True)
  params = core.fit(w, q)
  assert params.scale.shape == (6, N)
  want = oracle.fit(w, 'int4', group=32)[0]
  np.testing.assert_array_equal(params.scale, want)


def test_group_longer_than_the_axis():
  w = weights(7)
  whole = core.fake_quantize(w, presets.int4())
  q = presets.int4(group=128, ragged=True)
  np.testing.assert_array_equal(core.fake_quantize(w, q), whole)
  with pytest.raises(ValueError, match=r'does not divide'):
    core.fake_quantize(w, presets.int4(group=128))


def _loss(w, fake, p):
  return np.sum(np.abs(np.asarray(fake, np.float64) - w) ** p, axis=0)


@pytest.mark.parametrize('p', [2.0, 2.4])
@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    ('int3', {}),
    ('int3', {'symmetric': False}),
    ('uint3', {'symmetric': False}),
    ('fp4_e2m1', {}),
    ('nf4', {}),
    ('pow2_4', {}),
    ('ternary', {}),
    ('binary', {}),
    ('int4', {'scale_format': 'pow2', 'exponent': 'floor'}),
    ('fp4_e2m1', {'scale_format': 'e4m3'}),
  ],
)
def test_mse_is_the_best_of_its_candidates(name, fields, p):
  """Exhaustive search in NumPy over the same ratios."""
  w, rule = weights(8), scales.mse(candidates=16, p=p)
  q = core.Quantizer(name, scale=rule, **fields)
  got = core.fake_quantize(w, q)
  losses = []
  for r in rule.ratios():
    ratio = np.full((1, N), r, np.float32)
    s, z, g = oracle.fit(w, name, ratio=ratio, **fields)
    codes = oracle.codes_of(w, name, s, z, g)
    losses.append(_loss(w, oracle.values_of(codes, name, s, z, g), p))
  np.testing.assert_allclose(_loss(w, got, p), np.min(losses, 0), rtol=1e-5)
  assert (np.min(losses, 0) < losses[0]).any()  # the search has work to do


@pytest.mark.parametrize(
  'fields',
  [
    {'per': 'channel'},
    {'per': 'tensor'},
    {'group': 8, 'ragged': True},
    {'block': (8, 2), 'ragged': True},
  ],
  ids=str,
)
@pytest.mark.parametrize('name', ['int2', 'fp4_e2m1'])
def test_mse_is_never_worse_than_the_full_range(name, fields):
  w = weights(9)
  full = core.fake_quantize(w, core.Quantizer(name, **fields))
  best = core.fake_quantize(
    w, core.Quantizer(name, scale=scales.mse(), **fields)
  )
  assert _loss(w, best, 2).sum() < _loss(w, full, 2).sum()


def test_mse_above_one_helps_fp4():
  """A maximum mapped to 4 instead of 6 (ptq.md F4)."""
  w = np.float32([[1.0, 0.75, 0.5, 0.25]]).T
  plain = core.fake_quantize(w, presets.fp4_e2m1())
  wide = presets.fp4_e2m1(scale=scales.mse(candidates=131, high=1.5))
  assert 1.0 in wide.scale.ratios()
  assert np.abs(plain - w).max() > 0.04
  np.testing.assert_allclose(core.fake_quantize(w, wide), w, atol=1e-6)


def test_mse_holds_one_candidate_at_a_time():
  """The search is a scan, not `candidates` copies of the array."""
  q = presets.int4(scale=scales.mse(candidates=64))
  shape = jax.ShapeDtypeStruct((256, 128), jnp.float32)
  compiled = jax.jit(lambda w: core.fit(w, q)).lower(shape).compile()
  bytes_of_one = 256 * 128 * 4
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < 8 * bytes_of_one


@pytest.mark.parametrize(
  'make',
  [
    lambda: scales.percentile(p=40.0),
    lambda: scales.percentile(p=101.0),
    lambda: scales.percentile(p='99'),
    lambda: scales.mse(0),
    lambda: scales.mse(1.5),
    lambda: scales.mse(p='2'),
    lambda: scales.mse(p=float('nan')),
    lambda: scales.mse(10, p=0.0),
    lambda: scales.mse(10, low=1.0),
    lambda: scales.mse(10, high=0.9),
  ],
)
def test_rules_refuse_nonsense(make):
  with pytest.raises(ValueError, match=r'takes .*found'):
    make()


def test_rules_are_values():
  rules = [scales.absmax(), scales.minmax(), scales.mse(100, p=2.4)]
  assert len({*rules, scales.mse(100, p=2.4)}) == 3
  for r in rules:
    assert scales.from_json(r.to_json()) == r
  assert repr(rules[-1]) == 'mse(candidates=100, p=2.4)'
