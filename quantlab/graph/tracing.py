"""From `apply(params, *args)` to a program, cached by shapes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from quantlab.core.tree import path_str
from quantlab.graph import _jaxpr, sites
from quantlab.graph.values import Dropped, logical


def is_stored(x: Any) -> bool:
  """Leaves of a parameter tree: QTensors and dropped leaves stay whole."""
  return isinstance(x, Dropped) or hasattr(x, 'dequantize')


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
  """A call of the user's function: its program, sites and array arguments.

  Attributes:
    program, analysis: see `_jaxpr.Program` and `sites.Analysis`.
    paths: names of the parameter leaves.
    constant_leaf: which parameter a closed-over array is, or None.
  """

  program: _jaxpr.Program
  analysis: sites.Analysis
  paths: tuple[str, ...]
  constant_leaf: Callable[[Any], int | None]


class Tracer:
  """Traces one function for any arguments, once per shapes.

  Python values among the arguments (flags, sizes) stay Python values, as in
  an eager call; arrays become inputs of the program.

  Args:
    apply: the user's function of `(params, *args, **kwargs)`.
    captured: fingerprints of parameters that the function closed over, by
      path; found at planning time, when the parameters are at hand.
  """

  def __init__(
    self, apply: Callable, captured: Mapping[str, str] | None = None
  ):
    self.apply = apply
    self.captured = dict(captured or {})
    self._cache: dict[Any, Traced] = {}

  def __call__(
    self, params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
  ) -> tuple[Traced, list[Any], list[Any]]:
    """Returns the traced call, the parameter leaves and the array inputs."""
    named, p_tree = jax.tree_util.tree_flatten_with_path(
      params, is_leaf=is_stored
    )
    leaves = [_as_array(leaf) for _, leaf in named]
    paths = tuple(path_str(path) for path, _ in named)
    rest, a_tree = jax.tree.flatten((tuple(args), dict(kwargs)))
    dynamic = tuple(_jaxpr.is_array(x) for x in rest)
    inputs = [x for x, d in zip(rest, dynamic, strict=True) if d]
    static = tuple(x for x, d in zip(rest, dynamic, strict=True) if not d)
    avals = [
      _jaxpr.abstract(x) for x in (*map(logical, leaves), *inputs)
    ]
    key = _key(p_tree, a_tree, dynamic, static, avals)
    found = self._cache.get(key) if key is not None else None
    if found is None:
      found = self._trace(
        p_tree, a_tree, dynamic, static, avals, paths, leaves
      )
      if key is not None and found.program.cacheable:
        self._cache[key] = found
    return found, leaves, inputs

  def _trace(self, p_tree, a_tree, dynamic, static, avals, paths, leaves):
    n = len(paths)

    def flat(*values):
      arrays, fixed = iter(values[n:]), iter(static)
      rest = [next(arrays) if d else next(fixed) for d in dynamic]
      args, kwargs = jax.tree.unflatten(a_tree, rest)
      return self.apply(jax.tree.unflatten(p_tree, values[:n]), *args, **kwargs)

    program = _jaxpr.trace(flat, n, avals)
    constant_leaf = self._matcher(paths, leaves)
    analysis = sites.analyse(program, paths, constant_leaf)
    return Traced(program, analysis, paths, constant_leaf)

  def _matcher(self, paths, leaves) -> Callable[[Any], int | None]:
    """Recognizes closed-over parameters by identity, later by content."""
    by_id = {id(leaf): i for i, leaf in enumerate(leaves)}
    by_print = {
      print_: paths.index(path)
      for path, print_ in self.captured.items()
      if path in paths
    }

    def constant_leaf(const):
      if id(const) in by_id:
        return by_id[id(const)]
      if not by_print or isinstance(const, jax.core.Tracer):
        return None
      return by_print.get(fingerprint(const))

    return constant_leaf


def closed_over(traced: Traced, leaves: Sequence[Any]) -> dict[str, str]:
  """Fingerprints by path of the parameters a program holds as constants."""
  found: dict[str, str] = {}

  def visit(jaxpr, consts):
    for const in consts:
      leaf = traced.constant_leaf(const)
      if leaf is not None:
        found[traced.paths[leaf]] = fingerprint(const)
    for eqn in jaxpr.eqns:
      for inner in _jaxpr.inner_jaxprs(eqn):
        visit(*inner)

  visit(traced.program.jaxpr, traced.program.consts)
  return found


def fingerprint(array: Any) -> str:
  """Content hash of an array: dtype, shape and bytes."""
  x = np.asarray(array)
  digest = hashlib.sha256(f'{x.dtype}{x.shape}'.encode())
  digest.update(np.ascontiguousarray(x).view(np.uint8).tobytes())
  return digest.hexdigest()


def _as_array(leaf: Any) -> Any:
  return leaf if is_stored(leaf) or _jaxpr.is_array(leaf) else np.asarray(leaf)


def _key(p_tree, a_tree, dynamic, static, avals) -> Any:
  """Hashable cache key, or None where a Python argument is unhashable."""
  shapes = tuple((a.shape, str(a.dtype), a.weak_type) for a in avals)
  # True == 1 in Python, but not in a traced function.
  typed = tuple((type(x), x) for x in static)
  key = (p_tree, a_tree, dynamic, typed, shapes, _jaxpr.config_key())
  try:
    hash(key)
  except TypeError:
    return None
  return key
