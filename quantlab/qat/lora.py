"""LoRA on a quantized base: the codes stay, low-rank matrices are trained.

A product x W_q becomes x W_q + (x A) B alpha / r (LoRA, arXiv 2106.09685; on
4-bit weights QLoRA, arXiv 2305.14314). A and B are state of the site,
`sites[id]['adapter']`, so that any function that `ql.quantized` runs takes
them, in scanned stacks too, and nothing of the user's model is changed.

With `bits=` A and B are themselves codes of few bits, of a codebook that is
optimal for a normal law (arXiv 2307.16867).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from quantlab import rewrites
from quantlab.core import QTensor, presets
from quantlab.core.tree import is_qtensor, path_str
from quantlab.graph import segments
from quantlab.plan import Plan, SitePlan
from quantlab.ptq.model import Quantized
from quantlab.qat import low_bit
from quantlab.qat.start import thawed
from quantlab.recipe import expression

Adapters = dict[str, dict[str, Array]]


class Lora(NamedTuple):
  """Training of low-rank adapters on one quantized model; see `lora`.

  Attributes:
    init: `(key, params) -> variables`, those of the model with adapters.
    apply: `(variables, *args, **kwargs) -> outputs`, differentiable.
    freeze: `(variables, *args, **kwargs) -> Quantized`, with low-bit products
      and adapters; the arguments are not read (`QAT.freeze` may need them).
    merge: `(variables, *, requantize=False)`: float parameters in the user's
      structure, or a `Quantized` of the same plan, without adapters.
  """

  init: Callable[..., dict[str, Any]]
  apply: Callable[..., Any]
  freeze: Callable[..., Quantized]
  merge: Callable[..., Any]


def lora(
  apply: Callable,
  plan: Plan,
  pattern: str,
  *,
  rank: int = 8,
  alpha: float = 16.0,
  bits: int | None = None,
) -> Lora:
  """Low-rank adapters on the products of a quantized model.

    adapted = ql.lora(apply, model.plan, 'attention', rank=8)
    variables = adapted.init(key, model.params)

    def loss(adapters):
      return f(adapted.apply(ql.with_adapters(variables, adapters), batch))

    grads = jax.grad(loss)(ql.adapters(variables))

  B begins at zero, so that training begins at the quantized model. Only A and
  B have gradients; they flow through the quantized products (straight through
  quantized activations). `ql.load` and `ql.save` keep a frozen model whole.

  Args:
    apply: the float function that the plan was made for.
    plan: of the quantized model.
    pattern: `re.search` on '/' + parameter path, or on the site's name after
      'site:'; of the products whose weights the plan quantizes.
    rank: columns of A, rows of B.
    alpha: the adapters' strength is alpha / rank.
    bits: store A and B in codes of this many bits, 1 to 8, trained straight
      through rounding; float32 when None.

  Raises:
    ValueError: a pattern that meets no quantized product, or one that is no
      dense product (a convolution, a lookup); a rank that does not fit.
  """
  if not isinstance(plan, Plan):
    raise TypeError(
      f'the plan is that of the quantized model, model.plan, found '
      f'{type(plan).__name__}'
    )
  if bits is not None and bits not in range(1, 9):
    raise ValueError(f'bits takes 1 to 8, or None for float32, found {bits!r}')
  if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
    raise ValueError(f'rank takes a positive integer, found {rank!r}')
  if not alpha > 0:
    raise ValueError(f'alpha is positive, found {alpha!r}')
  quantizer = bits and presets.codebook(bits=bits, per='tensor')
  sites = _chosen(plan, pattern, rank)

  def init(key: Array, params: Any) -> dict[str, Any]:
    if not rewrites.is_variables(params):
      raise TypeError(
        'init takes the params of a quantized model (ql.ptq, ql.load or '
        f'freeze), found {type(params).__name__}'
      )
    keys = jax.random.split(key, len(sites))
    made = {
      name: _initial(k, site, rank, alpha, bits)
      for k, (name, site) in zip(keys, sites.items(), strict=True)
    }
    return _with(params, made)

  run = rewrites.quantized(apply, plan, integer=False)

  @functools.wraps(apply)
  def simulated(variables, *args, **kwargs):
    if quantizer:
      rounded = jax.tree.map(
        functools.partial(low_bit.simulate, quantizer=quantizer),
        adapters(variables),
      )
      variables = with_adapters(variables, rounded)
    return run(variables, *args, **kwargs)

  def freeze(variables: Mapping[str, Any], *args, **kwargs) -> Quantized:
    del args, kwargs
    if quantizer:
      stored = jax.tree.map(
        functools.partial(low_bit.store, quantizer=quantizer),
        adapters(variables),
      )
      variables = _with(variables, stored)
    return Quantized(
      rewrites.quantized(apply, plan),
      dict(variables),
      plan,
      {'transform': ['lora']},
    )

  def merge(variables: Mapping[str, Any], *, requantize: bool = False) -> Any:
    whole = _merged(plan, sites, freeze(variables).params, requantize)
    if not requantize:
      return segments.joined(thawed(whole))
    report = {'transform': ['lora', 'merge']}
    return Quantized(rewrites.quantized(apply, plan), whole, plan, report)

  return Lora(init, simulated, freeze, merge)


def adapters(variables: Mapping[str, Any]) -> Adapters:
  """What is trained: {site id: {'a': (..., K, r), 'b': (..., r, N)}}."""
  return {
    name: {k: roles['adapter'][k] for k in ('a', 'b')}
    for name, roles in variables['sites'].items()
    if 'adapter' in roles
  }


def with_adapters(
  variables: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, Any]:
  """The variables with these matrices in the place of their own.

  Raises:
    ValueError: a site that has no adapter, or one of another shape.
  """
  known = adapters(variables)
  if strange := sorted(set(new) - set(known)):
    raise ValueError(
      f'the sites {strange} have no adapter; make variables with init first'
    )
  for name, leaves in new.items():
    there, here = (
      {k: jnp.shape(x[k]) for k in leaves} for x in (known[name], leaves)
    )
    if there != here:
      raise ValueError(
        f'the adapter of {name!r} has the shapes {there}, the new one {here}'
      )
  return _with(variables, new)


def _with(variables, new):
  sites = {k: dict(v) for k, v in variables['sites'].items()}
  for name, leaves in new.items():
    mine = sites.setdefault(name, {})
    mine['adapter'] = {**mine.get('adapter', {}), **leaves}
  return {**variables, 'sites': sites}


def _chosen(plan: Plan, pattern: str, rank: int) -> dict[str, SitePlan]:
  """The sites that get adapters, checked."""
  named = pattern.startswith('site:')
  found_by = expression(pattern.removeprefix('site:'), 'the pattern')
  coded = {k: s for k, s in plan.quantized.items() if s.rule and s.rule.weight}
  found = {
    k: s
    for k, s in coded.items()
    if any(map(found_by.search, [k] if named else [f'/{p}' for p in s.paths]))
  }
  if not found:
    raise ValueError(
      f'{pattern!r} meets none of the products whose weights the plan '
      f'quantizes: {list(coded)}'
    )
  if other := {k: s.kind for k, s in found.items() if s.kind != 'dot'}:
    raise ValueError(
      f'{pattern!r} meets {other}; adapters are for dense products alone '
      '(dot): narrow the pattern'
    )
  for name, site in found.items():
    k, n = site.matrix[-2:]
    if rank > min(k, n):
      raise ValueError(
        f'{rank=} does not fit the weight of {name!r}, a matrix {k} x {n}; '
        f'use at most {min(k, n)}, or leave it out of {pattern!r}'
      )
  return found


def _initial(
  key: Array, site: SitePlan, rank: int, alpha: float, bits: int | None
) -> dict[str, Array]:
  """A as in LoRA; B zero, or tiny where its spread scales its codes."""
  batch = site.matrix[len(site.weight_loops) : -2]
  lead, (k, n) = (*site.loops, *batch), site.matrix[-2:]
  key_a, key_b = jax.random.split(key)
  bound = 1 / np.sqrt(k)
  a = jax.random.uniform(key_a, (*lead, k, rank), minval=-bound, maxval=bound)
  b = jnp.zeros((*lead, rank, n))
  if bits is not None:
    b = 1e-3 * jax.random.truncated_normal(key_b, -2.0, 2.0, b.shape)
  return {'a': a, 'b': b, 'scale': jnp.full((*lead, 1, 1), alpha / rank)}


def _merged(
  plan: Plan,
  sites: Mapping[str, SitePlan],
  variables: Mapping[str, Any],
  requantize: bool,
) -> dict[str, Any]:
  """Variables whose weights hold the adapters: codes again, or floats."""
  _check_merge(plan, sites, requantize)
  homes: dict[str, tuple[str, Any]] = {}
  for name, site in sites.items():
    computed = name in plan.effective
    storage = plan.effective[name] if computed else plan.leaves[site.paths[0]]
    homes[name if computed else site.paths[0]] = name, storage

  def add(where: str, leaf: Any) -> Any:
    if where not in homes or not is_qtensor(leaf):
      return leaf
    name, storage = homes[where]
    found = variables['sites'][name]['adapter']
    a, b = (x.dequantize() if is_qtensor(x) else x for x in _pair(found))
    delta = jnp.matmul(a, b, precision='highest') * found['scale']
    w = leaf.dequantize() + storage.layout.to_logical(delta).astype(leaf.dtype)
    return storage.quantize(w) if requantize else w

  rest = {
    name: {r: v for r, v in roles.items() if r != 'adapter'}
    for name, roles in variables['sites'].items()
  }
  weights = jax.tree_util.tree_map_with_path(
    lambda path, leaf: add(path_str(path), leaf),
    variables['weights'],
    is_leaf=lambda x: isinstance(x, QTensor),
  )
  effective = {k: add(k, v) for k, v in variables.get('effective', {}).items()}
  return {
    'weights': weights,
    'sites': {k: v for k, v in rest.items() if v},
    'effective': effective,
  }


def _pair(adapter):
  return adapter['a'], adapter['b']


def _check_merge(
  plan: Plan, sites: Mapping[str, SitePlan], requantize: bool
) -> None:
  """Refuses to merge where no weight of the site alone can take it in."""
  for name, site in sites.items():
    if name in plan.effective:
      if requantize:
        continue
      why = 'its weight is computed from several parameters; requantize=True'
      raise ValueError(f'cannot merge the adapter of {name!r}: {why} can')
    users = [k for k, s in plan.sites.items() if set(s.paths) & set(site.paths)]
    if len(site.paths) > 1 or len(users) > 1:
      raise ValueError(
        f'cannot merge the adapter of {name!r}: its weight {site.paths} is '
        f'joined from, or shared by, {users}; freeze keeps it beside'
      )
    if site.loops != site.weight_loops:
      raise ValueError(
        f'cannot merge the adapter of {name!r}: each of {site.loops} runs of '
        'its loop has its own, over one weight; freeze keeps it beside'
      )
