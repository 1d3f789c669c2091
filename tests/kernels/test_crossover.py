"""Where low bits are slower than float: the data, and where it is told."""

import jax
import jax.numpy as jnp
import pytest

import quantlab_kernels as qk
from quantlab_kernels import crossover


def test_the_data_knows_every_product_and_batch():
  table = crossover._table()
  assert table.keys() == {'w8a8', 'w4a8', 'ternary', 'w4a16'}
  assert {frozenset(sizes) for sizes in table.values()} == {
    frozenset((1, 4, 16, 64, 256))
  }


@pytest.mark.parametrize('bits', range(1, 9))
def test_a_megabyte_of_integer_weights_is_never_slower(bits):
  for rows in (1, 2, 4, 16, 64, 256, 1000):
    assert qk.slower_than_float(bits, rows, 2**20 * 8 // bits) is None
    assert qk.slower_than_float(bits, rows, 64) is not None


def test_rows_between_those_measured_count_as_the_next_lower(monkeypatch):
  tables = {'w8a8': {1: 100, 16: 10}, 'w4a16': {1: 7, 16: 7}}
  monkeypatch.setattr(crossover, '_table', lambda: tables)
  assert qk.slower_than_float(8, 15, 99) == (
    'slower than float32: 99 weights at 15 rows, measured as fast from 100 on'
  )
  assert qk.slower_than_float(8, 15, 100) is None
  assert qk.slower_than_float(8, 500, 9) is not None
  assert qk.slower_than_float(8, 16, 10) is None
  assert qk.slower_than_float(4, 16, 9, integer=False) is None


@pytest.mark.usefixtures('cpu_kernels')
def test_explain_tells_it():
  def codes(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int8)

  (small,) = qk.choices(qk.int8_matmul, codes(1, 64), codes(64, 64))
  (large,) = qk.choices(qk.int8_matmul, codes(1, 2048), codes(2048, 2048))
  assert small.implementation == large.implementation == 'cpu'
  assert 'slower than float32: 4096 weights at 1 rows' in small.route
  assert 'slower' not in large.route
