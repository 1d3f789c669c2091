"""Quantization of JAX programs: `import quantlab as ql`."""

import quantlab_kernels as kernels  # noqa: F401 (ql.kernels)
from quantlab import cost as cost
from quantlab import optim as optim
from quantlab.core import QTensor as QTensor
from quantlab.core import Quantizer as Quantizer
from quantlab.core import nbytes as nbytes
from quantlab.core import scales as scales
from quantlab.core.presets import binary as binary
from quantlab.core.presets import codebook as codebook
from quantlab.core.presets import dfp16 as dfp16
from quantlab.core.presets import fp4_e2m1 as fp4_e2m1
from quantlab.core.presets import fp6_e2m3 as fp6_e2m3
from quantlab.core.presets import fp6_e3m2 as fp6_e3m2
from quantlab.core.presets import fp8_e4m3 as fp8_e4m3
from quantlab.core.presets import fp8_e5m2 as fp8_e5m2
from quantlab.core.presets import int2 as int2
from quantlab.core.presets import int3 as int3
from quantlab.core.presets import int4 as int4
from quantlab.core.presets import int5 as int5
from quantlab.core.presets import int6 as int6
from quantlab.core.presets import int7 as int7
from quantlab.core.presets import int8 as int8
from quantlab.core.presets import mxfp4 as mxfp4
from quantlab.core.presets import mxfp6 as mxfp6
from quantlab.core.presets import mxfp8 as mxfp8
from quantlab.core.presets import mxint8 as mxint8
from quantlab.core.presets import nf4 as nf4
from quantlab.core.presets import nvfp4 as nvfp4
from quantlab.core.presets import odd as odd
from quantlab.core.presets import pow2 as pow2
from quantlab.core.presets import ternary as ternary
from quantlab.core.presets import uint2 as uint2
from quantlab.core.presets import uint3 as uint3
from quantlab.core.presets import uint4 as uint4
from quantlab.core.presets import uint5 as uint5
from quantlab.core.presets import uint6 as uint6
from quantlab.core.presets import uint7 as uint7
from quantlab.core.presets import uint8 as uint8
from quantlab.graph.blocks import blocks as blocks
from quantlab.graph.pairs import pairs as pairs
from quantlab.graph.pairs import shared_inputs as shared_inputs
from quantlab.io import load as load
from quantlab.io import save as save
from quantlab.plan import Plan as Plan
from quantlab.planner import plan as plan
from quantlab.prepacking import prepack as prepack
from quantlab.ptq import Quantized as Quantized
from quantlab.ptq import awq as awq
from quantlab.ptq import (
  batch_norm_reestimation as batch_norm_reestimation,
)
from quantlab.ptq import bias_correction as bias_correction
from quantlab.ptq import chain as chain
from quantlab.ptq import (
  cross_layer_equalization as cross_layer_equalization,
)
from quantlab.ptq import fold_norms as fold_norms
from quantlab.ptq import gptq as gptq
from quantlab.ptq import norm_tweak as norm_tweak
from quantlab.ptq import outlier_suppression as outlier_suppression
from quantlab.ptq import ptq as ptq
from quantlab.ptq import rotate as rotate
from quantlab.ptq import rtn as rtn
from quantlab.ptq import smooth as smooth
from quantlab.qat import adapters as adapters
from quantlab.qat import distill as distill
from quantlab.qat import estimators as estimators
from quantlab.qat import learned_points as learned_points
from quantlab.qat import lora as lora
from quantlab.qat import qat as qat
from quantlab.qat import set_leaves as set_leaves
from quantlab.qat import with_adapters as with_adapters
from quantlab.quality import compare as compare
from quantlab.quality import evaluate as evaluate
from quantlab.recipe import optional as optional
from quantlab.recipe import per_layer as per_layer
from quantlab.recipe import recipe as recipe
from quantlab.recipe import rule as rule
from quantlab.rewrites import fake_quantized as fake_quantized
from quantlab.rewrites import observe as observe
from quantlab.rewrites import quantized as quantized
from quantlab.search.allocate import allocate as allocate
from quantlab.search.sensitivity import sensitivity as sensitivity
from quantlab.sqnr import site_sqnr as site_sqnr

__all__ = [name for name in dir() if not name.startswith('_')]
