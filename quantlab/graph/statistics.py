"""Statistics of sites as monoids, where they leave a loop or a branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from quantlab.graph.sites import Address, Analysis, Site

Stats = dict[str, Any]


class Monoid(Protocol):
  """Statistics of a site: an identity and a merge.

  Both are of one layer; the stacked statistics of a scan over layers are
  merged layer by layer.
  """

  def init(self, site: Site) -> Any: ...

  def merge(self, site: Site, a: Any, b: Any) -> Any: ...


def loops_below(
  analysis: Analysis, site: Site, address: Address
) -> tuple[int, ...]:
  """Layer loops of a site that lie inside the container at `address`."""
  count = sum(
    site.address[:i] in analysis.layer_scans
    for i in range(len(address) + 1, len(site.address))
  )
  return site.loops[len(site.loops) - count :]


def identity(
  monoid: Monoid, analysis: Analysis, sites: Sequence[Site], address: Address
) -> Stats:
  """Identities of the sites in a container, their inner loops in front."""
  found = {}
  for site in sites:
    start = monoid.init(site)
    if start is not None:
      loops = loops_below(analysis, site, address)
      found[site.id] = jax.tree.map(
        lambda x, loops=loops: jnp.broadcast_to(x, (*loops, *jnp.shape(x))),
        start,
      )
  return found


def merge(
  monoid: Monoid,
  analysis: Analysis,
  site: Site,
  address: Address,
  a: Any,
  b: Any,
) -> Any:
  """Merges statistics of a site at the container at `address`."""

  def one(a, b):
    return monoid.merge(site, a, b)

  for _ in loops_below(analysis, site, address):
    one = jax.vmap(one)
  return one(a, b)
