"""The second-order engine against a float64 oracle and its own laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import second_order as oracle

import quantlab as ql
from quantlab import core
from quantlab.ptq.second_order import inverse_factor, second_order

K, N = 96, 8
QUANTIZERS = [
  ql.int4(),
  ql.int3(group=32),
  ql.int4(group=32, symmetric=False),
  ql.int4(group=40, ragged=True),
  ql.int4(per='tensor'),
  ql.int4(block=(32, 4)),
  ql.nf4(group=32),
  ql.codebook(bits=3),
  ql.mxfp4(),
  ql.nvfp4(),
  ql.fp8_e4m3(),
  ql.ternary(),
]


def problem(seed, k=K, n=N, rows=400):
  r = np.random.default_rng(seed)
  mix = 0.3 * r.normal(size=(k, k)) + np.diag(r.uniform(0.3, 3, k))
  x = (r.normal(size=(rows, k)) @ mix).astype(np.float32)
  w = r.normal(size=(k, n)).astype(np.float32)
  return x, w, x.T @ x / rows


def error(x, w, rounded):
  return float(np.sum((x @ (np.asarray(rounded) - w)) ** 2))


@pytest.mark.parametrize('q', QUANTIZERS, ids=repr)
def test_stays_on_the_grid_and_beats_rounding(q):
  x, w, h = problem(0)
  out = second_order(w, h, q)
  again = core.fake_quantize(out.weight, q, out.qparams, axis=-2)
  np.testing.assert_array_equal(out.weight, again)
  nearest = core.fake_quantize(w, q, axis=-2)
  assert error(x, w, out.weight) < 0.8 * error(x, w, nearest)


@pytest.mark.parametrize('act_order', [False, True])
def test_equals_the_oracle(act_order):
  _, w, h = problem(1)
  scale = np.abs(w).max(0) / 7
  order = np.argsort(-np.diag(h), kind='stable') if act_order else None

  def round_row(row, _):
    return np.clip(np.round(row / scale), -8, 7) * scale

  want = oracle.compensate(w, h, round_row, order=order)
  got = second_order(w, h, ql.int4(), act_order=act_order).weight
  # A value within float32 noise of a tie may fall on either side of it, and
  # what follows it then differs.
  assert np.mean(np.abs(np.asarray(got) - want) > 1e-4) < 0.02


def test_diagonal_hessian_is_rounding_to_nearest():
  _, w, _ = problem(2)
  q = ql.int4(group=32)
  h = np.diag(np.random.default_rng(2).uniform(0.1, 9, K)).astype(np.float32)
  nearest = core.fake_quantize(w, q, axis=-2)
  np.testing.assert_array_equal(second_order(w, h, q).weight, nearest)


def test_loops_are_independent():
  problems = [problem(s) for s in (3, 4)]
  w = np.stack([p[1] for p in problems])
  h = np.stack([p[2] for p in problems])
  q = ql.int3(group=32)
  both = second_order(w, h, q)
  for i in range(2):
    np.testing.assert_allclose(
      both.weight[i], second_order(w[i], h[i], q).weight, atol=2e-5
    )


def test_hessian_scale_changes_nothing():
  _, w, h = problem(5)
  a = second_order(w, h, ql.int4()).weight
  b = second_order(w, 1024 * h, ql.int4()).weight
  np.testing.assert_array_equal(a, b)


def test_inputs_in_another_order_give_the_same_with_act_order():
  _, w, h = problem(6)
  p = np.random.default_rng(0).permutation(K)
  q = ql.int4()
  a = second_order(w, h, q, act_order=True).weight
  b = second_order(w[p], h[np.ix_(p, p)], q, act_order=True).weight
  assert np.mean(np.abs(np.asarray(a)[p] - np.asarray(b)) > 1e-4) < 0.02


def test_dead_input_is_only_rounded():
  _, w, h = problem(7)
  h[5] = h[:, 5] = 0
  out = second_order(w, h, ql.int4())
  want = core.fake_quantize(w, ql.int4(), axis=-2)[5]
  np.testing.assert_array_equal(out.weight[5], want)


def test_damping_grows_until_the_hessian_factors():
  x, w, _ = problem(8, rows=12)  # rank 12 of 96
  h = x.T @ x / len(x)
  out = second_order(w, h, ql.int4(), damp=1e-12)
  assert float(out.damp) > 1e-12
  assert np.isfinite(np.asarray(out.weight)).all()
  h[0, 0] = np.nan
  hopeless = second_order(w, h, ql.int4())
  assert np.isnan(float(hopeless.damp))


def test_inverse_factor():
  _, _, h = problem(9)
  upper, damp = inverse_factor(jnp.asarray(h), 0.01)
  u = np.asarray(upper, np.float64)
  damped = h + float(damp) * np.mean(np.diag(h)) * np.eye(K)
  np.testing.assert_allclose(u.T @ u @ damped, np.eye(K), atol=2e-3)
  np.testing.assert_array_equal(u, np.triu(u))


# Of 200 rows the last block holds padding, and the last group is short.
@pytest.mark.parametrize('k', [96, 160, 200])
def test_scales_found_on_the_way(k):
  x, w, h = problem(10, k=k)
  q = ql.int3(group=32, ragged=True)
  out = second_order(w, h, q, static_groups=False)
  again = core.fake_quantize(out.weight, q, out.qparams, axis=-2)
  np.testing.assert_array_equal(out.weight, again)
  first = core.fit(w, q, axis=-2).scale
  np.testing.assert_array_equal(out.qparams.scale[0], first[0])
  assert np.any(np.asarray(out.qparams.scale[1:]) != np.asarray(first[1:]))
  nearest = core.fake_quantize(w, q, axis=-2)
  assert error(x, w, out.weight) < 0.8 * error(x, w, nearest)


def test_columns_are_not_unrolled():
  sizes = [
    len(
      jax.make_jaxpr(lambda w, h: second_order(w, h, ql.int4()).weight)(
        jax.ShapeDtypeStruct((k, 8), jnp.float32),
        jax.ShapeDtypeStruct((k, k), jnp.float32),
      ).jaxpr.eqns
    )
    for k in (128, 1024)
  ]
  assert sizes[0] == sizes[1]


def test_refused_combinations():
  _, w, h = problem(11)
  with pytest.raises(ValueError, match='needs static_groups=True'):
    second_order(w, h, ql.int4(group=32), act_order=True, static_groups=False)
  with pytest.raises(ValueError, match='needs group= or per='):
    second_order(w, h, ql.int4(block=(32, 4)), static_groups=False)
