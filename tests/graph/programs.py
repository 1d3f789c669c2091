"""The programs on which blocks and pairs are shown right: small, random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantlab.core.tree import named_leaves
from quantlab.models import (
  bert,
  llama,
  mobilenet_v1,
  resnet_cifar,
  transformer,
  unet,
)


class Program(NamedTuple):
  apply: Callable[..., Any]
  params: Any
  args: tuple[Any, ...]


class Random:
  """Random arrays of a given size; the same ones for the same seed."""

  def __init__(self, seed: int = 0):
    self.rng = np.random.default_rng(seed)

  def __call__(self, *shape: int, scale: float = 0.4) -> jax.Array:
    return jnp.asarray(scale * self.rng.standard_normal(shape), jnp.float32)


def filled(shapes: Any, seed: int = 1) -> Any:
  """Random parameters by name: no gain of one, no bias of zero."""
  rng = np.random.default_rng(seed)

  def fill(path, x):
    name, noise = str(path[-1]), rng.standard_normal(x.shape)
    if 'var' in name:
      y = 1 + 0.1 * np.abs(noise)
    elif 'scale' in name:
      y = 1 + 0.1 * noise
    elif len(x.shape) < 2:
      y = 0.1 * noise
    else:
      y = noise / np.sqrt(np.prod(x.shape[-4:-1]))
    return jnp.asarray(y, x.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def flat(params: Any) -> dict[str, Any]:
  return dict(named_leaves(params))


def unflat(params: Any, leaves: dict[str, Any]) -> Any:
  """`leaves` in the structure of `params`."""
  order = [leaves[path] for path, _ in named_leaves(params)]
  return jax.tree.unflatten(jax.tree.structure(params), order)


def error(got: Any, want: Any) -> float:
  """Largest difference relative to the largest value, over all results."""
  pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
  return max(
    float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max())
    / float(np.abs(np.asarray(b, float)).max() + 1e-30)
    for a, b in pairs
  )


TOKENS = np.arange(10).reshape(2, 5)
KEY = jax.random.key(0)


def linen_transformer(scanned: bool = False, blocks: int = 2) -> Program:
  model = transformer.Transformer(
    vocab=16, dim=8, heads=2, blocks=blocks, context=8, scanned=scanned
  )
  shapes = jax.eval_shape(model.init, KEY, TOKENS)
  return Program(model.apply, filled(shapes), (TOKENS,))


def bare_llama() -> Program:
  config = llama.Config(
    vocab=16, dim=16, hidden=24, blocks=2, heads=4, kv_heads=2
  )

  def apply(params, tokens):
    return llama.apply(params, tokens, config=config)

  shapes = jax.eval_shape(lambda: llama.init(KEY, config))
  return Program(apply, filled(shapes), (TOKENS,))


def masked_bert() -> Program:
  config = bert.Config(
    vocab=16, positions=8, dim=16, hidden=24, blocks=2, heads=4
  )
  mask = np.ones(TOKENS.shape, bool)
  mask[0, 3:] = False

  def apply(params, ids, mask):
    return bert.apply(params, ids, mask, config=config)

  shapes = jax.eval_shape(lambda: bert.init(KEY, config))
  return Program(apply, filled(shapes), (TOKENS, mask))


def cifar_resnet() -> Program:
  shapes = jax.eval_shape(
    lambda: resnet_cifar.init(KEY, blocks=2, widths=(4, 8, 16))
  )
  images = Random()(2, 8, 8, 3, scale=1.0)
  return Program(resnet_cifar.apply, filled(shapes), (images,))


def depthwise_mobilenet() -> Program:
  new = Random(2)

  def conv(size, i, o, groups=1):
    kernel = new(size, size, i // groups, o, scale=2.0)
    bias = new(o, scale=0.1)
    return {'kernel': kernel / np.sqrt(kernel[..., 0].size), 'bias': bias}

  def norm(c):
    return {
      'scale': 1 + new(c, scale=0.1),
      'bias': new(c, scale=0.1),
      'mean': new(c, scale=0.1),
      'var': 1 + abs(new(c)),
    }

  blocks, i = [], 4
  for _ in mobilenet_v1.STRIDES:
    block = {
      'depthwise': conv(3, i, i, groups=i),
      'bn1': norm(i),
      'pointwise': conv(1, i, 6),
      'bn2': norm(6),
    }
    blocks.append(block)
    i = 6
  params = {
    'stem': {'conv': conv(3, 3, 4), 'bn': norm(4)},
    'blocks': blocks,
    'head': {'kernel': new(6, 2), 'bias': new(2)},
  }
  return Program(mobilenet_v1.apply, params, (new(2, 32, 32, 3, scale=1.0),))


def timed_unet() -> Program:
  model = unet.Unet((4, 8), 2)
  args = (Random()(2, 8, 8, 2, scale=1.0), np.array([1.0, 7.0], np.float32))
  shapes = jax.eval_shape(model.init, KEY, *args)
  return Program(model.apply, filled(shapes), args)


class Residual(nn.Module):
  """Convolutions and BatchNorms around a shortcut."""

  width: int
  stride: int = 1

  @nn.compact
  def __call__(self, x):
    def norm():
      return nn.BatchNorm(use_running_average=True)

    y = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(x)
    y = nn.relu(norm()(y))
    y = norm()(nn.Conv(self.width, (3, 3), use_bias=False)(y))
    if x.shape != y.shape:
      x = nn.Conv(self.width, (1, 1), self.stride, use_bias=False)(x)
      x = norm()(x)
    return nn.relu(x + y)


class LinenResnet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), use_bias=False)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
    for width, stride in ((4, 1), (8, 2)):
      x = Residual(width, stride)(x)
    return nn.Dense(3)(x.mean((1, 2)))


def linen_resnet() -> Program:
  args = (Random()(2, 8, 8, 3, scale=1.0),)
  shapes = jax.eval_shape(LinenResnet().init, KEY, *args)
  return Program(LinenResnet().apply, filled(shapes), args)


def rms_norm(gain, x):
  return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain


def mlp(p, x):
  """A pre-norm residual MLP with ReLU: g, w, b, o."""
  y = jax.nn.relu(rms_norm(p['g'], x) @ p['w'] + p['b'])
  return x + y @ p['o']


def mlp_params(new: Random, *stack: int) -> dict[str, jax.Array]:
  return {
    'g': 1 + new(*stack, 8, scale=0.1),
    'w': new(*stack, 8, 6),
    'b': new(*stack, 6),
    'o': new(*stack, 6, 8),
  }


def attention(p, x, y):
  """One head: x (b, t, d) looks at y (b, s, d)."""
  weights = jax.nn.softmax((x @ p['q']) @ (y @ p['k']).mT)
  return weights @ (y @ p['v']) @ p['o']


def attention_params(new: Random, *stack: int) -> dict[str, jax.Array]:
  return {name: new(*stack, 8, 8) for name in 'qkvo'}


MODELS: dict[str, Callable[[], Program]] = {
  'transformer': linen_transformer,
  'scanned': lambda: linen_transformer(scanned=True, blocks=3),
  'llama': bare_llama,
  'bert': masked_bert,
  'resnet': cifar_resnet,
  'linen_resnet': linen_resnet,
  'mobilenet': depthwise_mobilenet,
  'unet': timed_unet,
}
