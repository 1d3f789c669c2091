"""Llama in bare JAX: RMSNorm, rotary positions, grouped queries, SwiGLU.

H. Touvron et al., arXiv 2302.13971; RoPE arXiv 2104.09864; GQA arXiv
2305.13245. The output matrix is the embedding, transposed, where it is tied.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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

  Attributes:
    sub_norm: a norm of its own before the output projection of attention and
      before the MLP's, as BitNet has it; see `bitnet`.
    squared_relu: max(x, 0)^2 gates the MLP in the place of SiLU.
    scanned: the blocks are one stack of parameters that `lax.scan` walks.
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
  sub_norm: bool = False
  squared_relu: bool = False
  scanned: bool = False

  def __post_init__(self):
    if self.dim % self.heads or self.heads % self.kv_heads:
      raise ValueError(
        'heads must divide dim, and kv_heads must divide heads; got '
        f'dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}.'
      )


STORIES260K = Config()


# Keys and values (b, kv_heads, length, d) of each block; stacked when scanned.
Cache = Sequence[Mapping[str, jax.Array]] | Mapping[str, jax.Array]


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


def _attend(q, k, v, mask: jax.Array) -> jax.Array:
  """Queries (b, t, heads, d), keys and values (b, s, kv_heads, d)."""
  # Every group of query heads shares one key and value head.
  share = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, share, axis=2), jnp.repeat(v, share, axis=2)
  return layers.merge_heads(layers.attention(q, k, v, mask))


def _attend_by_head(q, k, v, mask: jax.Array) -> jax.Array:
  """The same of k and v (b, kv_heads, s, d), which are not copied."""
  b, t, _, d = q.shape
  # The query heads of a group are more queries of its one key head.
  q = q.reshape(b, t, k.shape[1], -1, d)
  scores = jnp.einsum('btghd,bgsd->bghts', q, k) / d**0.5
  weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
  return jnp.einsum('bghts,bgsd->btghd', weights, v).reshape(b, t, -1)


def _mlp(p: Mapping[str, Any], x: jax.Array, c: Config) -> jax.Array:
  gate = x @ p['gate']
  gate = jnp.square(jax.nn.relu(gate)) if c.squared_relu else jax.nn.silu(gate)
  return _sub_norm(p, gate * (x @ p['up']), c) @ p['down']


def _sub_norm(p: Mapping[str, Any], x: jax.Array, c: Config) -> jax.Array:
  if not c.sub_norm:
    return x
  return layers.rms_norm(p['sub_norm'], x, epsilon=c.epsilon)


def block(
  p: Mapping[str, Any],
  x: jax.Array,
  angles: jax.Array,
  mask: jax.Array,
  config: Config,
  attend: Callable | None = None,
) -> tuple[jax.Array, Any]:
  """Attention and MLP, each with its norm and beside the stream x (b, t, dim).

  Args:
    p: parameters of one block.
    x: the residual stream.
    angles: see `rope_angles`.
    mask: boolean, broadcastable to (b, heads, t, s).
    config: sizes.
    attend: `(q, k, v) -> (mixed, kept)`: the mixed values (b, t, dim), and
      what to return beside the stream; None attends to these positions.
  """
  y = layers.rms_norm(p['attention_norm'], x, epsilon=config.epsilon)
  q, k, v = _queries_keys_values(p['attention'], y, angles, config)
  mixed, kept = attend(q, k, v) if attend else (_attend(q, k, v, mask), None)
  x = x + _sub_norm(p['attention'], mixed, config) @ p['attention']['wo']
  y = layers.rms_norm(p['mlp_norm'], x, epsilon=config.epsilon)
  return x + _mlp(p['mlp'], y, config), kept


def through(
  run: Callable, blocks: Any, x: jax.Array, *extra: Any
) -> tuple[jax.Array, Any]:
  """Walks `run(p, x, *extra) -> (x, kept)` over blocks, listed or stacked."""
  if isinstance(blocks, Mapping):
    return lax.scan(lambda x, pe: run(pe[0], x, *pe[1:]), x, (blocks, *extra))
  found = []
  for p, *more in zip(blocks, *extra, strict=True):
    x, kept = run(p, x, *more)
    found.append(kept)
  return x, found


def apply(
  params: Mapping[str, Any], tokens: jax.Array, *, config: Config = STORIES260K
) -> jax.Array:
  """Next-token logits (b, t, vocab) of tokens (b, t)."""
  t = tokens.shape[1]
  angles = rope_angles(t, config.dim // config.heads, config.theta)
  mask = jnp.tril(jnp.ones((t, t), bool))
  x = params['embed']['embedding'][tokens]
  x, _ = through(
    lambda p, x: block(p, x, angles, mask, config), params['blocks'], x
  )
  return _logits(params, x, config)


def _logits(params: Mapping[str, Any], x: jax.Array, c: Config) -> jax.Array:
  x = layers.rms_norm(params['norm'], x, epsilon=c.epsilon)
  head = params['embed']['embedding'].T if c.tied else params['head']['kernel']
  return x @ head


def empty_cache(
  batch: int, length: int, config: Config, dtype: Any = jnp.float32
) -> Cache:
  """Room for the keys and values of `length` positions."""
  d = config.dim // config.heads
  zeros = jnp.zeros((batch, config.kv_heads, length, d), dtype)
  if config.scanned:
    zeros = jnp.zeros((config.blocks, *zeros.shape), dtype)
    return {'k': zeros, 'v': zeros}
  return [{'k': zeros, 'v': zeros} for _ in range(config.blocks)]


def step(
  params: Mapping[str, Any],
  cache: Cache,
  tokens: jax.Array,
  position: jax.Array | int,
  *,
  config: Config = STORIES260K,
) -> tuple[jax.Array, Cache]:
  """What `apply` computes for the tokens that come next.

  Args:
    params: as `apply` takes them.
    cache: keys and values of the positions before; see `empty_cache`.
    tokens: (b, t), a whole prompt or one token.
    position: of the first of them; position + t is at most the cache's length.

  Returns:
    Logits (b, t, vocab), and the cache with these positions.
  """
  t = tokens.shape[1]
  length = jax.tree.leaves(cache)[0].shape[-2]
  angles = rope_angles(t, config.dim // config.heads, config.theta, position)
  mask = jnp.arange(length) <= position + jnp.arange(t)[:, None]

  def run(p, x, past):
    def attend(q, k, v):
      now = {
        name: lax.dynamic_update_slice_in_dim(
          past[name],
          new.astype(past[name].dtype).swapaxes(1, 2),
          position,
          axis=2,
        )
        for name, new in (('k', k), ('v', v))
      }
      keys, values = now['k'].astype(x.dtype), now['v'].astype(x.dtype)
      return _attend_by_head(q, keys, values, mask), now

    return block(p, x, angles, mask, config, attend)

  x = params['embed']['embedding'][tokens]
  x, grown = through(run, params['blocks'], x, cache)
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
  """Random parameters of any size (fan-in scaled)."""
  keys = iter(jax.random.split(key, 2 + 7 * config.blocks))

  def matrix(i: int, o: int) -> jax.Array:
    return jax.random.normal(next(keys), (i, o)) * i**-0.5

  def norm(n: int = config.dim) -> dict[str, jax.Array]:
    return {'scale': jnp.ones(n)}

  def sub_norm(n: int) -> dict[str, Any]:
    return {'sub_norm': norm(n)} if config.sub_norm else {}

  d, kv = config.dim, config.dim // config.heads * config.kv_heads
  embedding = 0.02 * jax.random.normal(next(keys), (config.vocab, d))
  blocks: Any = [
    {
      'attention_norm': norm(),
      'attention': {
        'wq': matrix(d, d),
        'wk': matrix(d, kv),
        'wv': matrix(d, kv),
        'wo': matrix(d, d),
        **sub_norm(d),
      },
      'mlp_norm': norm(),
      'mlp': {
        'gate': matrix(d, config.hidden),
        'up': matrix(d, config.hidden),
        'down': matrix(config.hidden, d),
        **sub_norm(config.hidden),
      },
    }
    for _ in range(config.blocks)
  ]
  if config.scanned:
    blocks = jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)
  params = {
    'embed': {'embedding': embedding},
    'blocks': blocks,
    'norm': norm(),
  }
  if not config.tied:
    params['head'] = {'kernel': matrix(d, config.vocab)}
  return params
