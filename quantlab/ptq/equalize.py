"""What the members that scale inputs share: choose, apply, report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quantlab.ptq import inputs as inputs_lib
from quantlab.ptq.inputs import Input
from quantlab.ptq.transform import Context


def inputs_with(
  ctx: Context, role: str, name: str
) -> tuple[list[Input], dict[str, Any]]:
  """The inputs that can be scaled and of which a site quantizes `role`.

  Returns:
    They, and facts on those that cannot be scaled.

  Raises:
    ValueError: there is none; says what the member `name` looked for.
  """
  rules = {k: s.rule for k, s in ctx.plan.quantized.items()}
  wanted = [
    where
    for where in inputs_lib.inputs(ctx)
    if any(getattr(rules[s.id], role, None) is not None for s in where.sites)
  ]
  able = [w for w in wanted if w.pair is not None or w.why is None]
  if not able:
    refused = '; '.join(w.why for w in wanted if w.why)
    raise ValueError(
      f'{name}() has nothing to act on: it looked for products with a weight '
      f'whose rule has a quantizer for the {role}, and whose input can be '
      f'scaled. '
      + (
        f'There are {len(wanted)}, but {refused}'
        if refused
        else f'None of the sites {list(ctx.plan.sites)} is one'
      )
    )
  left = {w.name: {'left': w.why} for w in wanted if w not in able}
  return able, left


def scaled(ctx: Context, chosen: Sequence[tuple[Input, np.ndarray]]) -> Context:
  """Each input divided by its scale."""
  for where, s in chosen:
    ctx = inputs_lib.scale_input(ctx, where, s)
  return ctx


def facts(where: Input, s: np.ndarray) -> dict[str, Any]:
  """Where a scale went, and its extremes."""
  return {
    'folded': where.pair is not None,
    'into': where.pair.source if where.pair else 'run time',
    'smallest': float(np.min(s)),
    'largest': float(np.max(s)),
  }


def safe(s: np.ndarray, *positive: np.ndarray) -> np.ndarray:
  """A scale that is 1 where one of the quantities it comes from is zero."""
  live = np.isfinite(s) & (s > 0)
  for x in positive:
    live = live & (x > 0)
  return np.where(live, np.clip(s, 1e-5, 1e5), 1).astype(np.float32)


def picked(candidates: np.ndarray, best: np.ndarray) -> np.ndarray:
  """The candidate (g, *loops, channels) chosen for each layer (*loops)."""
  return np.take_along_axis(candidates, best[None, ..., None], 0)[0]


def relative(errors: np.ndarray) -> float:
  """The least error as a share of the first candidate's, over all layers."""
  first = float(errors[0].sum())
  return float(errors.min(0).sum()) / first if first else 1.0
