"""Float activations to int8 codes."""

from quantlab_kernels.quantize_activation.api import (
  quantize_activation as quantize_activation,
)
