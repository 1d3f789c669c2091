"""Quantized primitives as pure functions; products go to the kernels."""

from quantlab.ops.activation import abstract_range as abstract_range
from quantlab.ops.activation import (
  fake_quantize_activation as fake_quantize_activation,
)
from quantlab.ops.activation import on_units as on_units
from quantlab.ops.activation import sharing as sharing
from quantlab.ops.adjust import add_adapter as add_adapter
from quantlab.ops.adjust import add_bias as add_bias
from quantlab.ops.adjust import adjust_input as adjust_input
from quantlab.ops.dims import ConvDims as ConvDims
from quantlab.ops.dims import DotDims as DotDims
from quantlab.ops.dims import GatherDims as GatherDims
from quantlab.ops.dims import RaggedDims as RaggedDims
from quantlab.ops.embed import embed as embed
from quantlab.ops.product import activation_product as activation_product
from quantlab.ops.product import product as product
from quantlab.ops.product import route as route
