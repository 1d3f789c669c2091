"""MobileNetV1 x0.25 of MLPerf Tiny (visual wake words, 96x96): depthwise.

A. Howard et al., arXiv 1704.04861; C. Banbury et al., arXiv 2106.07597.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.models import layers

EPSILON = 1e-3
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def preprocess(x: np.ndarray) -> np.ndarray:
  """uint8 images (b, 32, 32, 3) -> float32 in 0..1 (b, 96, 96, 3), bilinear.

  No labelled image of the model's own set can be had, so it is fed CIFAR
  images three times as large, and judged by its agreement with the float model.
  """
  x = x.astype(np.float32) / 255
  rows, columns = (_bilinear(n, 3 * n) for n in x.shape[1:3])
  x = np.moveaxis(np.tensordot(rows, x, (1, 1)), 0, 1)
  return np.moveaxis(np.tensordot(columns, x, (1, 2)), 0, 2)


def _bilinear(n: int, m: int) -> np.ndarray:
  """The (m, n) matrix that resizes n samples to m, pixel centres aligned."""
  position = (np.arange(m) + 0.5) * n / m - 0.5
  weight = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(n)))
  # Beyond the outermost centres only one sample has weight: it counts whole.
  return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def _norm_relu(p: layers.Params, x: jax.Array) -> jax.Array:
  return jax.nn.relu(layers.batch_norm(p, x, epsilon=EPSILON))


def _block(p: Mapping[str, Any], x: jax.Array, stride: int) -> jax.Array:
  """Depthwise 3x3, then pointwise 1x1."""
  groups = x.shape[-1]
  y = layers.conv(p['depthwise'], x, stride=stride, groups=groups)
  y = _norm_relu(p['bn1'], y)
  return _norm_relu(p['bn2'], layers.conv(p['pointwise'], y))


def apply(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
  """Logits (b, 2) of images x (b, 96, 96, 3) in 0..1."""
  stem = params['stem']
  x = _norm_relu(stem['bn'], layers.conv(stem['conv'], x, stride=2))
  for block, stride in zip(params['blocks'], STRIDES, strict=True):
    x = _block(block, x, stride)
  return layers.dense(params['head'], x.mean((1, 2)))


def from_flat(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested parameters of the flat checkpoint (Keras names)."""

  def numbered(name: str, i: int) -> str:
    return f'{name}_{i}' if i else name

  def array(name: str) -> jax.Array:
    return jnp.asarray(flat[name], jnp.float32)

  def linear(name: str) -> dict[str, jax.Array]:
    return {k: array(f'{name}.{k}') for k in ('kernel', 'bias')}

  def depthwise(i: int) -> dict[str, jax.Array]:
    name = numbered('depthwise_conv2d', i)
    kernel = array(f'{name}.depthwise_kernel')  # (3, 3, c, 1)
    # HWIO of a grouped convolution: one input channel a group.
    kernel = kernel.reshape(*kernel.shape[:2], 1, -1)
    return {'kernel': kernel, 'bias': array(f'{name}.bias')}

  def bn(i: int) -> dict[str, jax.Array]:
    name = numbered('batch_normalization', i)
    stored = ('gamma', 'beta', 'moving_mean', 'moving_variance')
    ours = ('scale', 'bias', 'mean', 'var')
    return {k: array(f'{name}.{s}') for k, s in zip(ours, stored, strict=True)}

  return {
    'stem': {'conv': linear('conv2d'), 'bn': bn(0)},
    'blocks': [
      {
        'depthwise': depthwise(i),
        'bn1': bn(2 * i + 1),
        'pointwise': linear(numbered('conv2d', i + 1)),
        'bn2': bn(2 * i + 2),
      }
      for i in range(len(STRIDES))
    ],
    'head': linear('dense'),
  }
