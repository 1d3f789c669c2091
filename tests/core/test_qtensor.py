"""QTensor: exact, packed, sliceable, and moved by metadata alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantlab import core
from quantlab.core import Layout, presets, scales

QUANTIZERS = [
  presets.int2(),
  presets.int3(group=8, symmetric=False),
  presets.int4(group=16, ragged=True),
  presets.int4(per='tensor', scale_format='bfloat16'),
  presets.int5(symmetric=False, narrow=False),
  presets.int6(block=(8, 2)),
  presets.int7(scale_format='pow2'),
  presets.int8(),
  presets.uint4(symmetric=False, group=8),
  presets.uint8(symmetric=False),
  presets.int16(symmetric=False),
  presets.dfp16(),
  presets.fp8_e4m3(),
  presets.fp8_e5m2(per='tensor'),
  presets.fp6_e3m2(),
  presets.fp4_e2m1(group=8),
  presets.nf4(group=8),
  presets.pow2(bits=3),
  presets.codebook(bits=3),
  presets.codebook(bits=2, per='tensor'),
  presets.ternary(),
  presets.binary(),
  presets.mxfp4(group=8),
  presets.mxint8(group=8),
  presets.nvfp4(group=8),
]


def weights(shape, seed=0):
  w = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(w, jnp.float32)


def quantized(shape, k_axes, loop_axes=(), q=None, seed=0):
  layout = Layout.of(shape, k_axes, loop_axes)
  return core.quantize(weights(shape, seed), q or presets.int4(), layout)


def stored(q):
  """Whole signed bytes are kept as the integers they are."""
  return jnp.int8 if q.format.name == 'int8' else jnp.uint8


@pytest.mark.parametrize('q', QUANTIZERS, ids=repr)
def test_dequantize_is_fake_quantize(q):
  @jax.jit
  def run(w):
    t = core.quantize(w, q, Layout.of(w.shape, (1,), (0,)))
    codes = core.encode(w, q, t.qparams)
    fake = core.fake_quantize(w, q)
    return t, t.dequantize(), fake, t.unpack(), codes, core.fit(w, q), t.qparams

  w = weights((3, 24, 6))
  t, dequantized, fake, unpacked, codes, fitted, kept = run(w)
  np.testing.assert_array_equal(dequantized, fake)
  np.testing.assert_array_equal(unpacked, codes)
  assert t.shape == w.shape
  assert t.ndim == 3
  assert t.size == w.size
  assert t.codes.dtype == stored(q)
  np.testing.assert_array_equal(np.asarray(t.codes).view(np.uint8), t.packed)
  for a, b in zip(kept, fitted, strict=True):
    assert (a is None) == (b is None)
    if a is not None:
      assert a.dtype == jnp.float32
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('q', QUANTIZERS, ids=repr)
def test_bytes_are_what_the_format_says(q):
  """Counted here from bits, groups and columns."""
  k, n, loops = 24, 6, 3
  layout = Layout.of((loops, k, n), (1,), (0,))
  t = jax.eval_shape(lambda: core.quantize(jnp.zeros((loops, k, n)), q, layout))
  codes = {1: 3, 3: 9, 5: 15, 6: 18, 7: 21}.get(q.bits, k * q.bits // 8) * n
  rows = math.ceil(k / q.group) if q.group else 1
  columns = {'tensor': 1}.get(q.per, n)
  if q.block:
    rows, columns = k // q.block[0], n // q.block[1]
  one = {'float32': 4, 'bfloat16': 2}.get(q.scale_format, 1)
  total = codes + rows * columns * one
  if not q.symmetric:
    total += rows * columns * (2 if q.bits > 8 else 1)
  if q.scale_format == 'e4m3':
    total += 4
  if q.learned:
    total += 4 * 2**q.bits * columns
  assert t.nbytes == loops * total
  assert t.bits_per_weight == 8 * total / (k * n)
  counted = sum(np.zeros(c.shape, c.dtype).nbytes for c in jax.tree.leaves(t))
  assert counted == t.nbytes


def test_scales_are_stored_in_their_format():
  w = weights((32, 4))
  layout = Layout.of(w.shape, (0,))
  for q, dtype in (
    (presets.int4(), jnp.float32),
    (presets.int4(scale_format='bfloat16'), jnp.bfloat16),
    (presets.int4(scale_format='pow2'), jnp.int8),
    (presets.mxfp4(), jnp.uint8),
    (presets.nvfp4(), jnp.float8_e4m3fn),
  ):
    t = core.quantize(w, q, layout)
    assert t.scale.dtype == dtype
    assert t.scale.ndim == 2
  assert t.scale2.shape == (1, 1)
  for q, dtype in (
    (presets.int4(symmetric=False), jnp.int8),
    (presets.uint4(symmetric=False), jnp.uint8),
    (presets.int16(symmetric=False), jnp.int16),
  ):
    assert core.quantize(w, q, layout).zero_point.dtype == dtype


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_logical_dtype(dtype):
  w = weights((16, 4)).astype(dtype)
  t = core.quantize(w, presets.int8(), Layout.of(w.shape, (0,)))
  assert t.dtype == t.dequantize().dtype == dtype
  wide = t.astype(jnp.float32)
  assert wide.dequantize().dtype == jnp.float32
  assert wide.codes is t.codes
  with pytest.raises(TypeError, match='stands for floats'):
    t.astype(jnp.int32)
  with pytest.raises(TypeError, match='real floating-point'):
    core.quantize(jnp.ones((4, 4), jnp.int8), presets.int4(),
                  Layout.of((4, 4), (0,)))  # fmt: skip


def test_conv_kernel_flattens_its_window():
  """H, W, I contracted (OIHW or HWIO alike), O the output."""
  hwio = weights((3, 3, 4, 8))
  q = presets.int4(symmetric=False)
  a = core.quantize(hwio, q, Layout.of(hwio.shape, (0, 1, 2)))
  assert a.k == 36
  assert a.unpack().shape == (36, 8)
  flat = hwio.reshape(36, 8)
  np.testing.assert_array_equal(
    a.dequantize().reshape(36, 8), core.fake_quantize(flat, q)
  )
  oihw = jnp.transpose(hwio, (3, 2, 0, 1))
  b = core.quantize(oihw, q, Layout.of(oihw.shape, (2, 3, 1)))
  np.testing.assert_array_equal(a.codes, b.codes)
  np.testing.assert_array_equal(
    b.dequantize(), jnp.transpose(a.dequantize(), (3, 2, 0, 1))
  )


def test_attention_kernel_has_two_output_axes():
  w = weights((12, 4, 5))
  t = core.quantize(w, presets.int4(), Layout.of(w.shape, (0,)))
  assert t.layout == Layout((12,), (-1, 5), (-3, -2, -1))
  assert t.scale.shape == (1, 20)
  assert t.shape == w.shape


# --- as a pytree ------------------------------------------------------------


def loop_tensor(q=None):
  return quantized((4, 16, 6), (1,), (0,), q or presets.nvfp4())


def test_leaves_have_stable_names():
  t = quantized((2, 16, 6), (1,), (0,), presets.int4(symmetric=False))
  names = [path for path, _ in core.named_leaves({'w': t}, is_leaf=None)]
  assert names == ['w/codes', 'w/scale', 'w/zero_point']
  names = [path for path, _ in core.named_leaves(loop_tensor(), is_leaf=None)]
  assert names == ['codes', 'scale', 'scale2']


@pytest.mark.parametrize('q', [
  presets.int4(symmetric=False), presets.nvfp4(group=8),
  presets.codebook(bits=2), presets.mxfp4(group=8),
], ids=repr)  # fmt: skip
def test_scan_slices_it(q):
  t = loop_tensor(q)
  x = weights((3, 16), seed=1)

  def body(carry, layer):
    assert layer.shape == (16, 6)
    return carry, carry @ layer.dequantize()

  _, out = jax.jit(lambda x, t: jax.lax.scan(body, x, t))(x, t)
  want = jnp.einsum('mk,lkn->lmn', x, t.dequantize())
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_scan_slices_a_loop_axis_in_front_of_an_inner_one():
  """Layers of experts stored expert-last: only the leading axis is sliced."""
  t = quantized((3, 8, 2, 5), (1,), (0, 2))
  whole = t.dequantize()

  def body(carry, layer):
    assert layer.shape == (8, 2, 5)
    return carry, layer.dequantize()

  _, out = jax.lax.scan(body, 0, t)
  np.testing.assert_array_equal(out, whole)


def test_vmap_slices_it():
  t = loop_tensor()
  out = jax.vmap(lambda t: t.dequantize().sum(0))(t)
  np.testing.assert_allclose(out, t.dequantize().sum(1), rtol=1e-6)
  made = jax.vmap(
    lambda w: core.quantize(w, presets.int4(), Layout.of(w.shape, (0,)))
  )(weights((4, 16, 6)))
  want = quantized((4, 16, 6), (1,), (0,))
  assert made.shape == want.shape
  np.testing.assert_array_equal(made.dequantize(), want.dequantize())


def test_jit_in_and_out_and_donation():
  t = loop_tensor()
  want = t.dequantize()
  f = jax.jit(lambda t: t, donate_argnums=0)
  out = f(t)
  assert out.quantizer == t.quantizer
  np.testing.assert_array_equal(out.dequantize(), want)
  again = jax.jit(lambda t: t.transpose((0, 2, 1)))(out)
  assert again.shape == (4, 6, 16)


def test_equal_tensors_hit_the_jit_cache():
  f = jax.jit(lambda t: t.dequantize())
  f(loop_tensor())
  f(loop_tensor())
  assert f._cache_size() == 1


def test_tree_map_and_stacking():
  a, b = quantized((16, 6), (0,)), quantized((16, 6), (0,), seed=1)
  stack = jax.tree.map(lambda *x: jnp.stack(x), a, b)
  assert stack.shape == (2, 16, 6)
  np.testing.assert_array_equal(stack.dequantize()[1], b.dequantize())
  one = jax.tree.map(lambda x: x[0], stack)
  np.testing.assert_array_equal(one.dequantize(), a.dequantize())


def test_shapes_alone():
  make = functools.partial(
    core.quantize,
    quantizer=presets.int3(group=8),
    layout=Layout.of((16, 6), (0,)),
  )
  shape = jax.eval_shape(make, jax.ShapeDtypeStruct((16, 6), jnp.bfloat16))
  real = make(weights((16, 6)).astype(jnp.bfloat16))
  assert shape.shape == (16, 6)
  assert (shape.size, shape.dtype) == (96, jnp.bfloat16)
  assert shape.nbytes == real.nbytes == core.nbytes(shape) == core.nbytes(real)
  assert shape.bits_per_weight == real.bits_per_weight
  assert shape.transpose((1, 0)).shape == (6, 16)
  assert 'int3(group=8)' in repr(shape)
  named = jax.tree.map(lambda x: f'of {x.ndim} axes', shape)
  assert "scale='of 2 axes'" in repr(named)


def test_flatten_and_unflatten_with_any_leaf():
  t = loop_tensor()
  leaves, treedef = jax.tree.flatten(t)
  assert len(leaves) == 3
  jax.tree.unflatten(treedef, [None] * 3)
  jax.tree.unflatten(treedef, ['a', 1, object()])
  assert treedef == jax.tree.structure(loop_tensor())
  other = jax.tree.structure(loop_tensor(presets.mxfp4(group=8)))
  assert treedef != other


def test_given_parameters_are_used():
  w = weights((16, 6))
  q = presets.int4(scale=scales.mse(candidates=8))
  given = core.fit(w * 2, q)
  t = core.quantize(w, q, Layout.of(w.shape, (0,)), given)
  np.testing.assert_array_equal(t.scale, given.scale)
  np.testing.assert_array_equal(t.dequantize(), core.fake_quantize(w, q, given))


def test_stochastic_rounding_of_weights():
  w = weights((16, 6))
  q = presets.int4(rounding='stochastic')
  layout, key = Layout.of(w.shape, (0,)), jax.random.key(0)
  t = core.quantize(w, q, layout, key=key)
  np.testing.assert_array_equal(
    t.dequantize(), core.fake_quantize(w, q, key=key)
  )
  with pytest.raises(ValueError, match='needs a random key'):
    core.quantize(w, q, layout)


def test_strict_promotion():
  """No operation of core relies on mixing dtypes."""
  w = weights((2, 24, 6))
  layout = Layout.of(w.shape, (1,), (0,))
  with jax.numpy_dtype_promotion('strict'):
    for q in QUANTIZERS:
      t = jax.eval_shape(
        lambda w, q=q: core.quantize(w, q, layout).dequantize(), w
      )
      assert t.shape == w.shape
    bits = jnp.int32(4)
    core.fake_quantize(w, presets.int8(symmetric=False), bits=bits)
    q = presets.int4(scale=scales.mse(candidates=4, p=2.4))
    jax.grad(lambda w: core.fake_quantize(w, q).sum())(w)


def test_double_precision_mode():
  """x64 mode changes nothing but the dtype a float64 array keeps."""
  w = np.asarray(weights((24, 6)))
  layout = Layout.of(w.shape, (0,))
  with jax.enable_x64(True):
    for q in (QUANTIZERS[1], QUANTIZERS[18], QUANTIZERS[-1], presets.dfp16()):
      t = core.quantize(jnp.asarray(w, jnp.float64), q, layout)
      assert t.dequantize().dtype == jnp.float64
      assert t.codes.dtype == stored(q)
      fake = core.fake_quantize(jnp.asarray(w), q)
      assert fake.dtype == jnp.float32
      np.testing.assert_array_equal(t.dequantize(), fake)
