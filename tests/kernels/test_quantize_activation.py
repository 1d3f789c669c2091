"""quantize_activation: every code, scale and zero point against NumPy."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import matmul as oracle

import quantlab_kernels as qk
from quantlab import core
from quantlab.core import presets
from quantlab_kernels.quantize_activation import reference

AXES = {'token': (-1,), 'tensor': (-2, -1)}
CASES = [
  (8, True, False),
  (8, True, True),
  (8, False, False),
  (4, True, False),
  (4, False, False),
  (2, True, True),
]


def _same(got, want):
  q, s, z = want
  np.testing.assert_array_equal(got[0], q)
  np.testing.assert_array_equal(got[1], s)
  if got[2] is not None:
    np.testing.assert_array_equal(got[2], z)


@pytest.mark.parametrize('per', sorted(AXES))
@pytest.mark.parametrize('transform', ['eager', 'jit', 'vmap'])
def test_equals_numpy_bit_for_bit(per, transform):
  x = np.random.default_rng(0).normal(0.3, 1, (2, 33, 48)).astype(np.float32)
  x[0, 3] = 0
  x[1, 4] = np.abs(x[1, 4])
  cases = [
    {'bits': bits, 'symmetric': symmetric, 'narrow': narrow}
    for bits, symmetric, narrow in CASES[: 1 if transform == 'eager' else None]
  ]

  def f(x):
    return [qk.quantize_activation(x, per=per, **kw) for kw in cases]

  wrap = {'eager': lambda f: f, 'jit': jax.jit, 'vmap': jax.vmap}[transform]
  run = jax.jit(wrap(f)) if transform == 'vmap' else wrap(f)
  for got, kw in zip(run(x), cases, strict=True):
    assert got[0].dtype == jnp.int8
    assert (got[2] is None) == kw['symmetric']
    _same(got, oracle.quantize(x, axes=AXES[per], **kw))


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  x=hnp.arrays(
    np.float32,
    (3, 8),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
  ),
  symmetric=st.booleans(),
)
def test_any_values(x, symmetric):
  # What lies below the normal range may be flushed to zero by the hardware.
  hypothesis.assume(np.all((x == 0) | (np.abs(x) > 1e-30)))
  f = jax.jit(qk.quantize_activation, static_argnames='symmetric')
  q, s, z = f(x, symmetric=symmetric)
  _same((q, s, z), oracle.quantize(x, symmetric=symmetric))
  z = 0 if z is None else z
  x_hat = (np.float64(q) - np.float64(z)) * np.float64(s)
  # Half a step, and a little for the rounding of x / s and of the scale.
  assert np.all(np.abs(x_hat - x) <= (0.5 + 1e-4) * np.float64(s))


def test_ties_go_to_even():
  s = 0.25
  x = np.float32([[0.5, 1.5, 2.5, -0.5, -1.5, 200, -200]]) * np.float32(s)
  q, _, _ = qk.quantize_activation(x, scale=s)
  np.testing.assert_array_equal(q, [[0, 2, 2, 0, -2, 127, -128]])
  q, _, _ = qk.quantize_activation(x, scale=s, narrow=True)
  np.testing.assert_array_equal(q[0, -2:], [127, -127])


def test_codes_at_ties_are_the_same_in_every_context():
  s = np.random.default_rng(6).uniform(1, 2, (50, 1)).astype(np.float32)
  x = s * (np.arange(-127, 127, dtype=np.float32) + np.float32(0.5))
  want = np.clip(np.rint(x * (np.float32(1) / s)), -128, 127)
  assert np.any(want != np.clip(np.rint(x / s), -128, 127))
  f = lambda x, s: qk.quantize_activation(x, scale=s)[0]  # noqa: E731
  np.testing.assert_array_equal(f(x, s), want)
  np.testing.assert_array_equal(jax.jit(f)(x, s), want)
  np.testing.assert_array_equal(jax.jit(jax.vmap(f))(x, s), want)


@pytest.mark.parametrize('symmetric', [True, False])
def test_zeros_stay_zero(symmetric):
  x = np.zeros((2, 5), np.float32)
  q, s, z = qk.quantize_activation(x, symmetric=symmetric)
  np.testing.assert_array_equal(s, np.full((2, 1), 2.0**-126))
  np.testing.assert_array_equal(q, np.full((2, 5), 0 if symmetric else z[0]))


def test_static_scales_are_used_as_given():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2, 3, 4)).astype(np.float32)
  s, z = np.float32(0.0123), 7
  q, got_s, got_z = qk.quantize_activation(
    x, scale=s, zero_point=z, symmetric=False, per='tensor'
  )
  want = np.clip(np.rint(x * (np.float32(1) / s)) + z, -128, 127)
  np.testing.assert_array_equal(q, want)
  np.testing.assert_array_equal(got_s, np.full((2, 1, 1), s))
  np.testing.assert_array_equal(got_z, np.full((2, 1, 1), 7))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('static', [True, False])
def test_what_is_not_finite_marks_its_row_only(bad, symmetric, static):
  x = np.random.default_rng(2).normal(size=(3, 40)).astype(np.float32)
  x[1, 17] = bad
  w = np.random.default_rng(3).integers(-128, 128, (40, 4)).astype(np.int8)
  kw = {'scale': 0.1} if static else {}
  if static and not symmetric:
    kw['zero_point'] = 3
  for f in (
    qk.quantize_activation,
    jax.jit(qk.quantize_activation, static_argnames='symmetric'),
  ):
    q, s, z = f(x, symmetric=symmetric, **kw)
    y = np.asarray(qk.int8_matmul(q, w, x_scale=s, x_zero=z))
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('per', ['token', 'tensor'])
def test_nan_among_many_values_is_not_passed_over(symmetric, per):
  """XLA's maximum over a large array drops it on CPUs."""
  x = np.random.default_rng(5).normal(size=(128, 64)).astype(np.float32)
  x[0, 7] = np.nan
  axes = (1,) if per == 'token' else (0, 1)
  defined = jax.jit(functools.partial(
    reference.run, scale=None, zero_point=None, bits=8, axes=axes,
    symmetric=symmetric, narrow=False,
  ))  # fmt: skip
  for _, s, _ in (
    defined(x),
    qk.quantize_activation(x, symmetric=symmetric, per=per),
  ):
    assert not np.isfinite(s.reshape(-1)[0])
    assert np.isfinite(s.reshape(-1)[1:]).all()


