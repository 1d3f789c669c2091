"""The rows of a report, read off a quantized model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from quantlab.core import QTensor, named_leaves
from quantlab.plan import SitePlan
from quantlab.ptq import Quantized
from quantlab.report.sites import SiteRow, histogram

_T = TypeVar('_T')
_MOST_VALUES = 100_000  # a histogram of more looks the same


def site_rows(
  model: Quantized, noise: Mapping[str, Mapping[str, Any]], params: Any
) -> list[SiteRow]:
  """One row a site, in program order.

  Args:
    model: the quantized model.
    noise: SQNR by site, see `ql.site_sqnr`; the worst layer of a stack counts.
    params: the float parameters that were encoded, for histograms.
  """
  floats = dict(named_leaves(params))
  coded = dict(named_leaves(model.params['weights']))
  coded |= model.params['effective']
  return [
    _row(site, coded, floats, noise.get(site.id, {}))
    for site in model.plan.sites.values()
  ]


def walk(model: Quantized, prepared: Sequence[str]) -> dict[str, Any]:
  """What the chain of a model did, as a report keeps it.

  Args:
    model: the quantized model.
    prepared: names of the members that changed it before it was encoded.
  """
  return {
    'transform': list(model.report.get('transform', ())),
    'prepared': list(prepared),
    'blocks': list(model.report.get('blocks', ())),
  }


def by_variant(rows: Mapping[str, _T]) -> dict[str, dict[str, _T]]:
  """`{'model/variant': value}` as `{model: {variant: value}}`."""
  out: dict[str, dict[str, _T]] = {}
  for name, value in rows.items():
    model, variant = name.rsplit('/', 1)
    out.setdefault(model, {})[variant] = value
  return out


def _row(site: SitePlan, coded, floats, noise) -> SiteRow:
  quantizers = site.rule.quantizers if site.rule else {}
  first = quantizers.get('weight', quantizers.get('rhs'))
  second = quantizers.get('input', quantizers.get('lhs'))
  row: SiteRow = {
    'site': site.id,
    'kind': site.kind,
    'weight': repr(first) if first else None,
    'input': repr(second) if second else None,
  }
  if not quantizers:
    row['why_float'] = (
      'a product of two activations'
      if site.derivation == 'activations'
      else 'no rule, or None'
    )
  if 'output' in noise:
    row['sqnr'] = float(np.min(np.asarray(noise['output'])))
  names = [site.id] if site.id in coded else list(site.paths)
  stored = [coded[n] for n in names if isinstance(coded.get(n), QTensor)]
  if stored and ':' not in site.id:  # a second use stores nothing more
    size = sum(q.size for q in stored)
    row['nbytes'] = sum(q.nbytes for q in stored)
    row['bits'] = 8 * row['nbytes'] / size
    row['float_nbytes'] = size * np.dtype(np.float32).itemsize
    row['histograms'] = _histograms(site, stored[0], floats)
  return row


def _histograms(site, q: QTensor, floats):
  values = {'weight_coded': q.dequantize()}
  if site.derivation == 'leaf' and not site.fold:
    # An effective weight is stored nowhere in float.
    values['weight'] = floats[site.paths[0]]
  return {k: histogram(_sample(v)) for k, v in values.items()}


def _sample(x: Any) -> np.ndarray:
  flat = np.asarray(x, np.float32).ravel()
  return flat[:: max(1, math.ceil(flat.size / _MOST_VALUES))]
