"""W4A8: int8 activations by packed low-bit weights scaled by group."""

from quantlab_kernels.w4a8_matmul.api import w4a8_matmul as w4a8_matmul
