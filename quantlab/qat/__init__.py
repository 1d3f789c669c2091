"""Quantization-aware training."""

from quantlab.qat.train import QAT as QAT
from quantlab.qat.train import qat as qat
from quantlab.qat.train import set_leaves as set_leaves
