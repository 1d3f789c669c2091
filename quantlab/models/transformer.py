"""A pre-norm language model in Linen, unrolled or scanned over its layers.

The scanned form stacks the parameters of all blocks along a leading axis and
runs `nn.scan(nn.remat(Block))`, as large models do: one compiled block, and
activations computed again in the backward pass.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
  """Causal attention and MLP, each after a LayerNorm and added to the stream.

  Attributes:
    dim: width of the stream.
    heads: of the attention; divides dim.
  """

  dim: int
  heads: int

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
    """The stream after the block, and nothing to stack; x (b, t, dim)."""
    y = nn.LayerNorm(name='attention_norm')(x)
    q, k, v = (
      nn.Dense(self.dim, use_bias=False, name=name)(y).reshape(
        *y.shape[:2], self.heads, -1
      )
      for name in ('query', 'key', 'value')
    )
    scores = jnp.einsum('bthd,bshd->bhts', q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
    y = jnp.einsum('bhts,bshd->bthd', weights, v).reshape(x.shape)
    x = x + nn.Dense(self.dim, use_bias=False, name='out')(y)
    y = nn.LayerNorm(name='mlp_norm')(x)
    y = nn.gelu(nn.Dense(4 * self.dim, name='up')(y))
    return x + nn.Dense(self.dim, name='down')(y), None


class Transformer(nn.Module):
  """Next-token logits of a decoder with learned positions.

  Attributes:
    vocab: tokens.
    dim: width of the stream.
    heads: of every block.
    blocks: how many.
    context: longest sequence.
    scanned: whether the blocks are one stack under `scan` and `remat`.
    tied: whether the embedding serves as the output matrix too.
  """

  vocab: int = 256
  dim: int = 64
  heads: int = 4
  blocks: int = 2
  context: int = 128
  scanned: bool = False
  tied: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Logits (b, t, vocab) of tokens (b, t)."""
    t = tokens.shape[1]
    if t > self.context:
      raise ValueError(
        f'The sequence is longer than the context: {t} > {self.context}.'
      )
    mask = jnp.tril(jnp.ones((t, t), bool))
    embed = nn.Embed(self.vocab, self.dim, name='embed')
    position = self.param(
      'position', nn.initializers.normal(0.02), (self.context, self.dim)
    )
    x = embed(tokens) + position[:t]
    if self.scanned:
      stack = nn.scan(
        nn.remat(Block, prevent_cse=False),  # a scan already keeps them apart
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        length=self.blocks,
      )
      x, _ = stack(self.dim, self.heads, name='blocks')(x, mask)
    else:
      for i in range(self.blocks):
        x, _ = Block(self.dim, self.heads, name=f'block_{i}')(x, mask)
    x = nn.LayerNorm(name='norm')(x)
    if self.tied:
      return embed.attend(x)
    return nn.Dense(self.vocab, use_bias=False, name='head')(x)


def stack_blocks(variables: Any) -> Any:
  """Variables of the unrolled model -> of the scanned one, same function."""
  params = variables['params']
  names = sorted(
    (name for name in params if name.startswith('block_')),
    key=lambda name: int(name.removeprefix('block_')),
  )
  rest = {name: p for name, p in params.items() if name not in names}
  stacked = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *(params[name] for name in names)
  )
  return {**variables, 'params': {**rest, 'blocks': stacked}}
