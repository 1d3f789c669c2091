"""NNX modules as a pure function and a plain tree of parameters."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def from_nnx(
  module: nnx.Module, *, method: str = '__call__'
) -> tuple[Callable[..., Any], dict[str, Any]]:
  """The pure function of a module, and its arrays as nested dicts.

  Every variable with an array goes into the tree, parameters and statistics
  alike (`up/kernel`, `bn/mean`), so that what is saved is the whole model and
  what is folded is known; only the state of random streams stays behind, as it
  was when this was called. Updates that a call makes to its module, such as
  running statistics, are dropped: call `module.eval()` first.

  Examples:
    >>> linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> apply, params = from_nnx(linear)
    >>> sorted(params), apply(params, jax.numpy.ones((4, 2))).shape
    (['bias', 'kernel'], (4, 3))

  Args:
    module: the module, initialised.
    method: which of its methods to call.

  Returns:
    `apply(params, *args, **kwargs)` and `params`.

  Raises:
    TypeError: `module` is no NNX module, or has no such method.
  """
  if not isinstance(module, nnx.Module):
    raise TypeError(
      f'from_nnx takes an instance of flax.nnx.Module; got {module!r}. A Linen '
      'module needs no adapter: its apply is the function, its variables the '
      'parameters.'
    )
  if not callable(getattr(type(module), method, None)):
    raise TypeError(f'{type(module).__name__} has no method {method!r}.')
  # Random streams first; `...` takes the rest.
  graph, random, state = nnx.split(module, nnx.RngState, ...)  # type: ignore[misc]
  params = _with_lists(nnx.to_pure_dict(state))

  def apply(params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    # Copied: replacing must not write into the state that is closed over.
    filled = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(filled, _with_indices(params))
    merged = nnx.merge(graph, random, filled)
    return getattr(merged, method)(*args, **kwargs)

  return apply, params


def _with_lists(tree: Any) -> Any:
  """Dicts keyed 0..n-1, as NNX numbers a list's items, become lists.

  The paths stay (`layers/0/kernel`), and checkpoints keep lists, but turn
  integer keys into strings.
  """
  if not isinstance(tree, dict):
    return tree
  if tree and set(tree) == set(range(len(tree))):
    return [_with_lists(tree[i]) for i in range(len(tree))]
  return {key: _with_lists(value) for key, value in tree.items()}


def _with_indices(tree: Any) -> Any:
  """The dicts that `_with_lists` was given."""
  if isinstance(tree, list):
    return {i: _with_indices(value) for i, value in enumerate(tree)}
  if isinstance(tree, dict):
    return {key: _with_indices(value) for key, value in tree.items()}
  return tree
