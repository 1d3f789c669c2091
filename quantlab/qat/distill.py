"""Losses that hold a quantized student to its float teacher.

All are means over whatever leads: batch, tokens. The teacher is a constant to
the gradient. Masked logits may be -inf, in both networks alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def kd(
  student: Float[Array, '*b v'],
  teacher: Float[Array, '*b v'],
  *,
  temperature: float = 1.0,
) -> Float[Array, '']:
  """T^2 KL(teacher || student) of logits at temperature T.

  T^2 keeps the size of the gradient (G. Hinton et al., arXiv 1503.02531).
  """
  _check(student, teacher, temperature)
  t, s = _log_probabilities(student, teacher, temperature)
  return temperature**2 * jnp.mean(_kl(t, s))


def quantized_distillation(
  student: Float[Array, '*b v'],
  labels: Int[Array, '*b'],
  teacher: Float[Array, '*b v'],
  *,
  mix: float = 0.3,
  temperature: float = 4.0,
) -> Float[Array, '']:
  """Labels and teacher: mix CE(student, labels) + (1 - mix) kd(...).

  With a student that `ql.qat` simulates this is the quantized distillation of
  arXiv 1802.05668, section 3: the gradient is that at quantized weights, and
  moves the float ones.
  """
  if not 0 <= mix <= 1:
    raise ValueError(f'mix is the part of the labels, 0 to 1, found {mix=}')
  log_p = jax.nn.log_softmax(student)
  right = jnp.take_along_axis(log_p, labels[..., None], -1)
  distilled = kd(student, teacher, temperature=temperature)
  return -mix * jnp.mean(right) + (1 - mix) * distilled


def top_k_kd(
  student: Float[Array, '*b v'],
  teacher: Float[Array, '*b v'],
  k: int,
  *,
  top: str = 'reverse',
  tail: str = 'forward',
  temperature: float = 1.0,
) -> Float[Array, '']:
  """TopKLD: the teacher's k likeliest entries and the rest, apart.

    KL(top k, renormalized) + KL(the rest, renormalized) + KL(their masses)

  The rest counts as much as the top, however small its mass, and each has its
  own direction: 'forward' is KL(teacher || student). It is zero only where
  the distributions are equal; with k = v it is one KL.

  Which direction goes where is our choice of two (the idea is that of arXiv
  2501.06218); the masses are added so that equality is the only minimum.

  Raises:
    ValueError: k is not in 1 .. v, or a direction is unknown.
  """
  _check(student, teacher, temperature)
  v = student.shape[-1]
  if not 1 <= k <= v:
    raise ValueError(f'k takes 1 to the number of logits, {v}; found {k=}')
  for word in (top, tail):
    if word not in ('forward', 'reverse'):
      raise ValueError(f"a direction is 'forward' or 'reverse', found {word!r}")
  t, s = _log_probabilities(student, teacher, temperature)
  least = lax.top_k(t, k)[0][..., -1:]
  # Of entries equal to the k-th, the first ones: exactly k are chosen.
  above, equal = t > least, t == least
  spare = k - jnp.sum(above, -1, keepdims=True)
  chosen = above | (equal & (jnp.cumsum(equal, -1) <= spare))
  loss, masses = jnp.zeros(t.shape[:-1]), []
  for inside, direction in ((chosen, top), (~chosen, tail)):
    parts = [jnp.where(inside, x, -jnp.inf) for x in (t, s)]
    mass = [_log_sum(x) for x in parts]
    a, b = (
      x - jnp.where(jnp.isfinite(m), m, 0)
      for x, m in zip(parts, mass, strict=True)
    )
    loss += _kl(a, b) if direction == 'forward' else _kl(b, a)
    masses.append(mass)
  split_t, split_s = (
    jnp.concatenate([m[i] for m in masses], -1) for i in (0, 1)
  )
  loss += _kl(split_t, split_s)
  return temperature**2 * jnp.mean(loss)


def feature_mse(
  student: Float[Array, '*s'], teacher: Float[Array, '*s']
) -> Float[Array, '']:
  """Squared distance of features in units of the teacher's mean square."""
  if student.shape != teacher.shape:
    raise ValueError(
      f'features of shapes {student.shape} and {teacher.shape}; project the '
      "student's, or compare token_gram, which takes other widths"
    )
  teacher = lax.stop_gradient(teacher)
  scale = jnp.maximum(jnp.mean(jnp.square(teacher)), jnp.float32(1e-12))
  return jnp.mean(jnp.square(student - teacher)) / scale


def token_gram(
  student: Float[Array, '*b t d'], teacher: Float[Array, '*b t e']
) -> Float[Array, '']:
  """Squared distance of the tokens' cosine similarities, token by token.

  The manifold of patches of arXiv 2107.01378, equation 2: relations between
  tokens are learned, and the widths d and e may differ.
  """
  if student.shape[:-1] != teacher.shape[:-1]:
    raise ValueError(
      'the tokens of student and teacher differ: features of shapes '
      f'{student.shape} and {teacher.shape}'
    )
  a, b = _gram(student), _gram(lax.stop_gradient(teacher))
  return jnp.mean(jnp.square(a - b))


def _gram(x: Array) -> Array:
  norm = jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)
  unit = x / norm
  return unit @ jnp.swapaxes(unit, -1, -2)


def _log_probabilities(student, teacher, temperature):
  """(teacher, student), the teacher a constant."""
  teacher = lax.stop_gradient(teacher)
  return (jax.nn.log_softmax(x / temperature) for x in (teacher, student))


def _log_sum(x: Array) -> Array:
  """Log-sum-exp along the last axis, kept; -inf of nothing, safely."""
  top = lax.stop_gradient(jnp.max(x, -1, keepdims=True))
  top = jnp.where(jnp.isfinite(top), top, 0)
  total = jnp.sum(jnp.exp(x - top), -1, keepdims=True)
  some = total > 0
  return jnp.where(some, jnp.log(jnp.where(some, total, 1)) + top, -jnp.inf)


def _kl(a: Array, b: Array) -> Array:
  """KL(a || b) of log-probabilities along the last axis; where a is -inf, 0."""
  some = jnp.isfinite(a)
  a, b = jnp.where(some, a, 0), jnp.where(some, b, 0)
  return jnp.sum(jnp.where(some, jnp.exp(a) * (a - b), 0), -1)


def _check(student, teacher, temperature):
  if student.shape != teacher.shape:
    raise ValueError(
      f'logits of shapes {student.shape} (student) and {teacher.shape} '
      '(teacher)'
    )
  if not temperature > 0:
    raise ValueError(f'the temperature is positive, found {temperature=}')
