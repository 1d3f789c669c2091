"""Layout: from logical axes to (loops..., K, N) and back."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantlab.core import Layout, LayoutError, relayout


@pytest.mark.parametrize(
  ('shape', 'k', 'loops', 'layout'),
  [
    ((8, 6), (0,), (), Layout((8,), (-1,), (-2, -1))),
    ((8, 6), (1,), (), Layout((6,), (-1,), (-1, -2))),
    ((2, 8, 6), (1,), (0,), Layout((8,), (-1,), (-2, -1))),
    ((8, 2, 6), (0,), (1,), Layout((8,), (-1,), (-2, -3, -1))),
    ((3, 3, 4, 8), (0, 1, 2), (), Layout((3, 3, 4), (-1,), (-4, -3, -2, -1))),
    ((4, 3, 5), (1,), (), Layout((3,), (-1, 5), (-2, -3, -1))),
    ((7,), (0,), (), Layout((7,), (), (-1,))),
  ],
)
def test_of(shape, k, loops, layout):
  assert Layout.of(shape, k, loops) == layout


def test_canonical_form_by_einsum():
  w = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
  layout = Layout.of(w.shape, (3, 1), (2,))
  got = layout.to_canonical(jnp.asarray(w))
  want = np.einsum('nklm->lmkn', w).reshape(4, 15, 2)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(layout.to_logical(got), w)


def test_loops_need_not_be_known():
  """Leading loop axes come and go without the layout knowing."""
  layout = Layout.of((8, 6), (0,))
  stack = jnp.arange(5 * 2 * 8 * 6.0).reshape(5, 2, 8, 6)
  assert layout.to_canonical(stack).shape == (5, 2, 8, 6)
  mapped = jax.vmap(layout.to_canonical)(stack)
  np.testing.assert_array_equal(mapped, stack)


def test_columns_may_be_cut():
  layout = Layout.of((8, 6, 2), (0,))
  y = jnp.zeros((8, 4))
  assert layout.to_logical(y).shape == (8, 2, 2)


def test_misfits_are_refused():
  layout = Layout.of((3, 8, 6), (1,), (0,))
  with pytest.raises(ValueError, match=r'contraction axes .* are \(9,\)'):
    layout.to_canonical(jnp.zeros((3, 9, 6)))
  with pytest.raises(ValueError, match='does not fit'):
    layout.to_canonical(jnp.zeros(3))
  with pytest.raises(ValueError, match='named twice'):
    Layout.of((3, 8, 6), (1,), (1,))


def read(layout, y):
  """Logical array of canonical numbers y (loops..., K, N), in plain NumPy."""
  loops, n = y.shape[:-2], y.shape[-1]
  inner = math.prod(layout.n_shape[1:])
  out = (n // inner, *layout.n_shape[1:]) if layout.n_shape else ()
  y = y.reshape(*loops, *layout.k_shape, *out)
  lead = y.ndim - len(layout.perm)
  order = [*range(lead), *(p % y.ndim for p in layout.perm)]
  return y.transpose(order)


@dataclasses.dataclass
class Stored:
  """Numbers in the canonical layout, each one different."""

  layout: Layout
  y: np.ndarray

  def axes(self):
    return relayout.Axes.of(self.layout, self.y.shape[:-2], self.y.shape[-1])

  def logical(self):
    return read(self.layout, self.y)

  def moved(self, axes):
    return Stored(axes.layout(), self.y)


@st.composite
def stored(draw):
  """Random rank, sizes, roles and order of axes."""
  roles = draw(st.lists(st.sampled_from('lkn'), min_size=1, max_size=6))
  shape = [draw(st.sampled_from([1, 2, 3, 4, 6])) for _ in roles]
  k_axes = draw(st.permutations([i for i, r in enumerate(roles) if r == 'k']))
  loops = [i for i, r in enumerate(roles) if r == 'l']
  layout = Layout.of(shape, k_axes, loops)
  sizes = [shape[i] for i in loops]
  n = math.prod(s for s, r in zip(shape, roles, strict=True) if r == 'n')
  y = np.arange(math.prod(shape)).reshape(*sizes, layout.k, n)
  s = Stored(layout, y)
  assert s.logical().shape == tuple(shape) == s.axes().shape
  return s


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(stored(), st.data())
def test_any_transpose(s, data):
  w = s.logical()
  perm = data.draw(st.permutations(range(w.ndim)))
  moved = s.moved(relayout.transpose(s.axes(), perm))
  np.testing.assert_array_equal(moved.logical(), w.transpose(perm))
  back = moved.moved(relayout.transpose(moved.axes(), np.argsort(perm)))
  assert back.layout == s.layout


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(stored(), st.data())
def test_any_reshape_is_exact_or_refused(s, data):
  w = s.logical()
  shape = []
  for size in w.shape:
    choices = [(size,), (size, 1), (1, size)]
    if size % 2 == 0:
      choices += [(2, size // 2), (size // 2, 1, 2)]
    shape += data.draw(st.sampled_from(choices))
  for _ in range(data.draw(st.integers(0, 2))):
    if len(shape) > 1:
      i = data.draw(st.integers(0, len(shape) - 2))
      shape[i : i + 2] = [shape[i] * shape[i + 1]]
  try:
    axes = relayout.reshape(s.axes(), shape)
  except LayoutError:
    # Never refused where no axis is merged or split, loops of one aside.
    same = [n for n in shape if n > 1] == [n for n in w.shape if n > 1]
    assert not same or 1 in s.axes().sizes['loop']
    return
  moved = s.moved(axes)
  np.testing.assert_array_equal(moved.logical(), w.reshape(shape))


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(stored(), st.data())
def test_any_expand_and_squeeze(s, data):
  w = s.logical()
  ndim = w.ndim + 2
  where = data.draw(
    st.lists(st.integers(-ndim, ndim - 1), min_size=2, max_size=2).filter(
      lambda a: len({v % ndim for v in a}) == 2
    )
  )
  wide = s.moved(relayout.expand_dims(s.axes(), where))
  np.testing.assert_array_equal(wide.logical(), np.expand_dims(w, where))
  back = wide.moved(relayout.squeeze(wide.axes(), where))
  np.testing.assert_array_equal(back.logical(), w)
