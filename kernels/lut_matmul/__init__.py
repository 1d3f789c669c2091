"""Int8 activations by packed codes that stand for entries of a table."""

from quantlab_kernels.lut_matmul.api import int8_table as int8_table
from quantlab_kernels.lut_matmul.api import lut_matmul as lut_matmul
