"""Random folds across pairs, and whether they keep the function."""

import jax
import numpy as np
from graph import programs

from quantlab.graph.migrate import rotate_pair, scale_pair, shift_pair


def described(pair):
  paths = tuple(m.path for m in pair.consumers)
  allows = ' '.join(sorted(pair.allows))
  return (pair.kind, pair.source, paths, pair.shape, allows)


def random_fold(pair, what, params, rng):
  """The parameters after a random scale, shift or rotation."""
  if what == 'scale':
    s = np.exp(rng.standard_normal(pair.shape))
    return scale_pair(params, pair, s.astype(np.float32))
  if what == 'shift':
    z = rng.standard_normal(pair.shape)
    return shift_pair(params, pair, z.astype(np.float32))
  d = pair.channels // pair.heads
  r = np.linalg.qr(rng.standard_normal((*pair.loops, d, d)))[0]
  return rotate_pair(params, pair, r.astype(np.float32))


def folded(pair, what):
  """Which parameters a fold changes."""
  if what == 'shift':
    return {pair.shifted, *(m.bias.path for m in pair.consumers)}
  return {m.path for m in (*pair.producers, *pair.consumers)}


def check_folds(program, here, tolerance=1e-5):
  """Each fold of each pair, then all scales at once, keep the function."""
  rng = np.random.default_rng(7)
  params = programs.flat(program.params)
  apply = jax.jit(program.apply)

  def moved(new):
    leaves = programs.unflat(program.params, new)
    return programs.error(apply(leaves, *program.args), want)

  want = apply(program.params, *program.args)
  every = params
  for pair in here:
    for what in sorted(pair.allows):
      new = random_fold(pair, what, params, rng)
      changed = {k for k in params if new[k] is not params[k]}
      assert changed == folded(pair, what)
      assert moved(new) <= tolerance, (pair, what)
      # The fold is not trivial: its producers alone change the function.
      kept = {m.path for m in pair.consumers}
      kept |= {m.bias.path for m in pair.consumers if m.bias}
      half = {k: params[k] if k in kept else new[k] for k in params}
      assert moved(half) > 1e-4, (pair, what)
    if pair.allows:
      every = random_fold(pair, 'scale', every, rng)
  assert moved(every) <= tolerance
