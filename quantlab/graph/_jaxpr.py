"""The seam: the only module that touches JAX's intermediate representation.

JAX renames parts of its jaxprs between releases (0.10 to 0.12 moved `scan`'s
counts into flat trees, merged `ClosedJaxpr` with `Jaxpr`, made `jit`'s inline
flag an enum). Everything that depends on such details is here: tracing a
function to a `Program`, reading an equation's parts, evaluating an equation as
it was, and rebuilding a container (jit, scan, cond, while, remat) around a
body that has been replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src import source_info_util
from jax.extend import core as jex_core

Literal = jex_core.Literal
Var = jex_core.Var
DropVar = jex_core.DropVar
Jaxpr = jex_core.Jaxpr
typeof = jax.typeof

# Containers whose body is walked; `custom_vjp_call` is walked only where a
# chosen site lies inside, because walking drops the user's derivative rule.
CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'remat2': 'jaxpr',
  'checkpoint': 'jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'custom_vjp_call_jaxpr': 'fun_jaxpr',
}
# All containers whose body is walked.
CONTAINERS = frozenset([*CALLS, 'scan', 'shard_map', 'cond', 'while'])
# Frequent primitives whose parameters hold no body (a fast test).
_BODILESS = frozenset(
  [
    'add',
    'sub',
    'mul',
    'div',
    'neg',
    'max',
    'min',
    'exp',
    'log',
    'tanh',
    'sin',
    'cos',
    'rsqrt',
    'sqrt',
    'pow',
    'integer_pow',
    'logistic',
    'select_n',
    'eq',
    'ne',
    'lt',
    'le',
    'gt',
    'ge',
    'and',
    'or',
    'not',
    'abs',
    'sign',
    'convert_element_type',
    'broadcast_in_dim',
    'reshape',
    'transpose',
    'squeeze',
    'slice',
    'concatenate',
    'iota',
    'pad',
    'reduce_sum',
    'reduce_max',
    'reduce_min',
    'argmax',
    'stop_gradient',
    'copy',
  ]
)
# Primitives that multiply and sum.
PRODUCTS = ('dot_general', 'conv_general_dilated', 'ragged_dot_general')
# Types of parameters that hold no body (a fast test, made for every equation).
_PLAIN = frozenset(
  [int, float, bool, str, type(None), np.dtype, type(np.dtype('float32'))]
)
# The user's own derivative rule is lost when one of these is walked.
CUSTOM_RULES = ('custom_jvp_call', 'custom_vjp_call', 'custom_vjp_call_jaxpr')


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A traced function: a flat list of equations and how to call it.

  Attributes:
    jaxpr: the equations; its first `num_params` inputs are the parameters.
    consts: arrays the function closed over.
    num_params: number of parameter leaves.
    out_tree: structure of the function's result.
  """

  jaxpr: Any
  consts: tuple[Any, ...]
  num_params: int
  out_tree: Any

  @property
  def cacheable(self) -> bool:
    """False where the function closed over a tracer of an outer transform."""
    return not any(map(is_tracer, self.consts))


def trace(fn: Callable, num_params: int, avals: Sequence[Any]) -> Program:
  """Traces `fn(*leaves)` on shapes; the first `num_params` are parameters."""
  box = []

  def flat(*leaves):
    out, tree = jax.tree.flatten(fn(*leaves))
    box.append(tree)
    return out

  closed = jax.make_jaxpr(flat)(*avals)
  jaxpr, consts = open_jaxpr(closed)
  return Program(jaxpr, tuple(consts), num_params, box[-1])


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """Splits a closed or open jaxpr of any release into (jaxpr, consts)."""
  return getattr(jaxpr, 'jaxpr', jaxpr), getattr(jaxpr, 'consts', ()) or ()


def all_consts(program: Program) -> list[Any]:
  """Arrays that a program and the bodies in it close over."""
  found = list(program.consts)

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      for inner, consts in inner_jaxprs(eqn):
        found.extend(consts)
        visit(inner)

  visit(program.jaxpr)
  return found


