"""The product of the C++ kernels as a JAX function.

Every array has three axes, (batch or 1, rows, columns). `vmap` folds its axis
into the rows of x where the weight is not mapped, else into the batch, which
the kernels walk without a copy. Scales may be differentiated, forward and
backward: the tangent is computed by plain XLA, but for the scale of a row,
which scales a product without it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, Int8, Int32, UInt8

from quantlab_kernels import crossover, int_dot, panels, shapes
from quantlab_kernels.cpu import library
from quantlab_kernels.derivatives import tangent
from quantlab_kernels.panels import Panels
from quantlab_kernels.whole import whole

# Rows of x up to which codes are decoded within the product; as in vec.h.
DIRECT = {'amx': 4, 'avx512vnni': 4, 'avxvnni': 3, 'avx2': 2}


@dataclasses.dataclass(frozen=True)
class Spec:
  """What is static of a product; see `multiply`."""

  bits: int
  group: int
  signed: bool
  out: str
  isa: str
  columns: int | None = None  # of a weight in panels


def refuses(*operands: jax.Array | Panels) -> str | None:
  """Returns why the kernels cannot run on these operands, or None."""
  if jax.default_backend() != 'cpu':
    return f'the kernels run on cpu, the platform is {jax.default_backend()}'
  if not (int_dot.on_one_cpu() or _is_local()):
    return (
      f'{jax.device_count()} devices: an operand that is sharded would be '
      'gathered, and whether one is cannot be seen here; use shard_map'
    )
  if not all(a.size for a in operands):
    return 'an operand is empty'
  return library.unavailable()


def refuses_packed(
  x: jax.Array, p: jax.Array | Panels, bits: int, group: int
) -> str | None:
  """The same of rows of bytes that hold codes, which may be in panels."""
  why = refuses(x, p)
  if why is None and isinstance(p, Panels):
    return panels.unreadable(x.shape[1], bits, group)
  return why


def _is_local() -> bool:
  """Whether this is traced inside shard_map, on the shards of one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)


def route(
  x: jax.Array,
  w: jax.Array | Panels,
  bits: int,
  x_zero: jax.Array | None = None,
  *,
  integer: bool = True,
) -> str:
  """Says in words how `multiply` runs, and where float would be faster."""
  isa = library.isa()
  rows = x.shape[0] + (x_zero is not None)
  when = (
    'within the product'
    if rows <= DIRECT[isa]
    else 'once for all rows, strip by strip'
  )
  how = f'C++ on {isa}, {bits}-bit codes decoded {when}'
  if isinstance(w, Panels):
    how = f'C++ on {isa}, {bits}-bit codes read in panels'
  weights = x.shape[1] * w.shape[1]
  slow = crossover.slower_than_float(bits, x.shape[0], weights, integer=integer)
  return how if slow is None else f'{how}; {slow}'


def multiply(
  x: Int8[Array, 'm k'],
  w: UInt8[Array, 'kp n'] | Int8[Array, 'k n'] | Panels,
  scale: Float[Array, 'g n'] | None,
  zero: Int[Array, 'g n'] | None,
  x_scale: Float[Array, ' m #g'] | None,
  x_zero: Int[Array, ' m #g'] | None,
  table: Int8[Array, ' codes'] | None = None,
  *,
  bits: int,
  group: int,
  signed: bool,
  otherwise: Callable[..., jax.Array] | None,
) -> Float[Array, 'm n'] | Int32[Array, 'm n']:
  """Multiplies int8 rows by codes; see `w4a8_matmul` for the equations.

  Args:
    x: rows.
    w: codes, packed along K, in rows or in panels.
    scale, zero, x_scale, x_zero: as there, of two axes.
    table: what the codes stand for; None is themselves.
    bits: width of a code.
    group: codes that share a scale.
    signed: codes are two's complement.
    otherwise: the same product of (x, w, scale, zero, x_scale, x_zero, table)
      in plain JAX, for tangents; None gives the unscaled int32 sums of a
      single group.

  Returns:
    float32 y, or int32 sums.
  """
  out = 'int32' if otherwise is None else 'float32'
  spec = Spec(bits, group, signed, out, library.isa())
  if isinstance(w, Panels):
    spec = dataclasses.replace(spec, columns=w.shape[1])
    otherwise = _out_of_panels(w, otherwise)
    w = w.codes.reshape(len(w.codes), -1)
  call = _mapped(spec)
  if table is not None:
    table = table[None]

  def fast(*operands):
    lifted = jax.tree.map(lambda a: a[None], operands)
    return call(*lifted)[0]

  operands = (x, w, scale, zero, x_scale, x_zero, table)
  if otherwise is None:
    return fast(*operands)
  return differentiable(fast, otherwise)(*operands)


