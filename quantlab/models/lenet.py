"""LeNet-5 for MNIST: two valid convolutions with max pooling, three dense.

Y. LeCun et al., Gradient-based learning applied to document recognition, 1998.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantlab.models import layers


def preprocess(x: np.ndarray) -> np.ndarray:
  """uint8 images (b, 28, 28) -> float32 (b, 28, 28, 1), normalised."""
  return ((x.astype(np.float32) / 255 - 0.1307) / 0.3081)[..., None]


def _max_pool(x: jax.Array) -> jax.Array:
  window = (1, 2, 2, 1)
  return lax.reduce_window(x, -jnp.inf, lax.max, window, window, 'VALID')


def apply(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
  """Logits (b, 10) of normalised images x (b, 28, 28, 1)."""
  for name in ('conv0', 'conv1'):
    x = _max_pool(jax.nn.relu(layers.conv(params[name], x, padding='VALID')))
  x = x.reshape(len(x), -1)
  for name in ('fc0', 'fc1'):
    x = jax.nn.relu(layers.dense(params[name], x))
  return layers.dense(params['fc2'], x)


def from_flat(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested parameters of the flat checkpoint."""
  return {
    name: {
      'kernel': jnp.asarray(flat[f'{name}.w'], jnp.float32),
      'bias': jnp.asarray(flat[f'{name}.b'], jnp.float32),
    }
    for name in ('conv0', 'conv1', 'fc0', 'fc1', 'fc2')
  }
