"""Gradient estimators: how an operand is quantized in training.

Rounding has no useful derivative, so each paper puts another in its place. An
estimator says what stands there, which leaves of a site it learns, and which
parameters the codes have in the end. All of them share one forward pass,
`core.fake_quantize`, so that what is trained is what is frozen.

  ste           rounds, the gradient of the identity      arXiv 1308.3432
  clipped_ste   and none where a value is clipped         arXiv 1712.05877
  lsq           learns the step; with a zero point LSQ+   1902.08153, 2004.09576
  pact          learns where activations are clipped      arXiv 1805.06085
  dorefa        weights through tanh                      arXiv 1606.06160
  ewgs          gradients scaled by the rounding error    arXiv 2104.00903
  warm_up       blends any of them in                     arXiv 2407.09527

Learned leaves are float32 of the shape of the scales, loops in front, so that
a scanned stack has one for each layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

import quantlab_kernels as kernels
from quantlab import core
from quantlab.core import QParams, Quantizer, snap
from quantlab.core.units import Units
from quantlab.plan import LEARNED

TINY = np.float32(2.0**-126)
Leaves = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Estimator:
  """The straight-through estimator, and what others change of it.

  x_hat = x + sg(Q(x) - x): the gradient of the identity, also where a value
  is clipped (arXiv 1308.3432). Ranges are constants to it.
  """

  learned: ClassVar[bool] = False  # whether the range is a trainable leaf

  def check(self, role: str, quantizer: Quantizer, where: str) -> None:
    """Refuses a quantizer that this estimator cannot train.

    Raises:
      ValueError: names the site and what to write instead.
    """
    if not self.learned:
      return
    name = type(self).__name__
    if role != 'weight' and not quantizer.static:
      raise ValueError(
        f'{name}() learns a range for the {role} of {where}, but '
        f'{quantizer!r} finds one from each batch. Use a static quantizer '
        f"(per='tensor', static=True), or give the {role} another estimator: "
        f"{{'weight': {name}(), '{role}': clipped_ste()}}"
      )
    if quantizer.scale_format != 'float32':
      raise ValueError(
        f'{name}() learns float32 ranges, but {quantizer!r} of {where} stores '
        f'{quantizer.scale_format} scales. Use clipped_ste(), or float32 scales'
      )
    if quantizer.learned:
      raise ValueError(
        f'{quantizer!r} of {where} learns a table, which {name}() does not '
        'train; use ste()'
      )

  def leaves(
    self,
    found: QParams | None,
    quantizer: Quantizer,
    loops: tuple[int, ...] = (),
  ) -> dict[str, Array]:
    """Leaves to begin with, from fitted or calibrated parameters.

    Args:
      found: of the operand; None where each batch has its own.
      quantizer: of the operand.
      loops: lengths of the loop axes that every leaf has in front.
    """
    if found is None or not quantizer.static:
      return {}
    return {k: v for k, v in found._asdict().items() if v is not None}

  def prepare(
    self, x: Float[Array, '*b p q'], quantizer: Quantizer, axis: int
  ) -> Float[Array, '*b p q']:
    """What is rounded in the place of x."""
    return x

  def qparams(
    self, x: Array | None, quantizer: Quantizer, leaves: Leaves, axis: int
  ) -> QParams:
    """Parameters of the codes.

    Args:
      x: prepared, where the range is found from it.
      quantizer: of the operand.
      leaves: of the role.
      axis: the contraction axis.
    """
    if 'scale' in leaves:
      return QParams(**{k: leaves[k] for k in QParams._fields if k in leaves})
    if x is None:
      raise ValueError(
        f'{quantizer!r} has a static range, but the variables hold none; make '
        'them with init(params, batches)'
      )
    x = lax.stop_gradient(x)
    return core.fit(x, quantizer, axis=axis, bits=leaves.get('bits'))

  def simulate(
    self,
    x: Float[Array, '*b p q'],
    quantizer: Quantizer,
    leaves: Leaves,
    axis: int,
    count: int,
  ) -> Float[Array, '*b p q']:
    """Quantizes and dequantizes; differentiable in x and learned leaves.

    Args:
      x: weights (loops..., K, N) with axis=-2, else (loops..., rows, K).
      quantizer: of the operand.
      leaves: of the role.
      axis: the contraction axis.
      count: how many elements (of one example) share a range.
    """
    x = self.prepare(x, quantizer, axis)
    found = self.qparams(x, quantizer, leaves, axis)
    return _through(x, _rounded(x, quantizer, found, leaves, axis))


def _rounded(x, quantizer, found, leaves, axis):
  bits = leaves.get('bits')
  return core.fake_quantize(x, quantizer, found, axis=axis, bits=bits)


def need_leaves(
  estimator: Estimator, site: str, role: str, leaves: Leaves
) -> None:
  """Refuses variables without what an estimator learns.

  Raises:
    ValueError: names the site and the role.
  """
  if estimator.learned and not set(LEARNED) & set(leaves):
    raise ValueError(
      f'the variables hold no learned range for the {role} of site {site!r}, '
      f'which {estimator!r} trains; make them with init(params, batches)'
    )


@jax.custom_jvp
def _through(x: Array, x_hat: Array) -> Array:
  """x_hat with the gradient of x; x + sg(x_hat - x) would round twice."""
  return x_hat


_through.defjvp(
  lambda primals, tangents: (kernels.whole(_through, *primals), tangents[0])
)


@jax.custom_jvp
def _scaled(v: Array, factor: Array) -> Array:
  """The same v, its gradient multiplied by a factor."""
  return v


_scaled.defjvp(
  lambda primals, t: (kernels.whole(_scaled, *primals), t[0] * primals[1])
)


def _constants(found: QParams) -> QParams:
  return jax.tree.map(lax.stop_gradient, found)


@dataclasses.dataclass(frozen=True)
class ste(Estimator):
  """The straight-through estimator, see `Estimator`."""


@dataclasses.dataclass(frozen=True)
class clipped_ste(Estimator):
  """Straight through rounding, no gradient where a value is clipped."""

  def simulate(self, x, quantizer, leaves, axis, count):
    x = self.prepare(x, quantizer, axis)
    found = _constants(self.qparams(x, quantizer, leaves, axis))
    return _rounded(x, quantizer, found, leaves, axis)


@dataclasses.dataclass(frozen=True)
class lsq(Estimator):
  """Learned step size; with an asymmetric quantizer LSQ+.

    x_hat = (clip(round(x / s) + z, n, p) - z) s
    dx_hat/ds = round(x / s) - x / s inside, n - z or p - z where clipped

  with the gradient of s scaled by 1 / sqrt(count p) (1902.08153, equation 5).
  s is |step|. An asymmetric quantizer learns its offset -z s as well
  (2004.09576); z is rounded, straight through, since products take integers.
  Both begin with what the quantizer's own range rule finds.
  """

  learned: ClassVar[bool] = True

  def leaves(self, found, quantizer, loops=()):
    assert found is not None  # refused by check
    if found.zero_point is None:
      return {'step': found.scale}
    return {'step': found.scale, 'offset': -found.zero_point * found.scale}

  def qparams(self, x, quantizer, leaves, axis):
    step = jnp.maximum(jnp.abs(leaves['step']), TINY)
    if 'offset' not in leaves:
      return QParams(step)
    zero = -leaves['offset'] / step
    zero = _through(zero, jnp.round(zero))
    # The stored type of a zero point is that of a code.
    return QParams(step, jnp.clip(zero, quantizer.grid.min, quantizer.grid.max))

  def simulate(self, x, quantizer, leaves, axis, count):
    x = self.prepare(x, quantizer, axis)
    top = _largest(quantizer, leaves, x.ndim)
    factor = lax.rsqrt(jnp.maximum(jnp.float32(top * count), 1.0))
    steps = {k: _scaled(leaves[k], factor) for k in LEARNED if k in leaves}
    found = self.qparams(x, quantizer, {**leaves, **steps}, axis)
    return _rounded(x, quantizer, found, leaves, axis)


def _largest(quantizer: Quantizer, leaves: Leaves, ndim: int) -> Any:
  """The largest code value, of traced widths if there are some."""
  bits = leaves.get('bits')
  return snap.bounds(quantizer.grid, bits, ndim)[1]


@dataclasses.dataclass(frozen=True)
class pact(Estimator):
  """Learned clipping of activations (arXiv 1805.06085, equations 1 to 3).

    y = clip(x, 0, alpha),  x_hat = round(y p / alpha) alpha / p
    dx_hat/dalpha = 1 where x >= alpha, else 0

  A signed quantizer clips at -alpha too. alpha begins at the calibrated range.
  """

  learned: ClassVar[bool] = True

  def check(self, role, quantizer, where):
    super().check(role, quantizer, where)
    if role == 'weight':
      raise ValueError(
        f'pact() is for activations, not the weight of {where}; give it lsq() '
        "or dorefa(): {'weight': dorefa(), 'input': pact()}"
      )
    if not quantizer.symmetric:
      raise ValueError(
        f'pact() clips at one learned alpha, but {quantizer!r} of the {role} '
        f'of {where} has a zero point; use an unsigned or symmetric format, or '
        'lsq()'
      )

  def leaves(self, found, quantizer, loops=()):
    assert found is not None  # refused by check
    return {'alpha': found.scale * quantizer.grid.max}

  def qparams(self, x, quantizer, leaves, axis):
    alpha = jnp.maximum(jnp.abs(leaves['alpha']), TINY)
    return QParams(alpha / _largest(quantizer, leaves, alpha.ndim))

  def simulate(self, x, quantizer, leaves, axis, count):
    x = self.prepare(x, quantizer, axis)
    found = _constants(self.qparams(x, quantizer, leaves, axis))
    units = Units.of(x.shape, quantizer, axis)
    alpha = units.expand(jnp.abs(leaves['alpha']))
    split = units.split(x.astype(jnp.float32))
    y = jnp.where(split >= alpha, alpha, split)
    low = -alpha if quantizer.format.signed else jnp.zeros_like(alpha)
    y = units.merge(jnp.where(split <= low, low, y)).astype(x.dtype)
    return _through(y, _rounded(y, quantizer, found, leaves, axis))


@dataclasses.dataclass(frozen=True)
class dorefa(Estimator):
  """Weights through tanh (arXiv 1606.06160, equation 9).

    t = tanh(w) / max |tanh(w)|,  x_hat = Q(t) std(w)

  The paper's levels, 2 round((2^b - 1) (t / 2 + 1 / 2)) / (2^b - 1) - 1, are
  those of `ql.odd(b)`. It multiplies by nothing and leaves the rest to a
  BatchNorm; std(w), a constant to the gradient, serves models without one.
  """

  def check(self, role, quantizer, where):
    super().check(role, quantizer, where)
    if role != 'weight':
      raise ValueError(
        f'dorefa() is for weights, not the {role} of {where}; give it pact(): '
        f"{{'weight': dorefa(), '{role}': pact()}}"
      )
    if quantizer.scale.direct or not quantizer.symmetric:
      raise ValueError(
        f'dorefa() takes a symmetric format with absmax() ranges, such as '
        f'ql.odd(2), not {quantizer!r} of {where}'
      )

  def prepare(self, x, quantizer, axis):
    t = jnp.tanh(x)
    units = Units.of(x.shape, quantizer, axis)

    def each(stat, v):
      return units.expand(units.squeeze(stat(v)))

    split = units.split(lax.stop_gradient(x))
    top = each(
      lambda v: jnp.max(jnp.abs(v), axis=units.reduce, keepdims=True),
      jnp.tanh(split),
    )
    spread = each(lambda v: jnp.std(v, axis=units.reduce, keepdims=True), split)
    factor = spread / jnp.maximum(top, TINY)
    return units.merge(units.split(t) * factor).astype(x.dtype)


@jax.custom_vjp
def _bent(x: Array, residual: Array, delta: float) -> Array:
  """x, whose gradient g becomes g (1 + delta sign(g) residual)."""
  return x


def _bent_forward(x, residual, delta):
  return x, (residual, delta)


def _bent_backward(kept, g):
  residual, delta = kept
  bent = g * (1 + delta * jnp.sign(g) * residual).astype(g.dtype)
  return bent, jnp.zeros_like(residual), 0.0


_bent.defvjp(_bent_forward, _bent_backward)


class _Around(Estimator):
  """An estimator around another, whose ranges and leaves are its own."""

  inner: Estimator

  def __post_init__(self):
    if not isinstance(self.inner, Estimator):  # such as a class
      raise TypeError(
        f'{type(self).__name__} takes an estimator such as lsq(), found '
        f'{self.inner!r}'
      )

  @property
  def learned(self) -> bool:  # type: ignore[override]
    return self.inner.learned

  def check(self, role, quantizer, where):
    self.inner.check(role, quantizer, where)

  def leaves(self, found, quantizer, loops=()):
    return self.inner.leaves(found, quantizer, loops)

  def prepare(self, x, quantizer, axis):
    return self.inner.prepare(x, quantizer, axis)

  def qparams(self, x, quantizer, leaves, axis):
    return self.inner.qparams(x, quantizer, leaves, axis)


@dataclasses.dataclass(frozen=True)
class ewgs(_Around):
  """Element-wise gradient scaling around another estimator.

    g_x = g (1 + delta sign(g) (v - round(v))),  v = x / s

  pulls values towards their level where the gradient agrees (arXiv
  2104.00903, equation 4; there v spans [0, 1], here steps, so that delta is
  2^b - 1 times the paper's).

  Attributes:
    delta: the strength; 0 is the inner estimator.
    inner: what it is put around; its ranges are learned or not.
  """

  delta: float = 0.2
  inner: Estimator = dataclasses.field(default_factory=lsq)

  def __post_init__(self):
    super().__post_init__()
    if not self.delta >= 0:
      raise ValueError(f'ewgs takes delta >= 0, found {self.delta!r}')

  def check(self, role, quantizer, where):
    super().check(role, quantizer, where)
    if not quantizer.format.is_integer:
      raise ValueError(
        f'ewgs() measures rounding errors in steps of a uniform format, '
        f'{quantizer!r} of {where} has none; use {self.inner!r} alone'
      )

  def simulate(self, x, quantizer, leaves, axis, count):
    fixed = lax.stop_gradient(self.prepare(x, quantizer, axis))
    found = _constants(self.qparams(fixed, quantizer, leaves, axis))
    x_hat = _rounded(fixed, quantizer, found, leaves, axis)
    units = Units.of(x.shape, quantizer, axis)
    error = units.split((fixed - x_hat).astype(jnp.float32))
    residual = units.merge(error * units.expand(found.inverse))
    x = _bent(x, residual.astype(x.dtype), self.delta)
    return self.inner.simulate(x, quantizer, leaves, axis, count)


@dataclasses.dataclass(frozen=True)
class warm_up(_Around):
  """Quantization that sets in gradually: x + strength (Q(x) - x).

  The leaf 'strength', from 0 to 1, is state: `ql.set_leaves(variables,
  'strength', value)` moves it. With `ste` this is the lambda warm-up of
  BitNet b1.58 Reloaded (arXiv 2407.09527). A model is frozen at 1.

  Attributes:
    inner: what sets in.
  """

  inner: Estimator = dataclasses.field(default_factory=ste)

  def leaves(self, found, quantizer, loops=()):
    inner = super().leaves(found, quantizer, loops)
    return {**inner, 'strength': jnp.zeros((*loops, 1, 1))}

  def simulate(self, x, quantizer, leaves, axis, count):
    x_hat = self.inner.simulate(x, quantizer, leaves, axis, count)
    strength = lax.stop_gradient(leaves['strength'])
    blended = x + strength.astype(x.dtype) * (x_hat - x)
    return jnp.where(strength == 1, x_hat, blended)
