"""Interleaved timing of contestants, and what is said of it.

Every round measures each contestant once, in rotating order, so that a change
of the machine's load meets all of them. Beside wall-clock seconds stand the
seconds of processor time of this process, which other processes disturb less.
"""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}

# Stages by name, in order; each takes what the one before returned.
Contestant = Mapping[str, Callable[[Any], Any]]
# Seconds by clock, stage (and 'total') and round.
Samples = dict[str, dict[str, list[float]]]


def interleaved(
  contestants: Mapping[str, Contestant],
  rounds: int,
  before: Callable[[], Any] = lambda: None,
) -> dict[str, Samples]:
  """Seconds of every contestant in every round.

  Args:
    contestants: what is compared, by name.
    rounds: how often each is measured; a round before them is not counted.
    before: called, untimed, before each measurement (to clear caches).
  """
  names = list(contestants)
  samples: dict[str, Samples] = {
    name: {c: {s: [] for s in (*stages, 'total')} for c in CLOCKS}
    for name, stages in contestants.items()
  }
  gc.collect()
  gc.freeze()  # what lives already is not searched in every round
  try:
    for i in range(-1, rounds):
      turn = i % len(names)
      for name in names[turn:] + names[:turn]:
        before()
        gc.collect()  # nobody pays for the garbage of another
        found = _measure(contestants[name])
        for clock, stages in found.items() if i >= 0 else ():
          for stage, seconds in stages.items():
            samples[name][clock][stage].append(seconds)
  finally:
    gc.unfreeze()
  return samples


def _measure(stages: Contestant) -> dict[str, dict[str, float]]:
  """Seconds by clock and stage, of one call."""
  value: Any = None
  marks = [{c: clock() for c, clock in CLOCKS.items()}]
  for stage in stages.values():
    value = stage(value)
    marks.append({c: clock() for c, clock in CLOCKS.items()})
  pairs = list(zip(stages, marks, marks[1:], strict=False))
  return {
    c: {s: b[c] - a[c] for s, a, b in pairs}
    | {'total': marks[-1][c] - marks[0][c]}
    for c in CLOCKS
  }


def spread(values: list[float]) -> dict[str, float]:
  """Median, quartiles and extremes."""
  quantiles = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
  names = ('min', 'q1', 'median', 'q3', 'max')
  return dict(zip(names, map(float, quantiles), strict=True))


def case(
  samples: Mapping[str, Samples],
  baseline: str,
  limits: Mapping[str, float],
  notes: str = '',
) -> dict[str, Any]:
  """One comparison as JSON.

  Args:
    samples: as `interleaved` gives them.
    baseline: the contestant the others are divided by.
    limits: the ratio at which a contestant is still good enough, by name;
      those without a limit are shown for comparison.
    notes: what a reader should know.

  Returns:
    Seconds by contestant, clock and stage; ratios of the totals by contestant
    and clock: of the same round (median, quartiles, extremes), and of the
    fastest rounds ('of_minima'). 'met' compares the median of the wall clock.
  """

  def ratios(name: str, clock: str) -> dict[str, float]:
    ours = samples[name][clock]['total']
    base = samples[baseline][clock]['total']
    rounds = [a / b for a, b in zip(ours, base, strict=True)]
    return spread(rounds) | {'of_minima': min(ours) / min(base)}

  others = [name for name in samples if name != baseline]
  found = {name: {c: ratios(name, c) for c in CLOCKS} for name in others}
  return {
    'baseline': baseline,
    'rounds': len(samples[baseline]['wall']['total']),
    'seconds': {
      name: {
        clock: {stage: spread(v) for stage, v in stages.items()}
        for clock, stages in clocks.items()
      }
      for name, clocks in samples.items()
    },
    'ratios': found,
    'limits': dict(limits),
    'met': {k: found[k]['wall']['median'] <= v for k, v in limits.items()},
    'notes': notes,
  }
