"""Weights of a quantized model in the order the kernels read them fastest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from quantlab import core
from quantlab.core import QTensor
from quantlab.core import tree as tree_lib
from quantlab.plan import Plan, SitePlan, check_variables
from quantlab.ptq.model import Quantized
from quantlab_kernels.panels import COLUMNS


def prepack(model: Quantized, target: str = 'cpu') -> Quantized:
  """Packs weights ahead as `target` reads them, once.

  For 'cpu' these are the weights of 8, 4 and 2 bits that dense products with
  8-bit activations use, and tied embeddings: memory is fastest in long runs.
  Everything else is read as it is stored, and stays so: other widths, groups
  that are no multiples of 4, 8 or 16 codes of these, kernels of convolutions,
  joined or sliced weights, and so few columns that panels of 64 would be more
  than an eighth larger. Outputs are the same to the last bit where a column has
  one scale; sums over groups, and with strict=False what operations on floats
  make of codes, are the same to rounding. `ql.save` writes the canonical layout
  all the same; what changes codes (training, search) takes the model before
  this.

  Pure: `jax.eval_shape(lambda: prepack(model).params)` gives the shapes of what
  it makes. Columns may be sharded where their number is a multiple of 64.

  Args:
    model: what `ql.ptq` or `ql.load` returned.
    target: 'cpu', or 'canonical' to undo it.

  Returns:
    The model; `report['prepacked']` lists what was packed.
  """
  if not isinstance(model, Quantized):
    raise TypeError(
      f'prepack takes what ql.ptq or ql.load returns, found '
      f'{type(model).__name__}; quantlab.core.prepack takes a QTensor'
    )
  core.check_target(target)
  check_variables(model.params, 'prepack')
  found = set(_dense(model.plan)) if target == 'cpu' else set()
  packed: list[str] = []

  def one(name: str, leaf: Any) -> Any:
    if not isinstance(leaf, QTensor):
      return leaf
    if name not in found or not _gains(leaf):
      return core.prepack(leaf, 'canonical')
    packed.append(name)
    return core.prepack(leaf, target)

  def each(path, leaf):
    return one(tree_lib.path_str(path), leaf)

  weights = jax.tree_util.tree_map_with_path(
    each, model.params['weights'], is_leaf=core.is_qtensor
  )
  params = {**model.params, 'weights': weights}
  if 'effective' in params:
    params['effective'] = {k: one(k, q) for k, q in params['effective'].items()}
  report = {k: v for k, v in model.report.items() if k != 'prepacked'}
  if target == 'cpu':
    report['prepacked'] = {'target': target, 'weights': sorted(packed)}
  return dataclasses.replace(model, params=params, report=report)


def _gains(q: QTensor) -> bool:
  columns = q.columns
  panels = -(-columns // COLUMNS) * COLUMNS
  return core.may_prepack(q) and 8 * panels <= 9 * columns


def _dense(plan: Plan) -> Iterator[str]:
  """Parameters, and sites of effective weights, of whole int8 products."""
  users: dict[str, list[SitePlan]] = {}
  for name, site in plan.sites.items():
    for path in [name] if name in plan.effective else site.paths:
      users.setdefault(path, []).append(site)
  for path, storage in {**plan.leaves, **plan.effective}.items():
    size = math.prod(storage.shape)
    sites = users.get(path, [])
    products = [s for s in sites if s.kind != 'gather']
    if products and all(_whole(plan, s, size) for s in sites):
      yield path


def _whole(plan: Plan, site: SitePlan, size: int) -> bool:
  """Whether a site uses the weight alone, all of it, and may have panels."""
  alone = len(site.paths) == 1 or site.id in plan.effective
  dense = site.kind == 'dot' and site.compute == 'int8'
  taken = site.kind == 'gather' and site.rule is not None
  return alone and (dense or taken) and math.prod(site.matrix) == size
