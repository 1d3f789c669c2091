"""Low-bit matrix products on raw arrays (imports nothing of quantlab)."""

from quantlab_kernels.division import divide as divide
from quantlab_kernels.packing import pack as pack
from quantlab_kernels.packing import packed_rows as packed_rows
from quantlab_kernels.packing import unpack as unpack