def _out_of_panels(packed: Panels, otherwise):
  """`otherwise` of codes in panels, flat."""
  if otherwise is None:
    return None

  def call(x, w, *rest):
    return otherwise(x, packed.of(w.reshape(packed.codes.shape)), *rest)

  return call


def differentiable(fast, otherwise):
  """`fast` with the derivatives of `otherwise` along its scales.

  Both take (x, w, scale, zero, x_scale, x_zero, table).
  """
  f = jax.custom_jvp(fast)

  def jvp(primals, tangents):
    x, w, scale, zero, x_scale, x_zero, table = primals
    y, along_x = whole(f, *primals), tangents[4]
    if (
      isinstance(along_x, SymbolicZero)
      or x_scale is None
      or x_scale.shape[1] > 1
    ):
      return y, tangent(otherwise, primals, tangents, y)
    # A product is linear in the scale of a row.
    dy = along_x * whole(f, x, w, scale, zero, None, x_zero, table)
    others = (*tangents[:4], None, *tangents[5:])
    return y, dy + tangent(otherwise, primals, others, y)

  f.defjvp(jvp, symbolic_zeros=True)
  return f


def mapped(run: Callable[..., jax.Array], rows: Sequence[int]):
  """`run` on batches, with its rule for `vmap`.

  Args:
    run: takes arrays (1 or batch, ., .), or None, returns (batch, M, N).
    rows: positions of the operands that have a row for each of M, x first. The
      others belong to the weight.
  """

  @custom_vmap
  def call(*operands):
    return run(*operands)

  @call.def_vmap
  def rule(size, over, *operands):
    over = [any(jax.tree.leaves(o)) for o in over]
    pairs = list(zip(operands, over, strict=True))
    batch = max(a.shape[int(o)] for a, o in pairs if a is not None)
    weight = [o for i, o in enumerate(over) if i not in rows]
    if batch == 1 and not any(weight):
      folded = [
        _fold(a, o, size) if i in rows else a for i, (a, o) in enumerate(pairs)
      ]
      y = call(*folded)
      return y.reshape(size, 1, operands[rows[0]].shape[-2], y.shape[-1]), True
    y = call(*(_merge(a, o, size, batch) for a, o in pairs))
    return y.reshape(size, batch, *y.shape[1:]), True

  return call


@functools.cache
def _mapped(spec: Spec):
  return mapped(functools.partial(_call, spec), rows=(0, 4, 5))


def _fold(a, over, size):
  """Merges the mapped axis into the rows."""
  if a is None:
    return None
  return _spread(a, over, size).reshape(1, size * a.shape[-2], a.shape[-1])


def _spread(a, over, size):
  return a if over else jnp.broadcast_to(a, (size, *a.shape))


def _merge(a, over, size, batch):
  """Merges the mapped axis into the batch; what is of neither stays one."""
  if a is None or (a.shape[0] == 1 and not over):
    return a
  a = _spread(a, over, size)
  a = jnp.broadcast_to(a, (size, batch, *a.shape[2:]))
  return a.reshape(size * batch, *a.shape[2:])


def _call(spec: Spec, x, w, scale, zero, x_scale, x_zero, table):
  operands = (x, w, scale, zero, x_scale, x_zero, table)
  dtypes = (None, None, *('float32', 'int32') * 2, 'int8')
  panels = np.bool_(spec.columns is not None)
  return ffi_call(library.MULTIPLY, spec, operands, dtypes, panels=panels)


def ffi_call(
  target: str,
  spec: Spec,
  operands: Sequence[Any],
  dtypes: Sequence[str | None],
  **attributes: Any,
) -> jax.Array:
  """Calls the kernels on (x, w, ...); operands that are None become empty."""
  batch = max(a.shape[0] for a in operands if a is not None)
  x, w = operands[:2]
  shape = (batch, x.shape[1], spec.columns or w.shape[2])
  given = [
    jnp.zeros((0, 0, 0), d) if a is None else a
    for a, d in zip(operands, dtypes, strict=True)
  ]
  y = jax.ffi.ffi_call(
    target, jax.ShapeDtypeStruct(shape, jnp.dtype(spec.out))
  )(
    *given,
    bits=np.int64(spec.bits),
    group=np.int64(spec.group),
    is_signed=np.bool_(spec.signed),
    isa=np.int64(library.ISAS[spec.isa]),
    **attributes,
  )
  return shapes.varying(y, given)
