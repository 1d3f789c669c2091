"""Which implementation of an operation runs, and why.

An operation is a folder. Each file of it named in `PREFERENCE` is a backend,
found when the operation is first used, so that a backend is added by adding
one file. A backend has

  run(*operands, **options)       the computation;
  refuses(*operands, **options)   None, or the reason why it cannot run;
  route(*operands, **options)     one line: how it would run, and why.

`implementation=None` takes the first backend in the order of preference that
does not refuse; a name means that backend or an error, as it does for all that
is traced inside `use(name)`. The choice is made at
trace time, from shapes, dtypes and the platform.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

PREFERENCE = ('cpu', 'mosaic', 'triton', 'xla', 'reference')

_OPS: dict[str, 'Op'] = {}
_LOG: contextvars.ContextVar[list['Choice'] | None] = contextvars.ContextVar(
  'quantlab_kernels_choices', default=None
)
_USED: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  'quantlab_kernels_used', default=None
)


class Backend(Protocol):
  """What a backend file of an operation defines."""

  run: Callable[..., Any]
  refuses: Callable[..., str | None]
  route: Callable[..., str]


@dataclasses.dataclass(frozen=True)
class Choice:
  """The backend one call takes, how it runs, and who refused before it."""

  op: str
  operands: str
  implementation: str
  route: str
  refusals: tuple[tuple[str, str], ...]

  def __str__(self):
    lines = [f'{self.op}({self.operands})']
    lines += [f'  {name}: refused, {why}' for name, why in self.refusals]
    return '\n'.join([*lines, f'  {self.implementation}: {self.route}'])


class Op:
  """One operation and its backends."""

  def __init__(self, name: str):
    self.name = name
    self._added: dict[str, Backend] = {}
    _OPS[name] = self

  @property
  def _package(self) -> str:
    return f'{__package__}.{self.name}'

  @functools.cached_property
  def _files(self) -> tuple[str, ...]:
    found = importlib.util.find_spec
    return tuple(n for n in PREFERENCE if found(f'{self._package}.{n}'))

  def names(self) -> tuple[str, ...]:
    """Returns the names of the backends, preferred first."""
    return (*self._added, *self._files)

  def backend(self, name: str) -> Backend:
    """Returns the backend of that name, or says which there are."""
    if name in self._added:
      return self._added[name]
    names = self.names()
    if name not in names:
      near = difflib.get_close_matches(str(name), names, 1)
      hint = f', did you mean {near[0]!r}?' if near else ''
      raise ValueError(
        f'{self.name}: no implementation {name!r}{hint or ";"} expected None '
        f'or one of {names}'
      )
    module: Any = importlib.import_module(f'{self._package}.{name}')
    return module

  def register(self, name: str, backend: Backend) -> Callable[[], object]:
    """Adds a backend ahead of the others; returns a function removing it."""
    self._added = {name: backend, **self._added}
    return lambda: self._added.pop(name)

  def __call__(self, implementation: str | None, *operands, **options):
    """Runs the first backend that does not refuse, or raises every refusal."""
    wanted = implementation or _USED.get()
    names = (wanted,) if wanted else self.names()
    refusals: list[tuple[str, str]] = []
    for name in names:
      backend = self.backend(name)
      why = backend.refuses(*operands, **options)
      if why is not None:
        refusals.append((name, why))
        continue
      log = _LOG.get()
      if log is not None:
        text = _describe(operands, options)
        route = backend.route(*operands, **options)
        log.append(Choice(self.name, text, name, route, tuple(refusals)))
      return backend.run(*operands, **options)
    reasons = '; '.join(f'{name!r} cannot run: {why}' for name, why in refusals)
    raise ValueError(f'{self.name}({_describe(operands, options)}): {reasons}')


def runs_anywhere(*operands, **options) -> None:
  """The `refuses` of a backend made of plain XLA operations."""
  del operands, options


def is_definition(*operands, **options) -> str:
  """The `route` of a reference."""
  del operands, options
  return 'the definition, as written'


def _describe(operands, options) -> str:
  parts = [f'{a.dtype}{list(a.shape)}' for a in operands if a is not None]
  return ', '.join(parts + [f'{k}={_short(v)}' for k, v in options.items()])


def _short(value) -> str:
  return getattr(value, '__name__', None) or str(value)


@contextlib.contextmanager
def _recording() -> Iterator[list[Choice]]:
  log: list[Choice] = []
  token = _LOG.set(log)
  try:
    yield log
  finally:
    _LOG.reset(token)


@contextlib.contextmanager
def use(implementation: str | None) -> Iterator[None]:
  """What is traced inside takes this backend of every operation, or raises.

  A call's own `implementation=` comes first. None changes nothing.

  Args:
    implementation: a backend's name, such as 'reference' or 'xla'.
  """
  token = _USED.set(implementation or _USED.get())
  try:
    yield
  finally:
    _USED.reset(token)


def choices(op: Callable[..., Any], *args, **kwargs) -> list[Choice]:
  """Returns what `op(*args, **kwargs)` would run, without running it.

  Args:
    op: a public operation of this package, or any function that calls some.
    *args: its arguments; arrays may be given as `jax.ShapeDtypeStruct`.
    **kwargs: its keyword arguments, likewise.
  """
  leaves, tree = jax.tree.flatten((args, kwargs))
  traced = [hasattr(x, 'shape') and hasattr(x, 'dtype') for x in leaves]

  def call(arrays):
    it = iter(arrays)
    filled = [next(it) if t else x for x, t in zip(leaves, traced, strict=True)]
    a, k = jax.tree.unflatten(tree, filled)
    return op(*a, **k)

  with _recording() as log:
    jax.eval_shape(call, [x for x, t in zip(leaves, traced, strict=True) if t])
  return log


def explain(op: Callable[..., Any], *args, **kwargs) -> None:
  """Prints the choice that `op(*args, **kwargs)` makes, and the refusals.

  Takes the arguments of `choices`. Nothing is computed or compiled.
  """
  for choice in choices(op, *args, **kwargs):
    print(choice)
