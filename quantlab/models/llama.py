"""Llama in bare JAX: RMSNorm, rotary positions, grouped queries, SwiGLU.

H. Touvron et al., arXiv 2302.13971; RoPE arXiv 2104.09864; GQA arXiv
2305.13245. The output matrix is the embedding, transposed, where it is tied.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantlab.models import layers


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of a Llama. The defaults are stories260K's.

  Untied models hold their output matrix under 'head/kernel' (dim, vocab).
  """

  vocab: int = 512
  dim: int = 64
  hidden: int = 172
  blocks: int = 5
  heads: int = 8
  kv_heads: int = 4
  theta: float = 10000.0
  epsilon: float = 1e-5
  tied: bool = True

  def __post_init__(self):
    if self.dim % self.heads or self.heads % self.kv_heads:
      raise ValueError(
        'heads must divide dim, and kv_heads must divide heads; got '
        f'dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}.'
      )


STORIES260K = Config()


# Keys and values (b, length, kv_heads, d) of each block.
Cache = Sequence[Mapping[str, jax.Array]]


def rope_angles(
  t: int, d: int, theta: float, start: jax.Array | int = 0
) -> jax.Array:
  """Angles (t, d/2): position times theta^(-2i/d). arXiv 2104.09864, eq. 15."""
  frequency = 1 / theta ** (jnp.arange(0, d, 2) / d)
  return (start + jnp.arange(t))[:, None] * frequency


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates neighbouring pairs of x (b, t, heads, d) by angles (t, d/2)."""
  cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
  even, odd = x[..., ::2], x[..., 1::2]
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(x.shape)


def _queries_keys_values(p: Mapping[str, Any], x: jax.Array, angles, c):
  q = rotate(layers.split_heads(x @ p['wq'], c.heads), angles)
  k = rotate(layers.split_heads(x @ p['wk'], c.kv_heads), angles)
  return q, k, layers.split_heads(x @ p['wv'], c.kv_heads)


def _attention(p: Mapping[str, Any], q, k, v, mask: jax.Array, c) -> jax.Array:
  # Every group of query heads shares one key and value head.
  share = c.heads // c.kv_heads
  k, v = jnp.repeat(k, share, axis=2), jnp.repeat(v, share, axis=2)
  return layers.merge_heads(layers.attention(q, k, v, mask)) @ p['wo']


def _mlp(p: Mapping[str, Any], x: jax.Array) -> jax.Array:
  return (jax.nn.silu(x @ p['gate']) * (x @ p['up'])) @ p['down']


def apply(
  params: Mapping[str, Any], tokens: jax.Array, *, config: Config = STORIES260K
) -> jax.Array:
  """Next-token logits (b, t, vocab) of tokens (b, t)."""
  t = tokens.shape[1]
  angles = rope_angles(t, config.dim // config.heads, config.theta)
  mask = jnp.tril(jnp.ones((t, t), bool))
  x = params['embed']['embedding'][tokens]
  for p in params['blocks']:
    y = layers.rms_norm(p['attention_norm'], x, epsilon=config.epsilon)
    q, k, v = _queries_keys_values(p['attention'], y, angles, config)
    x = x + _attention(p['attention'], q, k, v, mask, config)
    y = layers.rms_norm(p['mlp_norm'], x, epsilon=config.epsilon)
    x = x + _mlp(p['mlp'], y)
  return _logits(params, x, config)


def _logits(params: Mapping[str, Any], x: jax.Array, c: Config) -> jax.Array:
  x = layers.rms_norm(params['norm'], x, epsilon=c.epsilon)
  head = params['embed']['embedding'].T if c.tied else params['head']['kernel']
  return x @ head


def empty_cache(
  batch: int, length: int, config: Config, dtype: Any = jnp.float32
) -> list[dict[str, jax.Array]]:
  """Room for the keys and values of `length` positions."""
  d = config.dim // config.heads
  zeros = jnp.zeros((batch, length, config.kv_heads, d), dtype)
  return [{'k': zeros, 'v': zeros} for _ in range(config.blocks)]


def step(
  params: Mapping[str, Any],
  cache: Cache,
  tokens: jax.Array,
  position: jax.Array | int,
  *,
  config: Config = STORIES260K,
) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
  """What `apply` computes for the tokens that come next.

  Args:
    params: as `apply` takes them.
    cache: keys and values of the positions before; see `empty_cache`.
    tokens: (b, t), a whole prompt or one token.
    position: of the first of them; position + t is at most the cache's length.

  Returns:
    Logits (b, t, vocab), and the cache with these positions.
  """
  t, length = tokens.shape[1], cache[0]['k'].shape[1]
  angles = rope_angles(t, config.dim // config.heads, config.theta, position)
  mask = jnp.arange(length) <= position + jnp.arange(t)[:, None]
  x = params['embed']['embedding'][tokens]
  grown = []
  for p, past in zip(params['blocks'], cache, strict=True):
    y = layers.rms_norm(p['attention_norm'], x, epsilon=config.epsilon)
    q, k, v = _queries_keys_values(p['attention'], y, angles, config)
    now = {
      name: lax.dynamic_update_slice_in_dim(
        past[name], new.astype(past[name].dtype), position, axis=1
      )
      for name, new in (('k', k), ('v', v))
    }
    grown.append(now)
    keys, values = now['k'].astype(x.dtype), now['v'].astype(x.dtype)
    x = x + _attention(p['attention'], q, keys, values, mask, config)
    y = layers.rms_norm(p['mlp_norm'], x, epsilon=config.epsilon)
    x = x + _mlp(p['mlp'], y)
  return _logits(params, x, config), grown


def from_flat(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested parameters of a flat checkpoint with llama2.c's names."""

  def array(name: str) -> jax.Array:
    return jnp.asarray(flat[name], jnp.float32)

  def block(i: int) -> dict[str, Any]:
    at = f'layers.{i}'
    return {
      'attention_norm': {'scale': array(f'{at}.attention_norm')},
      'attention': {
        name: array(f'{at}.{name}') for name in ('wq', 'wk', 'wv', 'wo')
      },
      'mlp_norm': {'scale': array(f'{at}.ffn_norm')},
      'mlp': {
        'gate': array(f'{at}.w1'),
        'up': array(f'{at}.w3'),
        'down': array(f'{at}.w2'),
      },
    }

  return {
    'embed': {'embedding': array('tok_embeddings')},
    'blocks': [block(i) for i in range(sum(k.endswith('.wq') for k in flat))],
    'norm': {'scale': array('norm')},
  }


def init(key: jax.Array, config: Config) -> dict[str, Any]:
  """Random parameters of any size (fan-in scaled), for benchmarks and tests."""
  keys = iter(jax.random.split(key, 2 + 7 * config.blocks))

  def matrix(i: int, o: int) -> jax.Array:
    return jax.random.normal(next(keys), (i, o)) * i**-0.5

  def norm() -> dict[str, jax.Array]:
    return {'scale': jnp.ones(config.dim)}

  d, kv = config.dim, config.dim // config.heads * config.kv_heads
  embedding = 0.02 * jax.random.normal(next(keys), (config.vocab, d))
  params = {
    'embed': {'embedding': embedding},
    'blocks': [
      {
        'attention_norm': norm(),
        'attention': {
          'wq': matrix(d, d),
          'wk': matrix(d, kv),
          'wv': matrix(d, kv),
          'wo': matrix(d, d),
        },
        'mlp_norm': norm(),
        'mlp': {
          'gate': matrix(d, config.hidden),
          'up': matrix(d, config.hidden),
          'down': matrix(config.hidden, d),
        },
      }
      for _ in range(config.blocks)
    ],
    'norm': norm(),
  }
  if not config.tied:
    params['head'] = {'kernel': matrix(d, config.vocab)}
  return params