def abstract(x: Any) -> jax.ShapeDtypeStruct:
  """Shape, dtype and weak type of an array, tracer or ShapeDtypeStruct."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return x
  aval = typeof(x)
  return jax.ShapeDtypeStruct(
    aval.shape,
    aval.dtype,
    weak_type=bool(getattr(aval, 'weak_type', False)),
    **manual(aval),
  )


def manual(aval: Any) -> dict[str, Any]:
  """How shard_map says that a value differs between devices."""
  if not varying(aval):
    return {}
  mesh = jax.sharding.get_abstract_mesh()
  placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  word = 'manual_axis_type' if hasattr(aval, 'manual_axis_type') else 'vma'
  return {word: getattr(aval, word), 'sharding': placed}


def alike(avals: Sequence[Any]) -> list[Any]:
  """Those of stored leaves too vary as the arrays do (see `all_varying`)."""
  first = next(filter(varying, avals), None)
  if first is None:
    return list(avals)
  return [a.update(**manual(first)) for a in avals]


def varying(aval: Any) -> frozenset:
  """Axes of a mesh along which a value differs, where shard_map checks it."""
  found = getattr(aval, 'manual_axis_type', aval)
  return getattr(found, 'varying', getattr(found, 'vma', None)) or frozenset()


def all_varying(values: Any) -> Any:
  """Arrays as values that differ along every axis that one of them does.

  The transpose sums their derivatives over the devices that share them.
  """
  if not jax.sharding.get_abstract_mesh().manual_axes:  # not in shard_map
    return values
  leaves, tree = jax.tree.flatten(values)
  known = [varying(typeof(x)) if is_array(x) else None for x in leaves]
  axes = frozenset().union(*(k for k in known if k))
  if not axes:
    return values

  def vary(x, k):
    if k is None or k == axes:
      return x
    return lax.pcast(x, tuple(sorted(axes - k)), to='varying')

  return jax.tree.unflatten(tree, map(vary, leaves, known))


def is_tracer(x: Any) -> bool:
  """Whether a value belongs to a transformation outside the program."""
  return isinstance(x, jax.core.Tracer)


def is_array(x: Any) -> bool:
  return isinstance(
    x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
  )


_CONFIG = (
  'jax_enable_x64',
  'jax_default_matmul_precision',
  'jax_numpy_dtype_promotion',
  'jax_numpy_rank_promotion',
  'jax_threefry_partitionable',
  'jax_debug_nans',
  'jax_disable_jit',
)


def config_key() -> tuple[Any, ...]:
  """Everything outside the arguments that a trace depends on."""
  mesh = jax.sharding.get_abstract_mesh()
  return (*(getattr(jax.config, name) for name in _CONFIG), mesh)


def inner_jaxprs(eqn: Any) -> list[tuple[Any, Sequence[Any]]]:
  """The bodies of a container that may be walked, in a fixed order.

  `cond` gives its branches, `while` its condition and its body; a primitive
  that is not a known container gives none (it is opaque).
  """
  name = eqn.primitive.name
  if name in CALLS:
    return [open_jaxpr(eqn.params[CALLS[name]])]
  if name in ('scan', 'shard_map'):
    return [open_jaxpr(eqn.params['jaxpr'])]
  if name == 'cond':
    return [open_jaxpr(b) for b in eqn.params['branches']]
  if name == 'while':
    return [
      open_jaxpr(eqn.params['cond_jaxpr']),
      open_jaxpr(eqn.params['body_jaxpr']),
    ]
  return []


def opaque_contractions(eqn: Any) -> int:
  """Number of products inside a primitive whose body is never walked."""
  if eqn.primitive.name in _BODILESS or not (bodies := _subs(eqn)):
    return 0
  if eqn.primitive.name in CONTAINERS:
    return 0

  def count(jaxpr):
    own = sum(e.primitive.name in PRODUCTS for e in jaxpr.eqns)
    return own + sum(count(s) for e in jaxpr.eqns for s in _subs(e))

  return sum(count(s) for s in bodies)


def _subs(eqn: Any) -> list[Any]:
  """All bodies among an equation's parameters, walkable or not."""
  found = []
  for value in eqn.params.values():
    kind = type(value)
    if kind in _PLAIN:
      continue
    for item in value if kind in (tuple, list) else (value,):
      if type(item) in _PLAIN:
        continue
      jaxpr = getattr(item, 'jaxpr', item)
      if hasattr(jaxpr, 'eqns') and hasattr(jaxpr, 'invars'):
        found.append(jaxpr)
  return found


