"""The CIFAR ResNets: ResNet-20/32/44/56 as one function of nested parameters.

Basic blocks, three stages of 16, 32, 64 channels, shortcuts without parameters
(stride-2 slice, zero-padded channels). K. He et al., arXiv 1512.03385, 4.2.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.models import layers

EPSILON = 1e-5
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
# Symmetric padding, also under stride 2, where 'SAME' would pad one side only.
PADDING = ((1, 1), (1, 1))


def preprocess(x: np.ndarray) -> np.ndarray:
  """uint8 images (b, 32, 32, 3) -> float32, normalised by channel."""
  return (x.astype(np.float32) / 255 - MEAN) / STD


def _shortcut(x: jax.Array, stride: int) -> jax.Array:
  """Option A: subsample, and pad half the channels with zeros on each side."""
  if stride == 1:
    return x
  c = x.shape[-1]
  return jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (c // 2, c // 2)))


def _block(p: Mapping[str, Any], x: jax.Array, stride: int, norm) -> jax.Array:
  y = layers.conv(p['conv1'], x, stride=stride, padding=PADDING)
  y = jax.nn.relu(norm(p['bn1'], y))
  y = norm(p['bn2'], layers.conv(p['conv2'], y, padding=PADDING))
  return jax.nn.relu(_shortcut(x, stride) + y)


def _forward(params: Mapping[str, Any], x: jax.Array, norm) -> jax.Array:
  stem = params['stem']
  x = layers.conv(stem['conv'], x, padding=PADDING)
  x = jax.nn.relu(norm(stem['bn'], x))
  for s, stage in enumerate(params['stages']):
    for b, block in enumerate(stage):
      x = _block(block, x, 2 if s > 0 and b == 0 else 1, norm)
  return layers.dense(params['head'], x.mean((1, 2)))


def apply(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
  """Logits (b, 10) of normalised images x (b, 32, 32, 3).

  Args:
    params: `{'stem': {'conv', 'bn'}, 'stages': [[block, ...], ...], 'head'}`
      with block `{'conv1', 'bn1', 'conv2', 'bn2'}`; any number of blocks.
    x: images as `preprocess` gives them.
  """
  return _forward(
    params, x, lambda p, x: layers.batch_norm(p, x, epsilon=EPSILON)
  )


def train_apply(
  params: Mapping[str, Any], x: jax.Array, live: jax.Array | bool = True
) -> tuple[jax.Array, Any]:
  """Logits with the statistics of the batch, and the parameters after it.

  Where `live` is false, a traced one too, all is as in `apply`. The parameters
  differ in the running means and variances alone (momentum 0.9).
  """
  moved: dict[int, Any] = {}

  def norm(p, x):
    y, moved[id(p)] = layers.batch_norm_live(p, x, live, epsilon=EPSILON)
    return y

  logits = _forward(params, x, norm)
  after = jax.tree.map(
    lambda p: moved[id(p)] if _is_norm(p) else p, params, is_leaf=_is_norm
  )
  return logits, after


def _is_norm(p: Any) -> bool:
  return isinstance(p, Mapping) and 'var' in p


def from_flat(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested parameters of a flat checkpoint with PyTorch's names."""

  def bn(name: str) -> dict[str, jax.Array]:
    stored = ('weight', 'bias', 'running_mean', 'running_var')
    ours = ('scale', 'bias', 'mean', 'var')
    return {
      k: jnp.asarray(flat[f'{name}.{s}'], jnp.float32)
      for k, s in zip(ours, stored, strict=True)
    }

  def kernel(name: str) -> dict[str, jax.Array]:
    return {'kernel': jnp.asarray(flat[f'{name}.weight'], jnp.float32)}

  def block(name: str) -> dict[str, Any]:
    return {
      'conv1': kernel(f'{name}.conv1'),
      'bn1': bn(f'{name}.bn1'),
      'conv2': kernel(f'{name}.conv2'),
      'bn2': bn(f'{name}.bn2'),
    }

  depth = sum(k.startswith('layer1.') and 'conv1' in k for k in flat)
  return {
    'stem': {'conv': kernel('conv1'), 'bn': bn('bn1')},
    'stages': [
      [block(f'layer{s}.{b}') for b in range(depth)] for s in (1, 2, 3)
    ],
    'head': {
      **kernel('linear'),
      'bias': jnp.asarray(flat['linear.bias'], jnp.float32),
    },
  }


def init(
  key: jax.Array, *, blocks: int = 3, widths: tuple[int, ...] = (16, 32, 64)
) -> dict[str, Any]:
  """He-initialised parameters: `blocks` a stage (3: ResNet-20, 5: -32)."""
  keys = iter(jax.random.split(key, 2 + 2 * blocks * len(widths)))
  he = jax.nn.initializers.he_normal()

  def conv(i: int, o: int) -> dict[str, jax.Array]:
    return {'kernel': he(next(keys), (3, 3, i, o), jnp.float32)}

  def bn(c: int) -> dict[str, jax.Array]:
    one, zero = jnp.ones(c), jnp.zeros(c)
    return {'scale': one, 'bias': zero, 'mean': zero, 'var': one}

  stages, i = [], widths[0]
  for o in widths:
    stage = []
    for _ in range(blocks):
      stage.append(
        {'conv1': conv(i, o), 'bn1': bn(o), 'conv2': conv(o, o), 'bn2': bn(o)}
      )
      i = o
    stages.append(stage)
  return {
    'stem': {'conv': conv(3, widths[0]), 'bn': bn(widths[0])},
    'stages': stages,
    'head': {
      'kernel': he(next(keys), (widths[-1], 10), jnp.float32),
      'bias': jnp.zeros(10),
    },
  }
