r"""From measured products to the sizes at which they are as fast as float.

  python -m experiments.bench --config=configs/bench/matmul_cpu.py:small \
    --workdir=runs/small
  python -m experiments.benchmarks.crossover runs/small/bench.json ...

The second command writes the data that `quantlab_kernels.crossover` reads; of
several runs the largest sizes.
"""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from quantlab_kernels import crossover

EVEN = 1.05  # seconds over those of float32 that still count as equal


def table(cases: Mapping[str, Any]) -> dict[str, dict[str, int]]:
  """The least K N from which on a product is as fast, by product and rows.

  Args:
    cases: by '<K>x<N>/<rows>', as `experiments.bench` writes them.

  Raises:
    ValueError: a product is slower at the largest size measured.
  """
  found: dict[str, dict[str, dict[int, bool]]] = {}
  for name, case in cases.items():
    shape, _, rows = name.partition('/')
    if not rows:
      continue
    k, n = map(int, shape.split('x'))
    for product, ratio in case['ratios'].items():
      sizes = found.setdefault(product, {}).setdefault(rows, {})
      even = ratio['wall']['median'] <= EVEN
      sizes[k * n] = sizes.get(k * n, True) and even
  return {
    product: {rows: _least(product, rows, s) for rows, s in by_rows.items()}
    for product, by_rows in found.items()
  }


def _least(product: str, rows: str, even: Mapping[int, bool]) -> int:
  slower = [size for size, is_even in even.items() if not is_even]
  if not slower:
    return 0
  larger = [size for size in even if size > max(slower)]
  if not larger:
    raise ValueError(
      f'{product} at {rows} rows is slower than float32 at {max(slower)} '
      'weights, the most measured: measure larger ones too'
    )
  return min(larger)


def largest(tables: Sequence[Mapping[str, Mapping[str, int]]]):
  """The largest size of several tables of the same products and rows."""
  return {
    product: {
      rows: max(t[product][rows] for t in tables)
      for rows in sorted(sizes, key=int)
    }
    for product, sizes in tables[0].items()
  }


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    raise SystemExit('usage: crossover bench.json ...')
  results = [json.loads(pathlib.Path(path).read_text()) for path in argv[1:]]
  data = {
    'about': 'least K x N from which a product is as fast as float32, by rows; '
    'written by experiments.benchmarks.crossover',
    'device': results[0]['device'],
    'cores': results[0]['cores'],
    'products': largest([table(r['cases']) for r in results]),
  }
  crossover.PATH.write_text(json.dumps(data, indent=1) + '\n')
  print(crossover.PATH)


if __name__ == '__main__':
  main(sys.argv)
