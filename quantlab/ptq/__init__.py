"""Post-training quantization."""

from quantlab.ptq.model import Quantized as Quantized
from quantlab.ptq.model import restore as restore
from quantlab.ptq.rtn import Transform as Transform
from quantlab.ptq.rtn import rtn as rtn
from quantlab.ptq.run import ptq as ptq
