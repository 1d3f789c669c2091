"""BERT encoder as a sentence embedder (MiniLM): post-norm, padding mask.

J. Devlin et al., arXiv 1810.04805; pooling as in N. Reimers and I. Gurevych,
arXiv 1908.10084. Nothing is shaped by a module system: the parameters are
nested dicts and the encoder is a function of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.models import layers

EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of an encoder. `heads` is the one that no parameter's shape tells."""

  vocab: int = 30522
  positions: int = 512
  dim: int = 384
  hidden: int = 1536
  blocks: int = 6
  heads: int = 12


MINILM = Config()


def _attention(
  p: Mapping[str, Any], x: jax.Array, mask: jax.Array, heads: int
) -> jax.Array:
  q, k, v = (
    layers.split_heads(layers.dense(p[name], x), heads)
    for name in ('query', 'key', 'value')
  )
  y = layers.attention(q, k, v, mask[:, None, None, :])
  return layers.dense(p['out'], layers.merge_heads(y))


def _mlp(p: Mapping[str, Any], x: jax.Array) -> jax.Array:
  y = jax.nn.gelu(layers.dense(p['up'], x), approximate=False)
  return layers.dense(p['down'], y)


def encode(
  params: Mapping[str, Any],
  ids: jax.Array,
  mask: jax.Array,
  *,
  config: Config = MINILM,
) -> jax.Array:
  """Hidden states (b, t, d) of token ids (b, t); `mask` marks real tokens."""
  embed = params['embed']
  x = embed['word'][ids] + embed['position'][: ids.shape[1]]
  # Sentences of a single segment: its type vector is the first of the table.
  x = layers.layer_norm(embed['norm'], x + embed['type'][0], epsilon=EPSILON)
  for block in params['blocks']:
    y = _attention(block['attention'], x, mask, config.heads)
    x = layers.layer_norm(block['attention_norm'], x + y, epsilon=EPSILON)
    y = _mlp(block['mlp'], x)
    x = layers.layer_norm(block['mlp_norm'], x + y, epsilon=EPSILON)
  return x


def apply(
  params: Mapping[str, Any],
  ids: jax.Array,
  mask: jax.Array,
  *,
  config: Config = MINILM,
) -> jax.Array:
  """Unit-length sentence embeddings (..., d): mean over the real tokens.

  Args:
    params: nested parameters, as `from_flat` or `init` gives them.
    ids: token ids (..., t); leading axes beyond one (pairs of sentences) are
      flattened for the encoder and come back in the result.
    mask: true at real tokens (..., t).
    config: sizes of the encoder.
  """
  *lead, t = ids.shape
  mask = mask.reshape(-1, t)
  x = encode(params, ids.reshape(-1, t), mask, config=config)
  real = mask[..., None]
  pooled = (x * real).sum(1) / real.sum(1)
  unit = pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)
  return unit.reshape(*lead, -1)


def from_flat(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested float32 parameters of a flat checkpoint with BERT's names."""

  def array(name: str) -> jax.Array:
    return jnp.asarray(flat[name], jnp.float32)

  def linear(name: str) -> dict[str, jax.Array]:
    return {'kernel': array(f'{name}.weight'), 'bias': array(f'{name}.bias')}

  def norm(name: str) -> dict[str, jax.Array]:
    name = f'{name}.LayerNorm'
    return {'scale': array(f'{name}.weight'), 'bias': array(f'{name}.bias')}

  def block(name: str) -> dict[str, Any]:
    return {
      'attention': {
        **{
          k: linear(f'{name}.attention.self.{k}')
          for k in ('query', 'key', 'value')
        },
        'out': linear(f'{name}.attention.output.dense'),
      },
      'attention_norm': norm(f'{name}.attention.output'),
      'mlp': {
        'up': linear(f'{name}.intermediate.dense'),
        'down': linear(f'{name}.output.dense'),
      },
      'mlp_norm': norm(f'{name}.output'),
    }

  blocks = sum(k.endswith('.intermediate.dense.weight') for k in flat)
  return {
    'embed': {
      'word': array('embeddings.word_embeddings.weight'),
      'position': array('embeddings.position_embeddings.weight'),
      'type': array('embeddings.token_type_embeddings.weight'),
      'norm': norm('embeddings'),
    },
    'blocks': [block(f'encoder.layer.{i}') for i in range(blocks)],
  }


def init(key: jax.Array, config: Config) -> dict[str, Any]:
  """Random parameters (normal, 0.02, as BERT's own) of any size."""
  keys = iter(jax.random.split(key, 3 + 6 * config.blocks))

  def normal(*shape: int) -> jax.Array:
    return 0.02 * jax.random.normal(next(keys), shape)

  def linear(i: int, o: int) -> dict[str, jax.Array]:
    return {'kernel': normal(i, o), 'bias': jnp.zeros(o)}

  def norm() -> dict[str, jax.Array]:
    return {'scale': jnp.ones(config.dim), 'bias': jnp.zeros(config.dim)}

  d, h = config.dim, config.hidden
  return {
    'embed': {
      'word': normal(config.vocab, d),
      'position': normal(config.positions, d),
      'type': normal(2, d),
      'norm': norm(),
    },
    'blocks': [
      {
        'attention': {
          name: linear(d, d) for name in ('query', 'key', 'value', 'out')
        },
        'attention_norm': norm(),
        'mlp': {'up': linear(d, h), 'down': linear(h, d)},
        'mlp_norm': norm(),
      }
      for _ in range(config.blocks)
    ],
  }
