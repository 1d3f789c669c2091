"""int8_matmul through XLA's own int8 product."""

from quantlab_kernels import int_dot, panels
from quantlab_kernels.int8_matmul.reference import rescale
from quantlab_kernels.registry import runs_anywhere as refuses  # noqa: F401


def route(x, w, x_scale, w_scale, x_zero, w_zero, *, transpose_w, out_dtype):
  """Says how it runs."""
  del x_scale, w_scale, out_dtype
  n = w.shape[0] if transpose_w else w.shape[1]
  m, k = x.shape
  how = int_dot.describe(m, k, n, transpose_w) + panels.unpacked_first(w)
  zeros = [s for s, z in (('x', x_zero), ('w', w_zero)) if z is not None]
  return how + (f', zero-point sums for {" and ".join(zeros)}' * bool(zeros))


def run(x, w, x_scale, w_scale, x_zero, w_zero, *, transpose_w, out_dtype):
  """Returns the scaled product, shape (M, N)."""
  w = panels.plain(w)
  acc = int_dot.centered_dot(x, w, x_zero, w_zero, transpose_w=transpose_w)
  return rescale(acc, x_scale, w_scale, out_dtype)
