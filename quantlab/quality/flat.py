"""Summaries as flat numbers, for metrics files."""

from collections.abc import Mapping
from typing import Any

from quantlab.quality.estimate import Estimate


def flat(summary: Mapping[str, Any]) -> dict[str, float | int]:
  """`{name: Estimate}` as `{name, name_stderr, name_low, name_high}`.

  What is no estimate (an index) is kept as it is.
  """
  out: dict[str, float | int] = {}
  for name, value in summary.items():
    if isinstance(value, Estimate):
      out[name] = value.value
      out[f'{name}_stderr'] = value.stderr
      out[f'{name}_low'] = value.low
      out[f'{name}_high'] = value.high
    else:
      out[name] = value
  return out