def contains(eqn: Any, name: str) -> bool:
  """Whether an equation is, or holds at any depth, a primitive."""
  if eqn.primitive.name == name:
    return True
  return any(contains(e, name) for jaxpr in _subs(eqn) for e in jaxpr.eqns)


def has_effects(eqn: Any) -> bool:
  """Whether an equation does more than compute (prints, callbacks)."""
  return bool(eqn.effects)


def scan_counts(eqn: Any) -> tuple[int, int]:
  """(number of constants, number of carries) of a scan equation."""
  if 'num_consts' in eqn.params:
    return eqn.params['num_consts'], eqn.params['num_carry']
  consts, carry, _ = eqn.params['ft_in'].unpack()
  return len(consts), len(carry)


def while_counts(eqn: Any) -> tuple[int, int]:
  """(constants of the condition, constants of the body) of a while loop."""
  return eqn.params['cond_nconsts'], eqn.params['body_nconsts']


def dtype_name(aval: Any) -> str:
  return _dtype_name(aval.dtype)


@functools.lru_cache(maxsize=256)
def _dtype_name(dtype: Any) -> str:
  return str(dtype)  # slow in NumPy, and asked for every site


def name_stack(eqn: Any) -> str:
  return str(eqn.source_info.name_stack)


def function_name(eqn: Any) -> str:
  """Name of the user's function that a call stands for."""
  info = getattr(_subs(eqn)[0], 'debug_info', None)
  return getattr(info, 'func_name', eqn.primitive.name)


@contextlib.contextmanager
def eqn_context(eqn: Any):
  """The name stack and compute context in which an equation was traced."""
  stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
  with source_info_util.user_context(
    eqn.source_info.traceback, name_stack=stack
  ):
    manager = getattr(eqn.ctx, 'manager', contextlib.nullcontext())
    with manager:
      yield


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
  """Evaluates an equation exactly as it was traced."""
  primitive, source = eqn.primitive, eqn.source_info
  params = primitive.get_bind_params(eqn.params)
  stack = source_info_util.current_name_stack() + source.name_stack
  context = source_info_util.user_context(source.traceback, name_stack=stack)
  manager = getattr(eqn.ctx, 'manager', None) or contextlib.nullcontext()
  with context, manager:
    out = primitive.bind(*args, **params)
  return list(out) if primitive.multiple_results else [out]


def bind_together(
  jaxpr: Any,
  eqns: Sequence[Any],
  inputs: Sequence[Any],
  outputs: Sequence[Any],
  args: Sequence[Any],
) -> list[Any]:
  """Evaluates neighbouring equations as they were traced, as one call.

  They are kept as they are instead of being traced one by one, so that a
  rewrite costs little where it changes nothing.

  Args:
    jaxpr: the jaxpr that the equations are from; they have no effects.
    eqns: the equations.
    inputs: variables that they read and do not make.
    outputs: variables that they make and that are wanted.
    args: values of the inputs.
  """
  body = Jaxpr(
    [],
    list(inputs),
    list(outputs),
    list(eqns),
    jex_core.no_effects,
    jaxpr.debug_info.with_unknown_names(),
  )
  call = _jit_call(jax.sharding.get_abstract_mesh())
  params = dict(call.params)
  for name, count in (
    ('in_shardings', len(inputs)),
    ('in_layouts', len(inputs)),
    ('donated_invars', len(inputs)),
    ('out_shardings', len(outputs)),
    ('out_layouts', len(outputs)),
  ):
    params[name] = params[name][:1] * count
  params |= {'jaxpr': jex_core.ClosedJaxpr(body, ()), 'name': 'unchanged'}
  bound = call.primitive.get_bind_params(params)
  return list(call.primitive.bind(*args, **bound))


