"""W8A8: int8 activations by int8 weights."""

from quantlab_kernels.int8_matmul.api import int8_matmul as int8_matmul
