"""w4a8_matmul through XLA's int8 product, one group after the other.

Measured on XLA:CPU (jax 0.10.2), 4096 x 4096, 4 bits in groups of 128,
milliseconds at 1 / 16 / 256 rows: float32 product 3.2 / 9.9 / 85; codes
unpacked to int8 and a loop of int8 products over the groups 3.7 / 8.4 / 65;
unpacking inside the loop 15 / 19 / 75; one batched int8 product over the
groups 36 / 55 / -; the same on integers held in float32 32 / 46 / 227;
dequantize, then a float32 product 30 / 35 / 119.
"""

import jax
import jax.numpy as jnp

from quantlab_kernels import codes, int_dot, panels, shapes
from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401

# With several devices a loop over groups gathers a weight sharded along K, so
# there the groups are one batched product while its partial sums fit.
BATCHED_BYTES = 2**28


def _batched(m: int, n: int, groups: int) -> bool:
  return not int_dot.on_one_cpu() and 4 * m * n * groups <= BATCHED_BYTES


def route(x, p, scale, zero, x_scale, x_zero, **options):
  """Says how it runs."""
  del zero, x_scale, x_zero
  (m, k), (groups, n) = x.shape, scale.shape
  first = panels.unpacked_first(p)
  unpacked = f'{options["bits"]}-bit codes unpacked to int8{first}, '
  if groups == 1:
    return unpacked + int_dot.describe(m, k, n)
  if _batched(m, n, groups):
    return unpacked + f'one batched int8 dot over {groups} groups'
  return unpacked + f'a loop of {groups} int8 dots, one a group'


def run(x, p, scale, zero, x_scale, x_zero, *, bits, group, signed, out_dtype):
  """Returns the scaled product, shape (M, N)."""
  (m, k), (groups, n) = x.shape, scale.shape
  w = codes.unpack_int8(panels.plain_bytes(p), bits, k, signed)
  if codes.offset(bits, signed):
    zero = jnp.zeros((groups, n), jnp.int32) if zero is None else zero
    zero = zero - codes.offset(bits, signed)
  shared = x_scale is None or x_scale.shape[1] == 1
  parts = (
    jnp.swapaxes(shapes.split_groups(x, group, groups), 0, 1),
    shapes.split_group_rows(w, group, groups),
    scale[:, None, :],
    None if zero is None else zero[:, None, :],
    None if shared else _by_group(x_scale, groups),
    None if x_zero is None else _by_group(x_zero, groups),
    jnp.minimum(group, k - group * jnp.arange(groups)).astype(jnp.int32),
  )
  if groups == 1:
    y = _one_group(*jax.tree.map(lambda a: a[0], parts))
  elif _batched(m, n, groups):
    y = jnp.sum(jax.vmap(_one_group)(*parts), axis=0)
  else:
    y = shapes.summed(_one_group, parts, (m, n))
  if x_scale is not None and shared:
    y = y * x_scale
  return y.astype(out_dtype)


def _by_group(s, groups):
  """Reshapes (M, 1 or G) to one column (M, 1) per group."""
  return jnp.broadcast_to(s, (s.shape[0], groups)).T[:, :, None]


def _one_group(x, w, scale, zero, x_scale, x_zero, count):
  acc = int_dot.centered_dot(x, w, x_zero, zero, terms=count)
  y = acc.astype(jnp.float32) * scale
  return y if x_scale is None else y * x_scale
