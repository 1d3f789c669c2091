"""Post-training quantization."""

from quantlab.ptq.gptq import gptq as gptq
from quantlab.ptq.model import Quantized as Quantized
from quantlab.ptq.model import restore as restore
from quantlab.ptq.rotate import fold_norms as fold_norms
from quantlab.ptq.rotate import rotate as rotate
from quantlab.ptq.rtn import rtn as rtn
from quantlab.ptq.run import ptq as ptq
from quantlab.ptq.transform import Encoder as Encoder
from quantlab.ptq.transform import Transform as Transform
from quantlab.ptq.transform import chain as chain
