"""Whether tables rank the plans of a search as measurements do."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import allocated
from quantlab import search
from quantlab.quality import estimate, functions

# Less of these is better, as of what a table predicts.
_LOSSES = (
  'cross_entropy',
  'perplexity',
  'similarity_error',
  'kl_mean',
  'kl_p99',
)


def rows(
  config: Any,
  tables: Mapping[str, search.Table],
  found: Mapping[str, search.Allocation],
  values: Mapping[str, Any],
) -> list[dict[str, Any]]:
  """Spearman of predicted and measured losses over the plans of a search.

  Every table predicts every plan that any of them chose, the uniform and the
  random ones too, each once: of one budget, and of all. Intervals are of a
  bootstrap over plans; the plans of a search are alike, and few, so that these
  are wide.

  Args:
    config: of the search.
    tables: by metric. One around a budget's option predicts no other plans,
      and is left out.
    found: allocations by name.
    values: what was measured of them, means over calibration seeds are taken.
  """
  out = []
  for encoder in config.encoders:
    labels = [
      n for n in allocated.labels(config) if n.startswith(f'{encoder}/')
    ]
    for budget in ('all', *config.budgets):
      plans = {
        made.choice: name
        for name, made in found.items()
        if budget in ('all', name.split('/')[0])
      }
      if len(plans) < 4:
        continue
      for key in [k for k in config.show if k in _LOSSES]:
        measured = np.array(
          [
            np.mean([values.get(f'q/{name}/{n}/{key}', np.nan) for n in labels])
            for name in plans.values()
          ]
        )
        for name, kind, table in _predictors(tables, encoder):
          predicted = np.array([table.predict(c) for c in plans])
          use = np.isfinite(predicted) & np.isfinite(measured)
          if use.sum() < 4:
            continue
          out.append(
            {
              'table': name,
              'interactions': kind,
              'encoder': encoder,
              'budget': budget,
              'loss': key,
              **rank(predicted[use], measured[use]),
              'plans': int(use.sum()),
            }
          )
  return out


def rank(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
  """Spearman's correlation, with a bootstrap interval."""
  found = estimate.bootstrap(functions.spearman, predicted, measured)
  return {'spearman': found.value, 'low': found.low, 'high': found.high}


def summary(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """One row for each table, of the plans of all budgets, without intervals."""
  out: dict[tuple[str, str], dict[str, Any]] = {}
  for r in ranks:
    if r['budget'] == 'all':
      head = {'table': r['table'], 'interactions': r['interactions']}
      row = out.setdefault((*head.values(),), head)
      row[f'{r["encoder"]} {r["loss"]}'] = r['spearman']
  return list(out.values())


def _predictors(tables, encoder):
  """Those of rounded weights, and of what the encoder makes of them."""
  for name, table in tables.items():
    if '@' in name or name.partition('.')[2] not in ('', encoder):
      continue
    yield name, 'none', search.additive(table)
    if table.interactions is not None:
      yield name, 'own', table