@functools.lru_cache(maxsize=16)
def _jit_call(mesh: Any) -> Any:
  """An equation of `jit` in this mesh, whose parameters are a template."""
  del mesh  # the context it stands for is the current one
  return jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns[0]


def evaluate(program: Program, args: Sequence[Any]) -> list[Any]:
  """Evaluates a program exactly as it was traced; a flat list of results."""
  jaxpr = program.jaxpr
  env = dict(zip(jaxpr.constvars, program.consts, strict=True))
  env.update(zip(jaxpr.invars, args, strict=True))

  def read(atom):
    return atom.val if isinstance(atom, Literal) else env[atom]

  for eqn in jaxpr.eqns:
    outs = bind(eqn, [read(a) for a in eqn.invars])
    env.update(zip(eqn.outvars, outs, strict=True))
  return [read(a) for a in jaxpr.outvars]


def call(eqn: Any, body: Callable, args: Any) -> Any:
  """Rebuilds a one-body call (jit, remat, custom rule) around `body(args)`.

  `jit` keeps its name, inline flag, donation is dropped (an inner donation
  has no effect under an outer trace) and shardings are kept where they were
  given; `remat` keeps its policy. A custom derivative rule is dropped: JAX
  differentiates the new body.
  """
  name = eqn.primitive.name
  with eqn_context(eqn):
    if name in ('jit', 'pjit'):
      body.__name__ = eqn.params['name']
      options = dict(eqn.params.get('compiler_options_kvs') or ()) or None
      return jax.jit(
        body, inline=eqn.params['inline'], compiler_options=options
      )(args)
    if name in ('remat2', 'checkpoint'):
      return jax.checkpoint(
        body,
        prevent_cse=eqn.params['prevent_cse'],
        policy=eqn.params['policy'],
      )(args)
    return body(args)


def has_shardings(eqn: Any) -> bool:
  """True for a jit equation that fixes shardings of its operands."""
  given = (*eqn.params['in_shardings'], *eqn.params['out_shardings'])
  return any(type(s).__name__ != 'UnspecifiedValue' for s in given)


def constrain(eqn: Any, which: str, values: Sequence[Any]) -> list[Any]:
  """Applies a jit equation's given shardings to dense values."""
  out = []
  for value, sharding in zip(values, eqn.params[which], strict=True):
    fixed = type(sharding).__name__ != 'UnspecifiedValue'
    dense = fixed and isinstance(value, jax.Array)
    out.append(
      lax.with_sharding_constraint(value, sharding) if dense else value
    )
  return out


def scan(
  eqn: Any, body: Callable, carry: Any, xs: Any, length: int | None = None
) -> tuple[Any, Any]:
  """Rebuilds a scan around `body(carry, xs) -> (carry, ys)`.

  Args:
    eqn: the scan.
    body: its new body.
    carry: what it starts with.
    xs: what it goes over.
    length: of xs, where it is shorter than the scan.
  """
  p = eqn.params
  n = p['length'] if length is None else length
  unroll = max(1, min(p['unroll'], n))
  with eqn_context(eqn):
    return lax.scan(body, carry, xs, n, reverse=p['reverse'], unroll=unroll)


def cond(eqn: Any, index: Any, branches: Sequence[Callable], args: Any) -> Any:
  with eqn_context(eqn):
    return lax.switch(index, branches, args)


def while_loop(eqn: Any, test: Callable, body: Callable, carry: Any) -> Any:
  with eqn_context(eqn):
    return lax.while_loop(test, body, carry)
