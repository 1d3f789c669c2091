"""Networks for ternary weights: a norm directly before every product.

BitNet b1.58 (S. Ma et al., arXiv 2402.17764) puts the norm inside the
quantized linear layer, before its activations are quantized: the pre-norms of
a Llama stand there already, and SubLN (H. Wang et al., arXiv 2210.06423) adds
those before the two output projections. `language_model` is therefore a
`llama.Config`; `llama.init`, `apply` and `step` run it. "BitNet b1.58
Reloaded" (J. Nielsen and P. Schneider-Kamp, arXiv 2407.09527) trains small
language and vision models so: `vit_*` here, and `mlp` with its norms.

What is quantized is the recipe's matter; there are no biases.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from quantlab.models import layers, llama


def language_model(
  vocab: int, dim: int, blocks: int, heads: int = 4, **fields: Any
) -> llama.Config:
  """A decoder with SubLN and an output matrix of its own.

  The MLP is 8/3 as wide as the stream, in multiples of 32, so that its
  three matrices weigh as much as the customary two of four times the width.

  Args:
    vocab: tokens.
    dim: width of the residual stream.
    blocks: attention and MLP blocks.
    heads: of queries, keys and values.
    **fields: of `llama.Config`, in the place of these choices.
  """
  chosen = {
    'hidden': -(-8 * dim // 96) * 32,
    'kv_heads': heads,
    'tied': False,
    'sub_norm': True,
  }
  return llama.Config(
    vocab=vocab, dim=dim, blocks=blocks, heads=heads, **(chosen | fields)
  )


def count(params: Any) -> int:
  """Numbers in a tree of arrays or shapes."""
  return sum(x.size for x in jax.tree.leaves(params))


def vit_init(
  key: jax.Array, config: llama.Config, shape: Sequence[int], patch: int
) -> dict[str, Any]:
  """A vision transformer of the blocks of a language model.

  Args:
    key: of the draw.
    config: `language_model(classes, ...)`: its vocabulary are the classes.
    shape: of an image, (h, w, c).
    patch: pixels a side of a patch; it divides h and w.
  """
  h, w, c = shape
  if h % patch or w % patch:
    raise ValueError(f'{patch=} must divide the sides of {shape=}.')
  params = llama.init(key, config)
  inputs = patch * patch * c
  del params['embed']
  params['patches'] = {
    'kernel': jax.random.normal(key, (inputs, config.dim)) * inputs**-0.5
  }
  tokens = (h // patch) * (w // patch)
  places = jax.random.normal(jax.random.fold_in(key, 1), (tokens, config.dim))
  params['position'] = 0.5 * places
  return params


def vit_apply(
  params: Mapping[str, Any],
  x: jax.Array,
  *,
  config: llama.Config,
  patch: int,
) -> jax.Array:
  """Logits (b, classes) of images x (b, h, w, c); tokens are averaged."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)
  x = x.reshape(b, (h // patch) * (w // patch), patch * patch * c)
  x = layers.dense(params['patches'], x) + params['position']
  t, d = x.shape[1], config.dim // config.heads
  angles = jnp.zeros((t, d // 2))  # places are learned, not turned
  mask = jnp.ones((t, t), bool)
  x, _ = llama.through(
    lambda p, x: llama.block(p, x, angles, mask, config), params['blocks'], x
  )
  x = layers.rms_norm(params['norm'], x.mean(1), epsilon=config.epsilon)
  return layers.dense(params['head'], x)
