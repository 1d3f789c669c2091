"""Building blocks of the bare-JAX models: functions of nested parameters.

Every parameter group is a dict: `{'kernel', 'bias'}` of a linear map or a
convolution (NHWC activations, HWIO kernels), `{'scale', 'bias'}` of a norm,
`{'scale', 'bias', 'mean', 'var'}` of a BatchNorm at inference.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Params = Mapping[str, jax.Array]


def dense(p: Params, x: jax.Array) -> jax.Array:
  """The linear map x @ kernel (+ bias); x: (..., k), kernel: (k, n)."""
  y = x @ p['kernel']
  return y + p['bias'] if 'bias' in p else y


def conv(
  p: Params,
  x: jax.Array,
  *,
  stride: int = 1,
  padding: str | Sequence[tuple[int, int]] = 'SAME',
  groups: int = 1,
) -> jax.Array:
  """Convolution (+ bias) of x (b, h, w, i) and kernel (kh, kw, i/groups, o)."""
  y = lax.conv_general_dilated(
    x,
    p['kernel'],
    (stride, stride),
    padding,
    feature_group_count=groups,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  return y + p['bias'] if 'bias' in p else y


def batch_norm(p: Params, x: jax.Array, *, epsilon: float) -> jax.Array:
  """(x - mean) scale / sqrt(var + epsilon) + bias, with running statistics."""
  gain = p['scale'] * lax.rsqrt(p['var'] + epsilon)
  return (x - p['mean']) * gain + p['bias']


def batch_norm_live(
  p: Params,
  x: jax.Array,
  live: jax.Array | bool = True,
  *,
  epsilon: float,
  momentum: float = 0.9,
) -> tuple[jax.Array, Params]:
  """The same with the statistics of x itself (b, ..., c), as in training.

  Where `live` is false it is `batch_norm`; a traced one chooses at run time.

  Returns:
    What it gives, and the parameters with running statistics that moved by
    1 - momentum towards those of x (variances without bias).
  """
  axes = tuple(range(x.ndim - 1))
  mean, var = x.mean(axes), x.var(axes)
  # Of the statistics, not of the layers: XLA's CPU convolutions are an order
  # of magnitude slower within a conditional.
  used = {
    k: jnp.where(live, v, p[k]) for k, v in (('mean', mean), ('var', var))
  }
  y = batch_norm({**p, **used}, x, epsilon=epsilon)
  count = x.size // x.shape[-1]
  seen = {'mean': mean, 'var': var * (count / max(count - 1, 1))}
  moved = {
    k: lax.stop_gradient(
      jnp.where(live, momentum * p[k] + (1 - momentum) * v, p[k])
    )
    for k, v in seen.items()
  }
  return y, {**p, **moved}


def layer_norm(p: Params, x: jax.Array, *, epsilon: float) -> jax.Array:
  """Normalisation to zero mean and unit variance over the last axis."""
  mean = x.mean(-1, keepdims=True)
  variance = jnp.square(x - mean).mean(-1, keepdims=True)
  return (x - mean) * lax.rsqrt(variance + epsilon) * p['scale'] + p['bias']


def rms_norm(p: Params, x: jax.Array, *, epsilon: float) -> jax.Array:
  """The gain times x / sqrt(mean(x^2) + epsilon), over the last axis."""
  power = jnp.square(x).mean(-1, keepdims=True)
  return x * lax.rsqrt(power + epsilon) * p['scale']


def split_heads(x: jax.Array, heads: int) -> jax.Array:
  """(b, t, heads * d) -> (b, t, heads, d)."""
  return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: jax.Array) -> jax.Array:
  """(b, t, heads, d) -> (b, t, heads * d)."""
  return x.reshape(*x.shape[:-2], -1)


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
  """softmax(q k / sqrt(d)) v over the positions that `mask` lets through.

  Args:
    q: queries (b, t, heads, d).
    k: keys (b, s, heads, d).
    v: values (b, s, heads, d).
    mask: boolean, broadcastable to (b, heads, t, s).

  Returns:
    (b, t, heads, d).
  """
  scores = jnp.einsum('bthd,bshd->bhts', q, k) / q.shape[-1] ** 0.5
  # A large finite value: a row with nothing to attend to stays free of NaN.
  weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
  return jnp.einsum('bhts,bshd->bthd', weights, v)
