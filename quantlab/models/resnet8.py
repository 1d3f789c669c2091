"""ResNet-8 of MLPerf Tiny (CIFAR-10): biased convolutions, 1x1 shortcuts.

C. Banbury et al., MLPerf Tiny Benchmark, arXiv 2106.07597.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.models import layers

EPSILON = 1e-3


def preprocess(x: np.ndarray) -> np.ndarray:
  """uint8 images (b, 32, 32, 3) -> float32 in 0..255, not normalised."""
  return x.astype(np.float32)


def _norm(p: layers.Params, x: jax.Array) -> jax.Array:
  return layers.batch_norm(p, x, epsilon=EPSILON)


def _block(p: Mapping[str, Any], x: jax.Array) -> jax.Array:
  """A basic block; one with a `shortcut` halves the resolution."""
  stride = 2 if 'shortcut' in p else 1
  y = jax.nn.relu(_norm(p['bn1'], layers.conv(p['conv1'], x, stride=stride)))
  y = _norm(p['bn2'], layers.conv(p['conv2'], y))
  if 'shortcut' in p:
    x = layers.conv(p['shortcut'], x, stride=stride)
  return jax.nn.relu(x + y)


def apply(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
  """Logits (b, 10) of images x (b, 32, 32, 3) in 0..255."""
  stem = params['stem']
  x = jax.nn.relu(_norm(stem['bn'], layers.conv(stem['conv'], x)))
  for block in params['blocks']:
    x = _block(block, x)
  return layers.dense(params['head'], x.mean((1, 2)))


def from_flat(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested parameters of the flat checkpoint (layers numbered as in Keras)."""

  def linear(name: str) -> dict[str, jax.Array]:
    return {
      k: jnp.asarray(flat[f'{name}.{k}'], jnp.float32)
      for k in ('kernel', 'bias')
    }

  def bn(name: str) -> dict[str, jax.Array]:
    stored = ('gamma', 'beta', 'mean', 'var')
    ours = ('scale', 'bias', 'mean', 'var')
    return {
      k: jnp.asarray(flat[f'{name}.{s}'], jnp.float32)
      for k, s in zip(ours, stored, strict=True)
    }

  def block(convs: tuple[int, int], norms: tuple[int, int]) -> dict[str, Any]:
    return {
      'conv1': linear(f'conv{convs[0]}'),
      'bn1': bn(f'bn{norms[0]}'),
      'conv2': linear(f'conv{convs[1]}'),
      'bn2': bn(f'bn{norms[1]}'),
    }

  return {
    'stem': {'conv': linear('conv0'), 'bn': bn('bn0')},
    'blocks': [
      block((1, 2), (1, 2)),
      {**block((3, 4), (3, 4)), 'shortcut': linear('conv5')},
      {**block((6, 7), (5, 6)), 'shortcut': linear('conv8')},
    ],
    'head': linear('dense'),
  }
