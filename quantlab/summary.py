"""Tables of a plan: formats, bytes, ways of computing, what stays in float."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import rich.box
import rich.console
import rich.table

import quantlab_kernels as kernels
from quantlab.core import tree as tree_lib
from quantlab.core.qtensor import PANELS
from quantlab.graph.segments import names as segment_names

if TYPE_CHECKING:
  from quantlab.plan import Plan, SitePlan, Storage


def stored_bytes(plan: Plan) -> dict[str, int]:
  """Bytes of every stored weight, from shapes: by path or site id."""
  found = {**plan.leaves, **plan.effective}
  return {k: _nbytes(s) for k, s in found.items()}


def _nbytes(storage: Storage) -> int:
  return tree_lib.nbytes(storage.abstract())


def totals(plan: Plan) -> dict[str, float]:
  """Size and coverage of a plan, from shapes.

  Returns:
    float_bytes, quantized_bytes (weights, remaining parameters and calibrated
    ranges), bits_per_weight (of the coded weights, everything included),
    weights_covered and macs_covered (shares of all parameters and of all
    multiply-accumulates), sites and sites_quantized.
  """
  sizes = stored_bytes(plan)
  coded = {**plan.leaves, **plan.effective}
  elements = sum(math.prod(s.shape) for s in coded.values())
  total = sum(n for _, n in plan.parameters.values())
  kept = sum(
    size
    for path, (size, _) in plan.parameters.items()
    if path not in plan.leaves and path not in plan.dropped
  )
  state = tree_lib.nbytes(plan.abstract_state())
  macs = sum(s.macs for s in plan.sites.values())
  covered = sum(s.macs for s in plan.quantized.values())
  return {
    'float_bytes': sum(b for b, _ in plan.parameters.values()),
    'quantized_bytes': sum(sizes.values()) + kept + state,
    'bits_per_weight': 8 * sum(sizes.values()) / elements if elements else 0.0,
    'weights_covered': elements / total if total else 0.0,
    'macs_covered': covered / macs if macs else 0.0,
    'sites': len(plan.sites),
    'sites_quantized': len(plan.quantized),
  }


def memory(plan: Plan) -> dict[str, int]:
  """Estimated bytes of a run, from shapes.

  'weights' are held in both precisions while quantizing; 'activations' is the
  largest product's operands and result, the least that one forward pass needs.
  """
  sums = totals(plan)
  largest = max(
    (4 * sum(math.prod(t) for t in s.tensors) for s in plan.sites.values()),
    default=0,
  )
  return {
    'weights': int(sums['float_bytes'] + sums['quantized_bytes']),
    'activations': largest,
  }


def slower(plan: Plan) -> dict[str, str]:
  """Sites that float would compute faster on this CPU, and why.

  A table of measurements says so (see `quantlab_kernels.crossover`); there is
  none for other platforms. A site whose parameters are those of another one
  counts where float is faster for both, since they are stored once.
  """
  if jax.default_backend() != 'cpu':
    return {}
  found = {k: why for k, s in plan.sites.items() if (why := _slower(s))}
  shared = [s.paths for k, s in plan.quantized.items() if k not in found]
  kept = {path for paths in shared for path in paths}
  return {
    k: why for k, why in found.items() if not kept & {*plan.sites[k].paths}
  }


def _slower(site: SitePlan) -> str | None:
  weight = site.rule.weight if site.rule else None
  if weight is None or site.kind != 'dot':
    return None
  if site.compute not in ('int8', 'weight only'):
    return None
  each = math.prod(site.matrix[len(site.weight_loops) :])
  rows = math.prod(site.tensors[2]) * site.matrix[-2] // max(each, 1)
  return kernels.slower_than_float(
    weight.format.bits, rows, each, integer=site.compute == 'int8'
  )


def table(plan: Plan) -> rich.table.Table:
  """One row a site, in program order."""
  out = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for name in (
    'site',
    'kind',
    'weight',
    'format',
    'input',
    'computed',
    'bytes',
  ):
    out.add_column(
      name, justify='right' if name == 'bytes' else 'left', overflow='fold'
    )
  sizes = stored_bytes(plan)
  for site in plan.sites.values():
    out.add_row(*_row(site, sizes))
  return out


def _row(site: SitePlan, sizes: dict[str, int]) -> list[str]:
  quantizers = site.rule.quantizers if site.rule else {}
  size = sizes.get(site.id, sum(sizes.get(p, 0) for p in site.paths))
  shape = ' x '.join(map(str, site.matrix)) if site.matrix else 'activations'
  first = quantizers.get('weight', quantizers.get('rhs'))
  second = quantizers.get('input', quantizers.get('lhs'))
  how = site.compute + (' + folded norm' if site.fold else '')
  return [
    site.id,
    site.kind,
    shape,
    repr(first) if first else 'float',
    repr(second) if second else 'float',
    how,
    str(size) if size and site.id.count(':') == 0 else '',
  ]


def text(plan: Plan, params: Any = None) -> str:
  """The table, the totals, and everything a reader should know."""
  console = rich.console.Console(width=140, color_system=None)
  with console.capture() as capture:
    console.print(table(plan))
  sums = totals(plan)
  size = sums['quantized_bytes'] if params is None else tree_lib.nbytes(params)
  lines = [
    capture.get().rstrip(),
    f'{sums["sites_quantized"]} of {sums["sites"]} sites quantized: '
    f'{sums["weights_covered"]:.1%} of the parameters, '
    f'{sums["macs_covered"]:.1%} of the multiply-accumulates; '
    f'{sums["bits_per_weight"]:.3f} bits per weight',
    f'{sums["float_bytes"]:,.0f} bytes in float, {size:,.0f} bytes quantized',
  ]
  leaves = [leaf for _, leaf in tree_lib.named_leaves(params)]
  coded = [q for q in leaves if tree_lib.is_qtensor(q)]
  if packed := [q for q in coded if q.tag == PANELS]:
    lines.append(
      f'{len(packed)} of {len(coded)} coded weights packed ahead for the '
      'kernels of the CPU'
    )
  left = [s.id for s in plan.sites.values() if s.rule is None]
  if left:
    lines.append('left in float: ' + ', '.join(left))
  if faster := slower(plan):
    lines.append(
      'too small to be faster than float here: '
      + ', '.join(faster)
      + ' (`plan.keep_float(plan.slower)` is the recipe that leaves them)'
    )
  for scan in plan.scans:
    lines.append(
      'a scan in segments, one for each run of layers of one format: '
      + ', '.join(segment_names(scan.lengths))
    )
  if plan.dropped:
    lines.append(
      'folded into other weights, no longer stored: ' + ', '.join(plan.dropped)
    )
  return '\n'.join(lines + [f'note: {n}' for n in plan.notes])
