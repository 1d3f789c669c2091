"""ggml through ctypes multiplies what it was given."""

import numpy as np
import pytest

from experiments.benchmarks import ggml


@pytest.mark.parametrize(
  ('kind', 'most'), [('F32', 1e-5), ('Q8_0', 0.02), ('Q4_0', 0.15)]
)
def test_products_are_right(kind, most):
  pytest.importorskip('llama_cpp')
  made = ggml.Products(kind, 256, 24, 3, 2, np.random.default_rng(0))
  made()
  want = made.x @ made.values.T
  assert np.linalg.norm(made.y - want) < most * np.linalg.norm(want)
