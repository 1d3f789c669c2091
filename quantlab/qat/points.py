"""Differentiable quantization: the weights stay, their levels are learned."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from quantlab import core
from quantlab.core import QParams
from quantlab.qat.estimators import Estimator


@dataclasses.dataclass(frozen=True)
class learned_points(Estimator):
  """Weights fixed, the entries of their codebook learned.

    x_hat_i = s p_c(i),  c(i) = the entry nearest to x_i / s
    dx_hat/dp_j = s summed over the i with c(i) = j

  (arXiv 1802.05668, section 4). The entries are the leaf 'points', in units of
  the scale (loops..., 2^bits, N or 1), and begin at the codebook that
  `ql.codebook(bits)` fits. Weights get no gradient; each goes to the entry
  that is nearest now. The paper scales buckets of 256 values to [0, 1], here
  a scale and a codebook serve a channel or a tensor.

  For the role 'weight', with `ql.codebook()` quantizers.
  """

  learned: ClassVar[bool] = True

  def check(self, role, quantizer, where):
    if role != 'weight' or not quantizer.learned:
      raise ValueError(
        f'learned_points() learns the codebook of weights, found '
        f'{quantizer!r} for the {role} of {where}; use ql.codebook(bits=...) '
        'weights, or another estimator'
      )

  def leaves(self, found, quantizer, loops=()):
    assert found is not None  # weights are always fitted
    return {'scale': found.scale, 'points': found.codebook}

  def qparams(self, x, quantizer, leaves, axis):
    # Entries may cross while they move: codes are numbered as values rise.
    points = jnp.sort(leaves['points'], axis=axis)
    return QParams(leaves['scale'], codebook=points)

  def simulate(self, x, quantizer, leaves, axis, count):
    found = self.qparams(x, quantizer, leaves, axis)
    return core.fake_quantize(lax.stop_gradient(x), quantizer, found, axis=axis)