def test_half_precision_is_quantized_in_float32():
  x = np.random.default_rng(4).normal(size=(5, 16)).astype(jnp.bfloat16)
  _same(qk.quantize_activation(x), oracle.quantize(x.astype(np.float32)))


def test_empty_arrays_are_valid():
  q, s, _ = qk.quantize_activation(np.zeros((0, 4), np.float32))
  assert q.shape == (0, 4)
  assert s.shape == (0, 1)
  q, s, _ = qk.quantize_activation(np.zeros((3, 0), np.float32))
  np.testing.assert_array_equal(s, np.full((3, 1), 2.0**-126))


def test_errors_say_what_was_expected():
  x = np.ones((3, 4), np.float32)
  with pytest.raises(TypeError, match='takes a floating array'):
    qk.quantize_activation(x.astype(np.int32))
  with pytest.raises(ValueError, match='2 to 8 bits, found bits=9'):
    qk.quantize_activation(x, bits=9)
  with pytest.raises(ValueError, match="'token' or 'tensor', found"):
    qk.quantize_activation(x, per='channel')
  with pytest.raises(ValueError, match='needs its zero_point'):
    qk.quantize_activation(x, scale=1.0, symmetric=False)
  with pytest.raises(ValueError, match='zero_point needs symmetric=False'):
    qk.quantize_activation(x, zero_point=1)
  with pytest.raises(ValueError, match=r'broadcasts to \(3, 1\)'):
    qk.quantize_activation(x, scale=np.ones(4))


@pytest.mark.parametrize('per', sorted(AXES))
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [4, 8])
def test_agrees_with_the_simulated_path(per, symmetric, bits):
  rng = np.random.default_rng(5)
  x = rng.normal(0.2, 1, (40, 30)).astype(np.float32)
  x *= 10.0 ** rng.integers(-6, 6, (40, 1)).astype(np.float32)
  x[3] = 0
  make = getattr(presets, f'int{bits}' if symmetric else f'uint{bits}')
  quantizer = make(per=per, symmetric=symmetric)
  want = core.fit(x, quantizer, axis=-1)
  codes = np.int32(core.encode(x, quantizer, want, axis=-1))
  f = functools.partial(
    qk.quantize_activation, bits=bits, per=per, symmetric=symmetric
  )
  q, s, z = jax.jit(f)(x)
  np.testing.assert_array_equal(s, want.scale)
  if symmetric:
    np.testing.assert_array_equal(q, oracle.signed_value(codes, bits))
  else:  # ours are signed, theirs start from 0
    np.testing.assert_array_equal(q, codes - 2 ** (bits - 1))
    np.testing.assert_array_equal(z, want.zero_point - 2 ** (bits - 1))
