"""Where a low-bit product on the CPU is slower than the float one.

Below some number of weights the fixed cost of a call (activations quantized,
two calls of the kernels) is more than the float product takes. No other way to
the same numbers is faster there: decoding to floats within XLA was slower than
the kernels at every size measured. So the kernels run, and this module says
where float would have been faster; who wants that leaves the site in float.

`crossover.json` is what `python -m experiments.benchmarks.crossover` made of
measurements: for each product and number of rows, the least K x N from which
on the product is as fast as float32.
"""

import functools
import json
import pathlib

PATH = pathlib.Path(__file__).with_suffix('.json')


@functools.cache
def _table() -> dict[str, dict[int, int]]:
  data = json.loads(PATH.read_text())['products']
  return {
    product: {int(rows): size for rows, size in sizes.items()}
    for product, sizes in data.items()
  }


def slower_than_float(
  bits: int, rows: int, weights: int, *, integer: bool = True
) -> str | None:
  """Says why float32 is faster at this size, or None where it is not.

  Args:
    bits: of one weight.
    rows: M; sizes between those measured count as the next lower.
    weights: K N.
    integer: of int8 activations, else of float ones (`w4a16_matmul`).
  """
  product = 'w8a8' if bits == 8 else 'w4a8' if bits > 2 else 'ternary'
  sizes = _table()[product if integer else 'w4a16']
  at = max((m for m in sizes if m <= rows), default=min(sizes))
  if weights >= sizes[at]:
    return None
  return (
    f'slower than float32: {weights} weights at {rows} rows, measured as fast '
    f'from {sizes[at]} on'
  )
