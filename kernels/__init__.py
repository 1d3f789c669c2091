"""Low-bit matrix products on raw arrays (imports nothing of quantlab).

Operations: `quantize_activation`, `int8_matmul`, `w4a8_matmul`,
`ternary_matmul`, `lut_matmul`, `w4a16_matmul`, `dense_and_sparse_matmul`,
`int8_conv`, `hadamard`. Each is a folder with its definition (reference.py) and
one file a backend; `explain(op, *args)` prints which one would run, and why.
Storage: `pack`, `unpack`, `packed_rows`; `prepack` arranges a weight as the
cpu kernels read it fastest. `slower_than_float` knows the sizes at which a
product is not worth it. `differentiated_as` and `whole` are for functions with
derivatives of their own. `python -m quantlab_kernels.build` compiles the cpu
backend ahead of its first use.
"""

from quantlab_kernels.crossover import slower_than_float as slower_than_float
from quantlab_kernels.dense_and_sparse_matmul import (
  dense_and_sparse_matmul as dense_and_sparse_matmul,
)
from quantlab_kernels.derivatives import (
  differentiated_as as differentiated_as,
)
from quantlab_kernels.hadamard import hadamard as hadamard
from quantlab_kernels.int8_conv import int8_conv as int8_conv
from quantlab_kernels.int8_matmul import int8_matmul as int8_matmul
from quantlab_kernels.lut_matmul import int8_table as int8_table
from quantlab_kernels.lut_matmul import lut_matmul as lut_matmul
from quantlab_kernels.packing import pack as pack
from quantlab_kernels.packing import packed_rows as packed_rows
from quantlab_kernels.packing import unpack as unpack
from quantlab_kernels.panels import Panels as Panels
from quantlab_kernels.panels import prepack as prepack
from quantlab_kernels.quantize_activation import (
  quantize_activation as quantize_activation,
)
from quantlab_kernels.registry import choices as choices
from quantlab_kernels.registry import explain as explain
from quantlab_kernels.registry import use as use
from quantlab_kernels.ternary_matmul import ternary_matmul as ternary_matmul
from quantlab_kernels.w4a8_matmul import w4a8_matmul as w4a8_matmul
from quantlab_kernels.w4a16_matmul import w4a16_matmul as w4a16_matmul
from quantlab_kernels.whole import whole as whole
