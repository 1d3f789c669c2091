"""From `apply(params, *args)` to a program, cached by shapes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from quantlab.core import QTensor
from quantlab.core.tree import path_str
from quantlab.graph import _jaxpr, sites
from quantlab.graph.values import Dropped, logical

# What the user's function raises on arguments that are not meant for it.
_USER_ERRORS = (TypeError, ValueError, LookupError, AttributeError)


def is_stored(x: Any) -> bool:
  """Leaves of a parameter tree: QTensors and dropped leaves stay whole."""
  return isinstance(x, QTensor | Dropped)


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
  """A call of the user's function: its program, sites and array arguments.

  Attributes:
    program: see `_jaxpr.Program`.
    given: its sites, where they are known; else they are found when they are
      first asked for.
    paths: names of the parameter leaves.
    constant_leaf: which parameter a closed-over array is, or None.
    compiled: what a rewrite made of the program, by name.
  """

  program: _jaxpr.Program
  given: sites.Analysis | None
  paths: tuple[str, ...]
  constant_leaf: Callable[[Any], int | None]
  compiled: dict[str, Callable] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def analysis(self) -> sites.Analysis:
    """The program's sites."""
    if self.given is not None:
      return self.given
    return sites.analyse(self.program, self.paths, self.constant_leaf)


class Tracer:
  """Traces one function for any arguments, once per shapes.

  Python values among the arguments and parameters (flags, sizes, functions)
  stay Python values, as in an eager call; arrays become inputs of the program.

  Args:
    apply: the user's function of `(params, *args, **kwargs)`.
    captured: fingerprints of parameters that the function closed over, by
      path; found at planning time, when the parameters are at hand.
  """

  def __init__(
    self, apply: Callable, captured: Mapping[str, str] | None = None
  ):
    if not callable(apply):
      raise TypeError(
        'apply must be a function of (params, *args), got '
        f'{type(apply).__name__}'
      )
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
    rest, a_tree = jax.tree.flatten((tuple(args), dict(kwargs)))
    values = (*(leaf for _, leaf in named), *rest)
    dynamic = tuple(is_stored(x) or _jaxpr.is_array(x) for x in values)
    paths = tuple(
      path_str(path) for (path, _), d in zip(named, dynamic, strict=False) if d
    )
    arrays = [x for x, d in zip(values, dynamic, strict=True) if d]
    static = tuple(x for x, d in zip(values, dynamic, strict=True) if not d)
    avals = _jaxpr.alike([_jaxpr.abstract(logical(x)) for x in arrays])
    key = _key(p_tree, a_tree, dynamic, static, avals)
    found = self._cache.get(key) if key is not None else None
    leaves, inputs = arrays[: len(paths)], arrays[len(paths) :]
    if found is None:
      _refuse_twins(paths)
      call = _Call(self.apply, (p_tree, a_tree), len(named), dynamic, static)
      try:
        found = self._trace(call, avals, paths, leaves)
      except _USER_ERRORS as error:
        error.add_note(_calling(self.apply, params, args, kwargs))
        raise
      if key is not None and found.program.cacheable:
        self._cache[key] = found
    return found, leaves, inputs

  def _trace(self, call, avals, paths, leaves):
    program = _jaxpr.trace(call, len(paths), avals)
    constant_leaf = self._matcher(program, paths, leaves)
    return Traced(program, None, paths, constant_leaf)

  def _matcher(self, program, paths, leaves) -> Callable[[Any], int | None]:
    """Recognizes closed-over parameters by identity, later by content."""
    by_id = {id(leaf): i for i, leaf in enumerate(leaves)}
    by_print = {
      print_: paths.index(path)
      for path, print_ in self.captured.items()
      if path in paths
    }
    kinds = {_kind(leaves[i]) for i in by_print.values()}
    found: dict[int, int | None] = {}
    for const in _jaxpr.all_consts(program):
      leaf = by_id.get(id(const))
      tracer = _jaxpr.is_tracer(const)
      if leaf is None and not tracer and _kind(const) in kinds:
        leaf = by_print.get(fingerprint(const))
      found[id(const)] = leaf
    # The program holds its constants, so that an id stays what it means.
    return lambda const: found.get(id(const))


def _calling(apply, params, args, kwargs) -> str:
  """What was being called when the user's function raised."""

  def one(x):
    x = logical(x)
    shaped = hasattr(x, 'shape') and hasattr(x, 'dtype')
    return f'{x.dtype}{list(x.shape)}' if shaped else type(x).__name__

  if isinstance(params, Mapping):
    first = f'a {type(params).__name__} of {sorted(map(str, params))[:8]}'
  else:
    first = f'{one(params)}'
  given = jax.tree.map(one, (tuple(args), dict(kwargs)), is_leaf=is_stored)
  return (
    f'quantlab was tracing {getattr(apply, "__name__", "apply")}(params, *args,'
    f' **kwargs) with params={first}, args={given[0]}, kwargs={given[1]}'
  ).replace("'", '')


def _kind(x: Any) -> tuple[Any, str]:
  return tuple(np.shape(x)), str(x.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
  """A user's call as a function of its array leaves alone."""

  apply: Callable
  trees: tuple[Any, Any]
  num_named: int
  dynamic: tuple[bool, ...]
  static: tuple[Any, ...]

  def __call__(self, *arrays):
    moving, fixed = iter(arrays), iter(self.static)
    values = [next(moving) if d else next(fixed) for d in self.dynamic]
    p_tree, a_tree = self.trees
    params = jax.tree.unflatten(p_tree, values[: self.num_named])
    args, kwargs = jax.tree.unflatten(a_tree, values[self.num_named :])
    return self.apply(params, *args, **kwargs)


def _refuse_twins(paths: Sequence[str]) -> None:
  if len(set(paths)) < len(paths):
    twins = sorted({p for p in paths if paths.count(p) > 1})
    raise ValueError(
      f'parameters share a path: {", ".join(twins)}; rename one (a key that '
      "holds '/' reads like two nested keys)"
    )


def closed_over(traced: Traced) -> dict[str, str]:
  """Fingerprints by path of the parameters a program holds as constants."""
  found = {}
  for const in _jaxpr.all_consts(traced.program):
    leaf = traced.constant_leaf(const)
    if leaf is not None:
      found[traced.paths[leaf]] = fingerprint(const)
  return found


def fingerprint(array: Any) -> str:
  """Content hash of an array: dtype, shape and bytes."""
  x = np.asarray(array)
  digest = hashlib.sha256(f'{x.dtype}{x.shape}'.encode())
  digest.update(np.ascontiguousarray(x).view(np.uint8).tobytes())
  return digest.hexdigest()


def _key(p_tree, a_tree, dynamic, static, avals) -> Any:
  """Hashable cache key, or None where a Python argument is unhashable."""
  shapes = tuple(
    (a.shape, str(a.dtype), a.weak_type, *_jaxpr.manual(a).values())
    for a in avals
  )
  # True == 1 and 0.0 == -0.0 in Python, but not in a traced function.
  typed = tuple(
    (type(x), x.hex() if isinstance(x, float) else x) for x in static
  )
  key = (p_tree, a_tree, dynamic, typed, shapes, _jaxpr.config_key())
  try:
    hash(key)
  except TypeError:
    return None
  return key
