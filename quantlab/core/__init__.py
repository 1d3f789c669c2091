"""A format and its scales make a quantized array."""

from quantlab.core import presets as presets
from quantlab.core import scales as scales
from quantlab.core.fitting import fit as fit
from quantlab.core.fitting import fit_range as fit_range
from quantlab.core.kmeans import kmeans as kmeans
from quantlab.core.layout import Layout as Layout
from quantlab.core.layout import LayoutError as LayoutError
from quantlab.core.qparams import QParams as QParams
from quantlab.core.qtensor import QTensor as QTensor
from quantlab.core.qtensor import assemble as assemble
from quantlab.core.qtensor import check_target as check_target
from quantlab.core.qtensor import concatenate as concatenate
from quantlab.core.qtensor import may_prepack as may_prepack
from quantlab.core.qtensor import prepack as prepack
from quantlab.core.qtensor import quantize as quantize
from quantlab.core.quantize import decode as decode
from quantlab.core.quantize import encode as encode
from quantlab.core.quantize import fake_quantize as fake_quantize
from quantlab.core.quantizer import Quantizer as Quantizer
from quantlab.core.tree import is_qtensor as is_qtensor
from quantlab.core.tree import named_leaves as named_leaves
from quantlab.core.tree import nbytes as nbytes
from quantlab.core.tree import nonfinite as nonfinite
from quantlab.core.tree import path_str as path_str
