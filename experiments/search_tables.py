"""Tables of published constants, which a config carries itself."""

from typing import Any

import numpy as np

from quantlab import search


def from_config(config: Any) -> search.Table:
  """The table that a config spells out: rows, sensitivity, costs."""
  rows = tuple(search.Row(name, tuple(found)) for name, found in config.rows)

  def columns(numbers):
    return tuple(np.asarray(x, float) for x in numbers)

  found = columns(config.sensitivity)
  return search.Table(
    rows=rows,
    values=found,
    stderr=tuple(np.zeros_like(v) for v in found),
    costs={name: columns(c) for name, c in config.costs.items()},
    metric=config.metric,
    unit=config.unit,
  )
