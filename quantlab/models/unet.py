"""A small U-Net with a time embedding, as denoising diffusion models use.

J. Ho et al., arXiv 2006.11239. What it adds to the zoo: skip concatenations
over a long stretch, GroupNorm, and one vector that every block reads.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def time_features(t: jax.Array, dim: int) -> jax.Array:
  """Sines and cosines (b, dim) of times t (b,). arXiv 1706.03762, 3.5."""
  frequency = jnp.exp(-jnp.log(1e4) * jnp.arange(dim // 2) / (dim // 2))
  angle = t.astype(jnp.float32)[:, None] * frequency
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class ResBlock(nn.Module):
  """Two convolutions around an added time embedding, and a shortcut.

  Attributes:
    width: output channels.
    groups: of GroupNorm.
  """

  width: int
  groups: int

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
    """x (b, h, w, c), time (b, d) -> (b, h, w, width)."""  # noqa: D403
    y = nn.silu(nn.GroupNorm(self.groups, name='norm1')(x))
    y = nn.Conv(self.width, (3, 3), name='conv1')(y)
    y = y + nn.Dense(self.width, name='time')(nn.silu(time))[:, None, None]
    y = nn.silu(nn.GroupNorm(self.groups, name='norm2')(y))
    y = nn.Conv(self.width, (3, 3), name='conv2')(y)
    if x.shape[-1] != self.width:
      x = nn.Conv(self.width, (1, 1), name='shortcut')(x)
    return x + y


class Unet(nn.Module):
  """Predicts the noise in x at time t.

  Attributes:
    widths: channels of each resolution, from the finest; divisible by groups.
    groups: of GroupNorm.
  """

  widths: tuple[int, ...] = (16, 32)
  groups: int = 4

  @nn.compact
  def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
    """Noise (b, h, w, c) in images x (b, h, w, c) at times t (b,)."""
    channels = x.shape[-1]
    time = time_features(t, 2 * self.widths[0])
    time = nn.silu(nn.Dense(4 * self.widths[0], name='time_in')(time))
    time = nn.Dense(4 * self.widths[0], name='time_out')(time)

    def block(width: int, name: str) -> ResBlock:
      return ResBlock(width, self.groups, name=name)

    x = nn.Conv(self.widths[0], (3, 3), name='stem')(x)
    skips = []
    for i, width in enumerate(self.widths):
      if i:
        x = nn.Conv(width, (3, 3), (2, 2), name=f'shrink_{i}')(x)
      x = block(width, f'down_{i}')(x, time)
      skips.append(x)
    x = block(self.widths[-1], 'middle')(x, time)
    for i, width in reversed(list(enumerate(self.widths))):
      x = jnp.concatenate([x, skips[i]], axis=-1)
      x = block(width, f'up_{i}')(x, time)
      if i:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        x = nn.Conv(self.widths[i - 1], (3, 3), name=f'grow_{i}')(x)
    x = nn.silu(nn.GroupNorm(self.groups, name='norm')(x))
    return nn.Conv(channels, (3, 3), name='head')(x)
