"""Post-training quantization."""

from quantlab.ptq.awq import awq as awq
from quantlab.ptq.correction import (
  batch_norm_reestimation as batch_norm_reestimation,
)
from quantlab.ptq.correction import bias_correction as bias_correction
from quantlab.ptq.cross_layer import (
  cross_layer_equalization as cross_layer_equalization,
)
from quantlab.ptq.gptq import gptq as gptq
from quantlab.ptq.model import Quantized as Quantized
from quantlab.ptq.model import restore as restore
from quantlab.ptq.norm_tweak import norm_tweak as norm_tweak
from quantlab.ptq.outlier_suppression import (
  outlier_suppression as outlier_suppression,
)
from quantlab.ptq.rotate import fold_norms as fold_norms
from quantlab.ptq.rotate import rotate as rotate
from quantlab.ptq.rtn import rtn as rtn
from quantlab.ptq.run import ptq as ptq
from quantlab.ptq.smooth import smooth as smooth
from quantlab.ptq.transform import Encoder as Encoder
from quantlab.ptq.transform import Transform as Transform
from quantlab.ptq.transform import Tuner as Tuner
from quantlab.ptq.transform import chain as chain
