"""Why a site is bad, and what to do about it: pure functions of statistics.

The noise of a product has three parts: what arrives with its input from the
sites before it, what the quantizer of its input adds, and what its weight adds.
The loudest of them (and any nearly as loud) is looked at; the first cause that
its statistics show is named.
"""

import dataclasses
import math
import statistics as numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from quantlab.report import sites

BELOW_MEDIAN = 10.0  # dB
WORST, POOR = 5, 20.0  # of the worst, those below so many dB
_NEAR = 3.0  # dB: as loud as the loudest part of the noise

# Where a ratio starts to cost a bit or more of the range.
_OUTLIER = 8.0  # largest channel of an input over the median one
_IMBALANCE = 4.0  # the same of the output channels of a weight
_TAIL = 6.0  # largest weight over the standard deviation

Statistics = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cause:
  """What is likely wrong with a site.

  Attributes:
    cause: half a sentence.
    remedy: the other half; '' where none is known.
  """

  cause: str
  remedy: str

  def __str__(self) -> str:
    return f'{self.cause}: {self.remedy}.' if self.remedy else f'{self.cause}.'


def bad(rows: Sequence[sites.SiteRow]) -> list[sites.SiteRow]:
  """The sites to worry about, the worst first.

  Those whose SQNR lies `BELOW_MEDIAN` under the median of all, and of the
  `WORST` those under `POOR`.
  """
  known = sites.worst_first(rows)
  if not known:
    return []
  values = [sites.finite(r, 'sqnr') for r in known]
  floor = numbers.median(values) - BELOW_MEDIAN
  return [
    r
    for i, (r, x) in enumerate(zip(known, values, strict=True))
    if x < floor or (i < WORST and x < POOR)
  ]


def diagnose(found: Statistics, used: Collection[str] = ()) -> Cause:
  """The likely cause of a site's noise.

  Args:
    found: what `diagnosis.look` found out about the site; what is absent
      cannot be a cause.
    used: names of the transforms that were applied: not proposed again.
  """
  parts = {
    name: value
    for name in ('arriving', 'input', 'weight')
    if (value := sites.finite(found, f'{name}_sqnr')) < math.inf
  }
  loudest = min(parts.values(), default=math.inf) + _NEAR
  loud = {name for name, value in parts.items() if value <= loudest}
  for part, rule in _RULES:
    if part in loud and (cause := rule(found, used)):
      return cause
  return Cause('no single cause found', '')


def _rows(found: Statistics, used: Collection[str]) -> Cause | None:
  rows = found.get('too_few_rows')
  if not rows:
    return None
  times = math.ceil(found['inputs'] / rows)
  return Cause(
    f'{rows} calibration rows for {found["inputs"]} inputs',
    f'calibrate with {times} times the samples',
  )


def _collapsed(found: Statistics, used: Collection[str]) -> Cause | None:
  count = found.get('collapsed', 0)
  if not count:
    return None
  which = f'{count} of {found["channels"]} output channels'
  searched = found.get('weight_searched')
  return Cause(
    f'{which} collapsed (codes all zero, or an output that no longer varies)',
    _either(
      None if searched else 'scale=mse()',
      'more bits',
      _unused('bias_correction', used),
    ),
  )


def _outlier(found: Statistics, used: Collection[str]) -> Cause | None:
  ratio = sites.finite(found, 'outlier')
  if not ratio >= _OUTLIER:
    return None
  return Cause(
    f'outlier channel {found["outlier_channel"]} of the input, {ratio:.0f} '
    'times the median channel',
    _either(
      *(_unused(n, used) for n in ('smooth', 'outlier_suppression', 'rotate'))
    )
    or 'more bits for the input',
  )


def _imbalance(found: Statistics, used: Collection[str]) -> Cause | None:
  ratio = sites.finite(found, 'imbalance')
  if found.get('weight_per') != 'tensor' or not ratio >= _IMBALANCE:
    return None
  return Cause(
    f'one scale for output channels of which the largest is {ratio:.0f} times '
    'the median',
    _either("per='channel'", _unused('cross_layer_equalization', used)),
  )


def _tail(found: Statistics, used: Collection[str]) -> Cause | None:
  tail = sites.finite(found, 'tail')
  if found.get('weight_searched') or not tail >= _TAIL:
    return None
  return Cause(
    f'heavy tails: the largest weight of a scale is {tail:.0f} standard '
    'deviations',
    'scale=mse()',
  )


def _end(found: Statistics, used: Collection[str]) -> Cause | None:
  position = found.get('position')
  bits = min(found.get(f'{r}_bits') or 32 for r in ('weight', 'input'))
  if not position or bits >= 8:
    return None
  what = {
    'first': f'the first layer, with {found.get("inputs")} inputs',
    'last': 'the last layer, which makes the outputs',
  }[position]
  return Cause(f'{what}, at {bits} bits', 'give it 8 bits')


def _coarse_weight(found: Statistics, used: Collection[str]) -> Cause | None:
  bits = found.get('weight_bits')
  if not bits or bits > 4:
    return None
  return Cause(
    f'{bits} bits are few for this weight',
    _either(
      None if found.get('weight_grouped') else 'group=',
      None if found.get('weight_searched') else 'scale=mse()',
      _unused('gptq', used) if 'inputs' in found else None,  # not of lookups
      'more bits',
    ),
  )


def _coarse_input(found: Statistics, used: Collection[str]) -> Cause | None:
  bits = found.get('input_bits')
  if not bits or bits > 4:
    return None
  return Cause(
    f'{bits} bits are few for this input',
    _either(_unused('rotate', used), 'more bits'),
  )


def _inherited(found: Statistics, used: Collection[str]) -> Cause:
  return Cause(
    'most of the noise arrives with the input', 'mend the sites before it'
  )


Rule = Callable[[Statistics, Collection[str]], Cause | None]
_RULES: tuple[tuple[str, Rule], ...] = (
  ('weight', _rows),
  ('weight', _collapsed),
  ('input', _outlier),
  ('weight', _imbalance),
  ('weight', _tail),
  ('weight', _end),
  ('input', _end),
  ('weight', _coarse_weight),
  ('input', _coarse_input),
  ('arriving', _inherited),
)


def _unused(name: str, used: Collection[str]) -> str | None:
  return None if name in used else f'{name}()'


def _either(*ways: str | None) -> str:
  known = [w for w in ways if w]
  head, tail = known[:-1], known[-1:]
  return ' or '.join([', '.join(head), *tail] if head else tail)
