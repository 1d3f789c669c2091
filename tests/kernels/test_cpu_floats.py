"""w4a16_matmul in C++: the weights of the definition, in every width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import matmul as oracle
from oracle import packing

import quantlab_kernels as qk

pytestmark = pytest.mark.usefixtures('cpu_kernels')


def _case(m, k, n, bits, group, signed=True, seed=0):
  """Returns arrays of a call, and its result in float64."""
  rng = np.random.default_rng((seed, bits))
  q = rng.integers(0, 2**bits, (k, n)).astype(np.uint8)
  value = oracle.signed_value(q, bits) if signed else q.astype(np.int64)
  shape = (-(-k // (group or k)), n)
  x = rng.normal(size=(m, k)).astype(np.float32)
  scale = rng.uniform(0.5, 2, shape).astype(np.float32)
  zero = rng.integers(-3, 4, shape).astype(np.float32)
  w = oracle.dequantize(value, scale, group or k, zero)
  arrays = {'x': x, 'w': packing.pack(q, bits), 'scale': scale}
  return arrays | {'zero_point': zero}, x.astype(np.float64) @ w


def _check(cases, wants):
  def program(arrays):
    return [
      qk.w4a16_matmul(**a, **options, implementation='cpu')
      for a, (_, options) in zip(arrays, cases, strict=True)
    ]

  got = jax.jit(program)([a for a, _ in cases])
  for y, want, case in zip(got, wants, cases, strict=True):
    top = np.abs(want).max()
    np.testing.assert_allclose(y, want, 1e-5, 2e-6 * top, err_msg=f'{case[1]}')


@pytest.mark.parametrize('bits', range(1, 9))
def test_every_width_and_shape(bits, isa):
  cases, wants = [], []
  for i, (m, k, n, group) in enumerate(
    [(1, 45, 7, None), (2, 130, 65, 16), (3, 64, 100, 32), (13, 100, 31, 8)]
    + [(1, 1, 1, None), (4, 50, 66, 8), (37, 77, 64, None), (1, 300, 530, 64)]
  ):
    signed = bool((i + bits) % 2)
    arrays, want = _case(m, k, n, bits, group, signed, seed=i)
    cases.append((arrays, {'bits': bits, 'group': group, 'signed': signed}))
    wants.append(want)
  _check(cases, wants)


def test_any_decoding_of_few_bits(isa):
  values = np.random.default_rng(0).normal(size=16).astype(np.float32)

  def decode(codes):
    return jnp.asarray(values)[codes.astype(jnp.int32)]

  rng = np.random.default_rng(1)
  for m in (1, 5):
    x = rng.normal(size=(m, 70)).astype(np.float32)
    q = rng.integers(0, 16, (70, 66)).astype(np.uint8)
    want = x.astype(np.float64) @ values[q].astype(np.float64)
    options = {'bits': 4, 'decode': decode}
    _check([({'x': x, 'w': packing.pack(q, 4)}, options)], [want])


def test_gradients_and_vmap():
  arrays, _ = _case(3, 40, 9, 4, 8)
  c = np.random.default_rng(5).normal(size=(3, 9)).astype(np.float32)

  def loss(x, s, z, name):
    y = qk.w4a16_matmul(
      x, arrays['w'], s, bits=4, group=8, zero_point=z, implementation=name
    )
    return (c * y).sum()

  at = (arrays['x'], arrays['scale'], arrays['zero_point'])
  for wrt in ((0,), (0, 1, 2)):
    got, want = (
      jax.jit(jax.grad(loss, wrt), static_argnums=3)(*at, name)
      for name in ('cpu', 'reference')
    )
    for g, w in zip(got, want, strict=True):
      np.testing.assert_allclose(g, w, 1e-4, 1e-5)
  xs = np.stack([arrays['x'], arrays['x'][::-1]])
  for name in ('cpu', 'reference'):
    f = jax.vmap(jax.value_and_grad(loss), (0, None, None, None))
    got = jax.jit(f, static_argnums=3)(xs, *at[1:], name)
    if name == 'cpu':
      first = got
  for g, w in zip(first, got, strict=True):
    np.testing.assert_allclose(g, w, 1e-4, 1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad, isa):
  for m in (1, 5):
    arrays, _ = _case(m, 20, 70, 4, 4)
    arrays['x'] = arrays['x'].copy()
    arrays['x'][0, 3] = bad
    scale = arrays['scale'].copy()
    scale[2, 5] = bad
    y = qk.w4a16_matmul(
      **arrays | {'scale': scale}, bits=4, group=4, implementation='cpu'
    )
    assert not np.isfinite(y[0]).any()
    assert not np.isfinite(y[:, 5]).any()
    assert np.isfinite(np.delete(y[1:], 5, 1)).all()


def test_refusals_say_why():
  x = jax.ShapeDtypeStruct((1, 64), jnp.float32)

  def refusal(x, w, **options):
    (choice,) = qk.choices(qk.w4a16_matmul, x, w, **options)
    return dict(choice.refusals)['cpu']

  packed = lambda k: jax.ShapeDtypeStruct((k, 8), jnp.uint8)  # noqa: E731
  floats = jax.ShapeDtypeStruct((64, 8), jnp.float32)
  assert 'not packed' in refusal(x, floats)
  assert 'look up codes' in refusal(x, packed(64), bits=8, decode=jnp.float32)
  assert 'within a byte' in refusal(x, packed(32), bits=4, group=5)
