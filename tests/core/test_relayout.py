"""Layout operations on a QTensor: exact, by metadata, or refused with why."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from quantlab import core
from quantlab.core import Layout, LayoutError, presets


def quantized(shape, k_axes, loop_axes=(), q=None, seed=0):
  w = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
  layout = Layout.of(shape, k_axes, loop_axes)
  return core.quantize(w, q or presets.int4(), layout)


def commutes(t, f, g):
  """f on the QTensor then dequantize == dequantize then g, bit for bit."""
  moved = f(t)
  want = np.asarray(g(np.asarray(t.dequantize())))
  np.testing.assert_array_equal(moved.dequantize(), want)
  assert moved.shape == want.shape
  assert moved.size == want.size
  return moved


def test_transpose_is_metadata():
  t = quantized((12, 4, 5), (0,))
  a = commutes(t, lambda t: t.T, lambda w: w.T)
  assert a.codes is t.codes
  assert a.layout.perm == (-1, -2, -3)
  with pytest.raises(ValueError, match='does not permute'):
    t.transpose((0, 0, 1))


def test_reshape_splits_and_merges_within_a_part():
  t = quantized((12, 20), (0,))
  r = commutes(
    t, lambda t: t.reshape((3, 4, 20)), lambda w: w.reshape(3, 4, 20)
  )
  assert r.layout.k_shape == (3, 4)
  r = commutes(r, lambda t: t.reshape((3, 4, 5, 4)),
               lambda w: w.reshape(3, 4, 5, 4))  # fmt: skip
  assert r.layout.n_shape == (-1, 4)
  r = commutes(r, lambda t: t.transpose((2, 0, 1, 3)),
               lambda w: w.transpose(2, 0, 1, 3))  # fmt: skip
  r = commutes(r, lambda t: t.reshape((5, 12, -1)),
               lambda w: w.reshape(5, 12, -1))  # fmt: skip
  assert r.shape == (5, 12, 4)
  r = commutes(r, lambda t: t.transpose((1, 0, 2)).reshape((12, 20)),
               lambda w: w.transpose(1, 0, 2).reshape(12, 20))  # fmt: skip
  assert r.layout == t.layout


@pytest.mark.parametrize(
  ('shape', 'k_axes', 'loops', 'new', 'why'),
  [
    ((4, 6), (0,), (), (24,), 'mixes contraction and output axes'),
    ((4, 6), (0,), (), (8, 3), 'mixes contraction and output axes'),
    ((2, 4, 6), (1,), (0,), (8, 6), 'mixes contraction and loop axes'),
    ((4, 4, 6), (1,), (0,), (2, 2, 4, 6), 'mixes loop axes'),
    ((4, 6, 1), (0,), (2,), (4, 6), 'would drop a loop axis'),
    ((1, 4, 6), (1,), (0,), (4, 6), 'mixes contraction and loop axes'),
    ((2, 3, 4), (1, 0), (), (6, 4), 'stored in another order'),
  ],
)
def test_reshape_says_why_not(shape, k_axes, loops, new, why):
  with pytest.raises(LayoutError, match=why):
    quantized(shape, k_axes, loops).reshape(new)
  with pytest.raises(ValueError, match='cannot reshape'):
    quantized(shape, k_axes, loops).reshape((5, 7))


def test_squeeze_and_expand_dims():
  t = quantized((4, 1, 6), (0, 1))
  s = commutes(t, lambda t: t.squeeze((1,)), lambda w: w.squeeze(1))
  assert s.layout.k_shape == (4,)
  for axes in ((0,), (1,), (2,), (-1,), (0, 2), (0, 1, 4)):
    commutes(s, lambda t, a=axes: t.expand_dims(a),
             lambda w, a=axes: np.expand_dims(w, a))  # fmt: skip
  loop = quantized((3, 4, 6), (1,), (0,))
  e = commutes(loop, lambda t: t.expand_dims((0,)), lambda w: w[None])
  commutes(e, lambda t: t.squeeze((0,)), lambda w: w[0])
  with pytest.raises(ValueError, match='cannot squeeze'):
    loop.squeeze((1,))
  with pytest.raises(LayoutError, match='is a loop axis'):
    quantized((1, 4, 6), (1,), (0,)).squeeze((0,))


SPLITTABLE = [
  presets.int4(group=4, symmetric=False),
  presets.int8(per='tensor'),
  presets.codebook(bits=2),
  presets.mxfp4(group=4),
  presets.nvfp4(group=4),
  presets.int4(block=(4, 2)),
]


@pytest.mark.parametrize('q', SPLITTABLE, ids=repr)
def test_slice(q):
  t = quantized((3, 8, 6, 2), (1,), (0,), q)
  for starts, limits in (
    ((1, 0, 0, 0), (3, 8, 6, 2)),
    ((0, 0, 1, 0), (3, 8, 4, 2)),
    ((2, 0, 5, 0), (3, 8, 6, 2)),
    ((0, 0, 0, 0), (3, 8, 6, 2)),
  ):
    box = tuple(slice(a, b) for a, b in zip(starts, limits, strict=True))
    commutes(t, lambda t, a=starts, b=limits: t.slice(a, b),
             lambda w, box=box: w[box])  # fmt: skip
  commutes(t, lambda t: t.slice_in_loop(1, 2), lambda w: w[1:2])
  turned = t.transpose((2, 3, 1, 0))
  commutes(turned, lambda t: t.slice((2, 0, 0, 1), (4, 2, 8, 2)),
           lambda w: w[2:4, :, :, 1:2])  # fmt: skip


def test_slice_says_why_not():
  t = quantized((8, 6, 2), (0,))
  with pytest.raises(LayoutError, match=r'axis 0 of .* is a contraction axis'):
    t.slice((0, 0, 0), (4, 6, 2))
  with pytest.raises(LayoutError, match='an inner output axis'):
    t.slice((0, 0, 0), (8, 6, 1))
  with pytest.raises(LayoutError, match='no loop axis'):
    t.slice_in_loop(0, 1)
  with pytest.raises(ValueError, match='is no box of'):
    t.slice((0, 0, 0), (8, 7, 2))
  blocks = quantized((8, 6), (0,), q=presets.int4(block=(4, 3)))
  with pytest.raises(LayoutError, match='cut through blocks of 3 columns'):
    blocks.slice((0, 1), (8, 6))


@pytest.mark.parametrize('q', [
  presets.int4(group=4, symmetric=False), presets.codebook(bits=2),
  presets.mxfp4(group=4), presets.int4(block=(4, 2)),
], ids=repr)  # fmt: skip
def test_concatenate_along_the_output(q):
  a = quantized((8, 6, 2), (0,), q=q)
  b = quantized((8, 4, 2), (0,), q=q, seed=1)
  both = core.concatenate([a, b], 1)
  want = np.concatenate([a.dequantize(), b.dequantize()], 1)
  np.testing.assert_array_equal(both.dequantize(), want)
  assert both.nbytes == a.nbytes + b.nbytes
  turned = core.concatenate([a.T, b.T], -2)
  np.testing.assert_array_equal(turned.dequantize(), want.T)


def test_concatenate_along_a_loop():
  for q in (SPLITTABLE[0], SPLITTABLE[1], SPLITTABLE[4]):
    a = quantized((2, 8, 6), (1,), (0,), q)
    b = quantized((1, 8, 6), (1,), (0,), q, seed=1)
    both = core.concatenate([a, b], 0)
    want = np.concatenate([a.dequantize(), b.dequantize()], 0)
    np.testing.assert_array_equal(both.dequantize(), want)


@pytest.mark.parametrize(
  ('make', 'axis', 'why'),
  [
    (lambda: [quantized((8, 6), (0,))] * 2, 0, 'first output axis'),
    (lambda: [quantized((8, 6, 2), (0,))] * 2, 2, 'first output axis'),
    (
      lambda: [
        quantized((8, 6), (0,)),
        quantized((8, 6), (0,), q=presets.int8()),
      ],
      1,
      'different quantizer',
    ),
    (
      lambda: [quantized((8, 6), (0,)), quantized((4, 6), (0,))],
      1,
      'different k: 8 and 4',
    ),
    (
      lambda: [
        quantized((8, 6), (0,)),
        quantized((8, 6), (0,)).astype(jnp.bfloat16),
      ],
      1,
      'different dtype',
    ),
    (
      lambda: [quantized((8, 6), (0,), q=presets.int8(per='tensor'))] * 2,
      1,
      'one scale for all columns',
    ),
    (
      lambda: [quantized((8, 6), (0,), q=presets.nvfp4(group=4))] * 2,
      1,
      'one scale for all columns',
    ),
    (
      lambda: [
        quantized((8, 5), (0,), q=presets.int4(block=(4, 2), ragged=True))
      ] * 2,
      1,
      'do not divide',
    ),
  ],
)  # fmt: skip
def test_concatenate_says_why_not(make, axis, why):
  with pytest.raises(LayoutError, match=why):
    core.concatenate(make(), axis)


def test_prepacked_tensors_refuse_what_needs_the_canonical_layout():
  t = quantized((16, 6), (0,))
  other = dataclasses.replace(t, codes=t.codes.T, tag='panels', n=6)
  assert other.shape == t.shape
  assert other.T.shape == (6, 16)
  assert other.nbytes == t.nbytes
  for f in (
    lambda: other.dequantize(),
    lambda: other.unpack(),
    lambda: other.slice((0, 0), (16, 3)),
    lambda: core.concatenate([other, other], 1),
  ):
    with pytest.raises(LayoutError, match="arranged as 'panels'"):
      f()
