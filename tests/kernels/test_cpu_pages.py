"""Weights that are used again and again move into large pages."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures('cpu_kernels')

# KB of large pages that hold some of the weights.
LARGE = """
import re
import jax, jax.numpy as jnp, numpy as np
import quantlab_kernels as qk

rng = np.random.default_rng(0)

def large(weights):
  spans = [(w.unsafe_buffer_pointer(), w.nbytes) for w in weights]
  inside = False
  total = 0
  for line in open('/proc/self/smaps'):
    found = re.match('([0-9a-f]+)-([0-9a-f]+) ', line)
    if found:
      first, last = (int(f, 16) for f in found.groups())
      inside = any(first < at + size and at < last for at, size in spans)
    elif inside and line.startswith('AnonHugePages'):
      total += int(line.split()[1])
  return total
"""

# Prints them after each of six products, and checks the products.
PROGRAM = """
w = jnp.copy(rng.integers(-128, 128, (4096, 2048), np.int8))
x = jnp.asarray(rng.integers(-128, 128, (2, 4096), np.int8))

product = jax.jit(lambda x, w: qk.int8_matmul(x, w, out_dtype=jnp.int32))
found = []
for _ in range(6):
  y = product(x, w).block_until_ready()
  found.append((large([w]), int(np.abs(np.asarray(y, np.int64)).sum())))
want = np.abs(np.asarray(x, np.int64) @ np.asarray(w, np.int64)).sum()
assert all(total == want for _, total in found)
print(*(n for n, _ in found))
"""

# Prints them, and of how many, after six products by each of many weights.
MANY = """
first = jnp.asarray(rng.integers(-128, 128, (2048, 2048), np.int8))
weights = [jnp.copy(first) for _ in range(48)]
x = jnp.asarray(rng.integers(-128, 128, (2, 2048), np.int8))
product = jax.jit(lambda x, w: qk.int8_matmul(x, w, out_dtype=jnp.int32))
for _ in range(6):
  for w in weights:
    product(x, w).block_until_ready()
print(large(weights), sum(w.nbytes for w in weights) // 1024)
"""


def _large_pages(setting: str, program: str = PROGRAM) -> list[int]:
  done = subprocess.run(
    [sys.executable, '-c', LARGE + program],
    # Of the tests' many devices, one.
    env={**os.environ, 'XLA_FLAGS': '', 'QUANTLAB_LARGE_PAGES': setting},
    capture_output=True,
    text=True,
    check=True,
  )
  return [int(n) for n in re.findall(r'\d+', done.stdout)]


def test_a_weight_that_stays_moves_once():
  found = _large_pages('1')
  before, after = found[:3], found[3:]
  if not after[0] > before[0]:
    pytest.skip(f'the system gives no large pages here: {found}')
  assert before == before[:1] * 3
  assert after == after[:1] * 3
  assert after[0] - before[0] >= 2048 * 2  # most of 8 MB


def test_each_of_many_weights_moves():
  # They fill no whole number of large pages, and lie one behind the other.
  found, size = _large_pages('1', MANY)
  if not found:
    pytest.skip('the system gives no large pages here')
  assert found >= 0.9 * size


def test_memory_is_left_alone_where_told():
  assert len(set(_large_pages('0'))) == 1
