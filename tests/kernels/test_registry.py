"""The choice of a backend: preference, refusal, explanation."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab_kernels as qk
from quantlab_kernels import int_dot, registry
from quantlab_kernels.int8_matmul import api

X = jax.ShapeDtypeStruct((1, 4096), jnp.int8)
W = jax.ShapeDtypeStruct((4096, 4096), jnp.int8)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
  """The choice among backends that run anywhere."""
  monkeypatch.setenv('QUANTLAB_CPU_FFI', '0')


@pytest.fixture
def fake():
  """A backend of int8_matmul that takes one row only, and returns 42."""

  def refuses(x, *rest, **options):
    del rest, options
    return None if x.shape[0] == 1 else f'takes one row, found {x.shape[0]}'

  def run(x, w, *rest, **options):
    del rest, options
    return jnp.full((x.shape[0], w.shape[1]), 42.0)

  backend = types.SimpleNamespace(
    refuses=refuses, run=run, route=lambda *a, **k: 'a constant'
  )
  remove = api._OP.register('fake', backend)
  yield 'fake'
  remove()


def _codes(*shape):
  return np.ones(shape, np.int8)


@pytest.mark.parametrize('op', sorted(registry._OPS))
def test_every_operation_has_its_definition_last(op):
  names = registry._OPS[op].names()
  assert names[-1] == 'reference'
  assert 'xla' in names
  for name in names:
    backend = registry._OPS[op].backend(name)
    assert callable(backend.run)
    assert callable(backend.refuses)
    assert callable(backend.route)


def test_preferred_then_next_then_named(fake):
  got = qk.int8_matmul(_codes(1, 8), _codes(8, 3))
  np.testing.assert_array_equal(got, np.full((1, 3), 42.0))
  got = qk.int8_matmul(_codes(2, 8), _codes(8, 3))
  np.testing.assert_array_equal(got, np.full((2, 3), 8.0))
  got = qk.int8_matmul(_codes(1, 8), _codes(8, 3), implementation='xla')
  np.testing.assert_array_equal(got, np.full((1, 3), 8.0))
  with pytest.raises(ValueError, match="'fake' cannot run: takes one row"):
    qk.int8_matmul(_codes(2, 8), _codes(8, 3), implementation=fake)


def test_all_reasons_are_raised_together(fake, monkeypatch):
  for name in api._OP.names()[1:]:
    monkeypatch.setattr(
      api._OP.backend(name), 'refuses', lambda *a, n=name, **k: f'{n} is ill'
    )
  with pytest.raises(ValueError, match=r'takes one row.*xla is ill.*reference'):
    qk.int8_matmul(_codes(2, 8), _codes(8, 3))


def test_an_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match=r"did you mean 'xla'.*reference"):
    qk.int8_matmul(_codes(2, 8), _codes(8, 3), implementation='xlaa')


def test_explain_prints_the_choice_and_the_refusals(fake, capsys, monkeypatch):
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: True)
  qk.explain(qk.int8_matmul, jax.ShapeDtypeStruct((16, 4096), jnp.int8), W)
  text = capsys.readouterr().out
  assert 'int8_matmul(int8[16, 4096], int8[4096, 4096]' in text
  assert 'fake: refused, takes one row, found 16' in text
  assert 'xla: int8 x int8 -> int32 dot, K in slices of 512' in text
  qk.explain(qk.int8_matmul, X, W, implementation='xla')
  assert 'one row padded to two' in capsys.readouterr().out


def test_choices_of_a_function_that_calls_several():
  def mlp(x, w):
    q, s, _ = qk.quantize_activation(x)
    return qk.int8_matmul(q, w, x_scale=s)

  x = jax.ShapeDtypeStruct((3, 8), jnp.float32)
  found = qk.choices(mlp, x, jax.ShapeDtypeStruct((8, 5), jnp.int8))
  assert [c.op for c in found] == ['quantize_activation', 'int8_matmul']
  assert {c.implementation for c in found} == {'xla'}
  assert not qk.choices(lambda x: x + 1, x)


@pytest.mark.parametrize(
  ('bits', 'kw', 'route'),
  [
    (4, {'group': 128}, 'a loop of 32 int8 dots'),
    (3, {}, '3-bit codes unpacked to int8, int8 x int8'),
  ],
)
def test_routes_of_grouped_weights(bits, kw, route, monkeypatch):
  p = jax.ShapeDtypeStruct((qk.packed_rows(4096, bits), 64), jnp.uint8)
  s = jax.ShapeDtypeStruct((32 if kw else 1, 64), jnp.float32)
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: True)
  (choice,) = qk.choices(qk.w4a8_matmul, X, p, s, bits=bits, **kw)
  assert route in choice.route
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: False)
  (choice,) = qk.choices(qk.w4a8_matmul, X, p, s, bits=bits, **kw)
  assert ('batched' in choice.route) == bool(kw)
