"""Convolution of int8 activations by int8 kernels, depthwise included."""

from quantlab_kernels.int8_conv.api import int8_conv as int8_conv
