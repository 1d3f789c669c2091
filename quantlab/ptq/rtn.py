"""Round to nearest: codes from ranges of the weights alone."""

from __future__ import annotations

from quantlab.core.rng import fold_in_name
from quantlab.ptq.transform import Encoder


def rtn() -> Encoder:
  """Round to nearest (the baseline of every method).

  Each unit's scale comes from the quantizer's range rule, codes from
  rounding; one pass over the weights, no data.
  """

  def encode(target, stat, key):
    quantizer = target.storage.quantizer
    if quantizer.rounding == 'stochastic':
      key = fold_in_name(key, target.name)
      return target.storage.quantize(target.weight, key), {}
    return target.storage.quantize(target.weight), {}

  return Encoder('rtn', encode)
