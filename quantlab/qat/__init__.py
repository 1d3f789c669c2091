"""Quantization-aware training."""

from quantlab.qat import distill as distill
from quantlab.qat.lora import adapters as adapters
from quantlab.qat.lora import lora as lora
from quantlab.qat.lora import with_adapters as with_adapters
from quantlab.qat.points import learned_points as learned_points
from quantlab.qat.train import QAT as QAT
from quantlab.qat.train import qat as qat
from quantlab.qat.train import set_leaves as set_leaves
