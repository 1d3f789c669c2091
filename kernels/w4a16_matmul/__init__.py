"""Weight-only quantization: float activations by decoded weights."""

from quantlab_kernels.w4a16_matmul.api import w4a16_matmul as w4a16_matmul
