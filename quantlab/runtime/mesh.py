"""A device mesh that leaves sharding to the compiler."""

import math

import jax


def make_mesh(**axes: int) -> jax.sharding.Mesh:
  """A mesh over all devices with the named axes, all of them Auto.

  `jax.make_mesh` makes Explicit axes by default since JAX 0.10, under which
  an ordinary model must annotate every operation; a quantized program is the
  user's, so the compiler is asked to propagate the shardings.

  Args:
    **axes: size of each axis in order; one may be -1 for all that is left.

  Returns:
    The mesh, e.g. `make_mesh(data=-1, model=2)`.
  """
  if not axes:
    raise ValueError('no axes given; expected e.g. make_mesh(data=-1).')
  devices = jax.device_count()
  free = [name for name, size in axes.items() if size == -1]
  fixed = math.prod(size for size in axes.values() if size != -1)
  if len(free) > 1 or any(s < 1 and s != -1 for s in axes.values()):
    raise ValueError(
      f'{axes=}: expected positive sizes, and -1 for at most one axis.'
    )
  if devices % fixed or (not free and fixed != devices):
    raise ValueError(
      f'{axes=} multiplies to {fixed}, but there are {devices} devices; give '
      'sizes that multiply to it, or -1 for one axis.'
    )
  sizes = {**axes, **dict.fromkeys(free, devices // fixed)}
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
  )
