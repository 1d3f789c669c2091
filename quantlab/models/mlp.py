"""A multilayer perceptron: with biases, or as BitNet has it, with norms.

With `norm` every layer normalises its input to unit mean square, without a
gain (arXiv 2407.09527), and there are no biases.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from quantlab.models import layers

EPSILON = 1e-5


def init(
  key: jax.Array, widths: Sequence[int], *, norm: bool = False
) -> dict[str, Any]:
  """He-initialised layers; `widths` go from inputs to classes."""
  keys = jax.random.split(key, len(widths) - 1)
  params: dict[str, Any] = {}
  for n, (k, i, o) in enumerate(zip(keys, widths, widths[1:], strict=False)):
    kernel = jax.random.normal(k, (i, o)) * (2 / i) ** 0.5
    params[f'layer_{n}'] = {'kernel': kernel}
    if not norm:
      params[f'layer_{n}']['bias'] = jnp.zeros(o)
  return params


def apply(
  params: Mapping[str, Any], x: jax.Array, *, norm: bool = False
) -> jax.Array:
  """Logits (b, classes) of images x (b, h, w, c) or features (b, k)."""
  x = x.reshape(len(x), -1)
  for n in range(len(params)):
    x = jax.nn.relu(x) if n else x
    if norm:
      power = jnp.square(x).mean(-1, keepdims=True)
      x = x * lax.rsqrt(power + EPSILON)
    x = layers.dense(params[f'layer_{n}'], x)
  return x
