"""Bytes of a plan, site by site: what the quantized model will hold."""

from __future__ import annotations

from collections.abc import Mapping

from quantlab import summary
from quantlab.core import tree as tree_lib
from quantlab.plan import Plan


def nbytes(plan: Plan) -> dict[str, int]:
  """Bytes that each site adds to the model, by site id.

  Codes, scales, zero points, second levels, tables, shorter last groups and
  calibrated ranges as they will be stored; for a site left in float the
  parameters that its weight comes from. A parameter that several sites read
  is counted at the first of them. `sum(nbytes(plan).values()) +
  rest_nbytes(plan)` are the bytes of the model that `ql.ptq` makes by
  rounding to nearest.
  """
  owner = _owners(plan)
  found = dict.fromkeys(plan.sites, 0)
  for name, size in summary.stored_bytes(plan).items():
    found[owner.get(name, name)] += size
  for path, size in _kept(plan).items():
    if path in owner:
      found[owner[path]] += size
  for site, state in plan.abstract_state().items():
    found[site] += tree_lib.nbytes(state)
  return found


def rest_nbytes(plan: Plan) -> int:
  """Bytes of the parameters that no site reads: norms, biases, positions."""
  owner = _owners(plan)
  return sum(size for path, size in _kept(plan).items() if path not in owner)


def _owners(plan: Plan) -> Mapping[str, str]:
  """For every parameter that a site reads as a weight, the first site."""
  found: dict[str, str] = {}
  for name, site in plan.sites.items():
    for path in site.paths:
      found.setdefault(path, name)
  return found


def _kept(plan: Plan) -> dict[str, int]:
  """Bytes of the parameters that stay as they are."""
  return {
    path: size
    for path, (size, _) in plan.parameters.items()
    if path not in plan.leaves and path not in plan.dropped
  }
