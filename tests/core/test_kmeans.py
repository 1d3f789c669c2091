"""One-dimensional k-means."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantlab import core
from quantlab.core import presets
from quantlab.core.kmeans import assign, kmeans


def objective(x, c, weight=None):
  d = (x[..., None] - np.asarray(c)[..., None, :]) ** 2
  weight = 1 if weight is None else weight
  return (d.min(-1) * weight).sum(-1)


def best_split(x, k):
  """The optimum for one row: the best cuts of the sorted numbers."""
  x = np.sort(x)
  best = np.inf
  for cuts in itertools.combinations(range(1, len(x)), k - 1):
    parts = np.split(x, cuts)
    best = min(best, sum(((p - p.mean()) ** 2).sum() for p in parts))
  return best


def test_separated_clusters_are_found():
  rng = np.random.default_rng(0)
  centres = np.sort(rng.uniform(-5, 5, (6, 4)) + np.arange(4) * 20, axis=-1)
  x = centres[:, rng.integers(0, 4, 300)] + rng.normal(size=(6, 300)) * 0.01
  got = np.sort(kmeans(jnp.asarray(x, jnp.float32), 4), axis=-1)
  np.testing.assert_allclose(got, centres, atol=0.01)


def test_near_the_optimum_on_small_rows():
  x = np.random.default_rng(1).normal(size=(8, 14)).astype(np.float32)
  got = objective(x, kmeans(x, 3, iterations=50))
  best = np.array([best_split(row, 3) for row in x])
  assert (got >= best * (1 - 1e-5)).all()
  assert got.sum() < 1.2 * best.sum()


@pytest.mark.parametrize('weighted', [False, True])
def test_objective_never_rises(weighted):
  rng = np.random.default_rng(2)
  x = rng.standard_t(3, size=(5, 400)).astype(np.float32)
  weight = rng.uniform(0, 1, x.shape).astype(np.float32) if weighted else None
  trail = [
    objective(x, kmeans(x, 8, weight, iterations=i), weight)
    for i in (0, 1, 3, 10)
  ]
  for before, after in itertools.pairwise(trail):
    assert (after <= before * (1 + 1e-5)).all()
  assert (trail[-1] < trail[0]).all()


def test_zero_weight_is_as_if_absent():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(1, 60)).astype(np.float32)
  far = np.concatenate([x, np.full((1, 20), 0.1, np.float32)], axis=1)
  weight = (np.arange(80) < 60).astype(np.float32)[None]
  np.testing.assert_allclose(
    kmeans(far, 4, weight), kmeans(x, 4), rtol=1e-4, atol=1e-5
  )


def test_degenerate_rows():
  x = jnp.array([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 2.0, 2.0]])
  c = np.asarray(kmeans(x, 4))
  assert np.isfinite(c).all()
  assert (np.diff(c, axis=-1) >= 0).all()
  assert ((c[1] >= 1) & (c[1] <= 2)).all()  # empty clusters stay in place
  np.testing.assert_allclose(objective(np.asarray(x), c), 0, atol=1e-12)


def test_assign_is_nearest():
  rng = np.random.default_rng(4)
  c = np.sort(rng.normal(size=(3, 5)), axis=-1).astype(np.float32)
  x = rng.normal(size=(3, 50)).astype(np.float32)
  want = np.abs(x[..., None] - c[:, None]).argmin(-1)
  np.testing.assert_array_equal(assign(x, c), want)


@pytest.mark.parametrize('per', ['channel', 'tensor'])
def test_quantizer_learns_its_table(per):
  w = np.random.default_rng(5).normal(size=(2, 64, 6)).astype(np.float32)
  q = presets.codebook(bits=3, per=per)
  params = core.fit(w, q)
  columns = 6 if per == 'channel' else 1
  assert params.codebook.shape == (2, 8, columns)
  assert np.abs(params.codebook).max() <= 1
  rows = np.swapaxes(w, 1, 2).reshape(2, columns, -1)
  scale = np.abs(rows).max(-1, keepdims=True)
  table = np.asarray(kmeans(rows / scale, 8)) * scale
  fake = np.asarray(core.fake_quantize(w, q))
  got = np.swapaxes(fake, 1, 2).reshape(rows.shape)
  np.testing.assert_allclose(
    ((got - rows) ** 2).sum(-1), objective(rows, table), rtol=1e-4
  )
  int3 = core.fake_quantize(w, presets.int3(per=per))
  assert ((fake - w) ** 2).sum() < 0.7 * ((int3 - w) ** 2).sum()


def test_kmeans_under_vmap_and_jit():
  x = np.random.default_rng(6).normal(size=(2, 3, 40)).astype(np.float32)
  whole = kmeans(x, 4)
  mapped = jax.jit(jax.vmap(lambda r: kmeans(r, 4)))(x)
  np.testing.assert_allclose(whole, mapped, rtol=1e-6)
