"""Tables of given numbers, as a search would have measured them."""

import numpy as np

from quantlab.search import Row, Table


def table_of(values, costs, **fields):
  """Rows r0, r1, ... with the options o0, o1, ..., of no standard error.

  Args:
    values: of the options of each row.
    costs: the same by name.
    **fields: others of a `Table`.
  """
  rows = tuple(
    Row(f'r{i}', tuple(f'o{k}' for k in range(len(v))))
    for i, v in enumerate(values)
  )
  values = tuple(np.asarray(v, float) for v in values)
  found = {
    k: tuple(np.asarray(c, float) for c in cs) for k, cs in costs.items()
  }
  zero = tuple(np.zeros_like(v) for v in values)
  return Table(rows, values, zero, found, 'test', '', **fields)
