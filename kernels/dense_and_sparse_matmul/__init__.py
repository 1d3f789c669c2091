"""Low-bit weights with a few entries kept apart in float."""

from quantlab_kernels.dense_and_sparse_matmul.api import (
  dense_and_sparse_matmul as dense_and_sparse_matmul,
)
