"""Round to nearest: codes from ranges of the weights alone."""

from __future__ import annotations

import dataclasses

import jax

from quantlab.plan import Storage
from quantlab.runtime.rng import fold_in_name


@dataclasses.dataclass(frozen=True)
class Transform:
  """One PTQ algorithm.

  Attributes:
    name: as it is reported.
    encode: `(name, weight, storage, key) -> QTensor` of one stored weight.
  """

  name: str
  encode: object


def rtn() -> Transform:
  """Round to nearest (the baseline of every method).

  Each unit's scale comes from the quantizer's range rule, codes from
  rounding; one pass over the weights, no data.
  """

  def encode(name: str, w: jax.Array, storage: Storage, key):
    if storage.quantizer.rounding == 'stochastic':
      return storage.quantize(w, fold_in_name(key, name))
    return storage.quantize(w)

  return Transform('rtn', encode)
