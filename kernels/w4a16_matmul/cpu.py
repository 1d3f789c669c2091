"""w4a16_matmul through the C++ kernels.

Weights are decoded to the float32 values of the definition, next to their
product, so that memory is read as codes. Up to four bits any `decode` is a
table of 16 floats, taken from it while tracing. Measured on one CPU (two
threads, loaded machine), 4096 x 4096, 4 bits in groups of 128, against the
float32 product of XLA at 1 / 2 / 16 / 256 rows: 2.3x / 6.8x / 1.5x / 1.1x.
"""

import functools

import jax
import jax.numpy as jnp

from quantlab_kernels.cpu import library, product
from quantlab_kernels.derivatives import differentiated_as
from quantlab_kernels.w4a16_matmul import xla
from quantlab_kernels.w4a16_matmul.reference import decoded


def refuses(
  x, w, scale, zero, *, bits, group, signed, decode, precision
) -> str | None:
  """Says why it cannot run."""
  del scale, zero, signed, precision
  if bits is None or bits > 8:
    return 'the weight is not packed in codes of 1 to 8 bits'
  if decode is not None and bits > 4:
    return f'the kernels look up codes of 1 to 4 bits, found {bits}'
  if bits in (2, 4) and group < x.shape[1] and group % (8 // bits):
    return f'groups of {group} codes of {bits} bits end within a byte'
  return product.refuses(x, w)


def route(x, w, scale, zero, *, bits, **options) -> str:
  """Says how it runs."""
  del scale, zero, options
  return 'to float32, ' + product.route(x, w, bits, integer=False)


def run(x, w, scale, zero, *, bits, group, signed, decode, precision):
  """Returns the float32 product, shape (M, N)."""
  k = x.shape[1]
  spec = product.Spec(bits, min(group, k), signed, 'float32', library.isa())
  values = None
  if bits <= 4:
    codes = jnp.arange(16, dtype=jnp.uint8) % 2**bits
    values = decoded(codes, bits, signed, decode)[None]
  call = _mapped(spec)

  def fast(*operands):
    lifted = jax.tree.map(lambda a: a[None], operands)
    return call(*lifted)[0]

  def slow(x, w, scale, zero, values):
    del values
    options = {'bits': bits, 'group': group, 'signed': signed}
    options |= {'decode': decode, 'precision': precision}
    return xla.run(x, w, scale, zero, **options)

  operands = (x.astype(jnp.float32), w, scale, zero, values)
  return differentiated_as(fast, slow, *operands)


@functools.cache
def _mapped(spec):
  def call(*operands):
    dtypes = (None, None, *('float32',) * 3)
    return product.ffi_call(library.MULTIPLY_FLOATS, spec, operands, dtypes)

  return product.mapped(call, rows=(0,))
