"""Latency of a plan: measured, from a table, or bounded, from a roofline."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from quantlab.core import Quantizer
from quantlab.cost import storage
from quantlab.plan import Plan, SitePlan


@dataclasses.dataclass(frozen=True)
class LatencyTable:
  """Seconds of products by what decides them, measured on one device.

  Attributes:
    device: where they were measured.
    seconds: by key, see `key`.
  """

  device: str
  seconds: Mapping[str, float]

  def __post_init__(self):
    if not isinstance(self.seconds, Mapping) or not self.seconds:
      raise ValueError(
        f'a latency table is {{product: seconds}}, got {self.seconds!r}'
      )
    wrong = {k: v for k, v in self.seconds.items() if not _is_time(v)}
    if wrong:
      raise ValueError(
        f'seconds of {self.device!r} must be finite and not negative, found '
        f'{wrong}'
      )

  @staticmethod
  def key(site: SitePlan) -> str:
    """What decides the time of a site: 'dot 8x64x10 int4 per channel, ...'.

    Rows x contraction x outputs (all batch axes multiplied into the rows), of
    a product of two activations their shapes; then the quantizers of both.
    """
    rule = site.rule
    first = (rule.weight or rule.lhs) if rule else None
    second = (rule.input or rule.rhs) if rule else None
    if site.matrix:
      k, n = site.matrix[-2:]
      rows = site.macs // max(1, math.prod(site.loops) * k * n)
      sizes = f'{rows}x{k}x{n}'
    else:
      sizes = ' by '.join('x'.join(map(str, t)) for t in site.tensors[:2])
    return f'{site.kind} {sizes} {_name(first)} x {_name(second)}'

  def __call__(self, plan: Plan) -> dict[str, float]:
    """Seconds of every site with a product, loops included, by site id.

    Raises:
      ValueError: lists the keys that were not measured.
    """
    sites = {k: s for k, s in plan.sites.items() if s.macs}
    missing = {self.key(s) for s in sites.values()} - set(self.seconds)
    if missing:
      raise ValueError(
        f'the latency table of {self.device!r} lacks {sorted(missing)}; '
        'measure these products and add them'
      )
    found = dict.fromkeys(plan.sites, 0.0)
    for name, site in sites.items():
      found[name] = math.prod(site.loops) * self.seconds[self.key(site)]
    return found

  def to_json(self) -> dict[str, Any]:
    return {'device': self.device, 'seconds': dict(self.seconds)}

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
    """Undoes `to_json`.

    Raises:
      ValueError: it is no latency table.
    """
    try:
      return cls(data['device'], data['seconds'])
    except (KeyError, TypeError) as error:
      raise ValueError(f'this is no latency table: {error!r}') from error


def roofline(
  plan: Plan,
  *,
  macs_per_second: Mapping[str, float],
  bytes_per_second: float,
) -> dict[str, float]:
  """Seconds that each site needs at least: compute or weights, the larger.

    t = max(MACs / peak, bytes of the weight / bandwidth)

  Args:
    plan: the plan.
    macs_per_second: peak of each way of computing that the plan has (the
      `compute` of its sites, such as 'float').
    bytes_per_second: bandwidth of the memory that holds the weights.

  Raises:
    ValueError: a way of computing without a peak.
  """
  sites = {k: s for k, s in plan.sites.items() if s.macs}
  missing = {s.compute for s in sites.values()} - set(macs_per_second)
  if missing:
    raise ValueError(
      f'the plan computes products as {sorted(missing)}, for which '
      f'macs_per_second has no peak; it has {sorted(macs_per_second)}'
    )
  stored = storage.nbytes(plan)
  found = {k: size / bytes_per_second for k, size in stored.items()}
  for name, site in sites.items():
    compute = site.macs / macs_per_second[site.compute]
    found[name] = max(found[name], compute)
  return found


def _is_time(seconds: Any) -> bool:
  number = isinstance(seconds, numbers.Real) and not isinstance(seconds, bool)
  return number and math.isfinite(seconds) and seconds >= 0


def _name(quantizer: Quantizer | None) -> str:
  """The part of a quantizer that a kernel's speed depends on."""
  if quantizer is None:
    return 'float'
  q = quantizer
  unit = q.per or (f'group {q.group}' if q.group else f'block {q.block}')
  zero = '' if q.symmetric else ' asymmetric'
  return f'{q.format.name} per {unit}{zero}'
