"""Names of sites: stable, readable, unique."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def names(found: Sequence[Mapping[str, Any]]) -> list[str]:
  """The id of every site, given their fields in program order.

  A weight gives its path; a product of two activations its name stack, else
  the nearest weight before it with its kind and an ordinal. A later use of
  the same name gets ':1', ':2', ...
  """
  used: dict[str, int] = {}
  out, nearest, since = [], '', 0
  for site in found:
    if site['paths']:
      base = nearest = site['paths'][0]
      since = 0
    else:
      base = _scoped(site['name'])
      if not base:
        base = '/'.join(p for p in (nearest, f'{site["kind"]}_{since}') if p)
      since += 1
    count = used.get(base, 0)
    used[base] = count + 1
    out.append(f'{base}:{count}' if count else base)
  return out


def _scoped(name: str) -> str:
  """A name stack that says more than an einsum's subscripts, else ''."""
  parts = name.split('/')
  return name if any(p and '->' not in p for p in parts) else ''
