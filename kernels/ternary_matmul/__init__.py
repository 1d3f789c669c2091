"""W1.58A8: int8 activations by weights of -1, 0 and 1."""

from quantlab_kernels.ternary_matmul.api import (
  ternary_matmul as ternary_matmul,
)
