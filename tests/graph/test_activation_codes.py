"""Rows quantized by the kernels are those of `core`, bit for bit."""

import jax
import numpy as np
import pytest

import quantlab as ql
from quantlab import core
from quantlab.ops import activation

pytestmark = pytest.mark.as_for_users


@pytest.mark.parametrize(
  'q',
  [
    ql.int8(per='token'),
    ql.int8(per='token', symmetric=False),
    ql.int4(per='token', narrow=True),
    ql.int4(per='token', symmetric=False),
    ql.int2(per='token'),
    ql.int8(per='token', scale=ql.scales.percentile(99.0)),
    ql.int8(per='token', scale_format='pow2'),
    ql.int8(per='tensor'),
    ql.int8(group=8),
  ],
  ids=repr,
)
def test_rows(q):
  r = np.random.default_rng(0)
  x = (
    r.normal(size=(3, 40, 32)) * np.exp(3 * r.normal(size=(3, 40, 1)))
  ).astype(np.float32)
  x[0, 3], x[1, 4] = 0, np.abs(x[1, 4])
  rows = jax.jit(lambda x: activation.to_integers(x, x, q))(x)
  source = x.reshape(1, -1) if q.per == 'tensor' else x
  want = core.fit(source, q, axis=-1)
  codes = core.encode(x, q, want, axis=-1)
  np.testing.assert_array_equal(rows.codes, q.format.to_int8(codes))
  np.testing.assert_array_equal(
    np.broadcast_to(rows.scale, want.scale.shape), want.scale
  )
  assert (rows.zero is None) == (want.zero_point is None)
  if rows.zero is not None:
    np.testing.assert_array_equal(rows.zero, want.zero_point)
