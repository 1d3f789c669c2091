"""The figures of a report, drawn from its rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantlab.report import plots, sites, tables

Picture = tuple[bytes, str]  # PNG, caption
Curves = Mapping[str, Sequence[Sequence[float]]]  # name -> [[step, value], ...]

_QUALITY = ('accuracy', 'spearman', 'agreement')
_MOST_SITES = 60  # beyond it a row of a picture cannot be read
_HISTOGRAMS = 8
_PREPARED = 4
_CURVES = 12  # more cannot be told apart


def overview(
  rows: Sequence[tables.Row], variants: Mapping[str, list[sites.SiteRow]]
) -> list[Picture]:
  """A model's variants side by side: quality over size, error by site."""
  found = [_quality_over_size(rows), _error_map(variants)]
  return [picture for picture in found if picture is not None]


def learning(variants: Mapping[str, Sequence[Curves]]) -> list[Picture]:
  """What training logged: a picture a quantity, a colour a variant."""
  names = {n: None for runs in variants.values() for c in runs for n in c}
  found = []
  for name in names:
    fig = plots.figure(7.4, 3.9)
    curves = {
      variant: [c[name] for c in runs if name in c]
      for variant, runs in variants.items()
    }
    plots.learning_curves(
      fig.subplots(), dict(list(curves.items())[:_CURVES]), name
    )
    found.append(
      (plots.to_png(fig), f'{name.replace("_", " ")} over training steps')
    )
  return found


def details(
  table: Sequence[sites.SiteRow], walk: Mapping[str, Any] | None = None
) -> list[Picture]:
  """One variant: errors, bits and bytes, and histograms.

  Args:
    table: its quantized sites.
    walk: 'transform', names of the chain's members; 'prepared', those of them
      that changed the float model; 'blocks' of the walk, where there was one.
  """
  walk = walk or {}
  blocks = walk.get('blocks', ())
  found = [
    _site_bars(table, 7.5 if blocks else 9.6),
    _block_bars(blocks),
    _losses(blocks),
    _histograms(table),
    _preparation(table, walk.get('prepared', ())),
  ]
  return [picture for picture in found if picture is not None]


def _quality_over_size(rows: Sequence[tables.Row]) -> Picture | None:
  name, sign = _quality(rows)
  points = {
    r['variant']: (size, sign * quality)
    for r in rows
    if (size := tables.number(r.get('nbytes'))) is not None
    and (quality := tables.number(r.get(name))) is not None
    and math.isfinite(quality)
  }
  reference = points.pop('float', None)
  if not points:
    return None
  fig = plots.figure(7.4, 3.9)
  label = f'-{name}' if sign < 0 else name
  plots.quality_against_size(fig.subplots(), points, reference, label)
  return plots.to_png(fig), (
    f'{label} over size; the line joins variants that no other beats.'
  )


def _quality(rows: Sequence[tables.Row]) -> tuple[str, int]:
  """The metric to draw, and -1 where less is better."""
  for name in _QUALITY:
    if any(tables.number(r.get(name)) is not None for r in rows):
      return name, 1
  return 'perplexity' if any('perplexity' in r for r in rows) else (
    'cross_entropy'
  ), -1


def _error_map(
  variants: Mapping[str, list[sites.SiteRow]],
) -> Picture | None:
  sqnr = {
    v: {r['site']: sites.finite(r, 'sqnr') for r in sites.quantized(table)}
    for v, table in variants.items()
  }
  names = list(dict.fromkeys(s for row in sqnr.values() for s in row))
  if not names or not any(
    math.isfinite(x) for row in sqnr.values() for x in row.values()
  ):
    return None
  shown = names[:_MOST_SITES]
  fig = plots.figure(2.6 + 0.42 * len(sqnr), 1.3 + 0.2 * len(shown))
  values = [[row.get(s, math.nan) for row in sqnr.values()] for s in shown]
  plots.sqnr_map(fig.subplots(), shown, list(sqnr), values)
  return plots.to_png(fig), (
    'SQNR (dB) of every site under every variant' + _rest(names, shown)
  )


def _site_bars(table: Sequence[sites.SiteRow], width: float) -> Picture | None:
  if not table:
    return None
  shown = table[:_MOST_SITES]
  names = [r['site'] for r in shown]
  fig, axes = plots.grid(
    width,
    0.7 + 0.2 * len(shown),
    (1, 3),
    left=plots.label_width(names),
    below=0.55,
    above=0.1,
  )
  error, bits, size = axes[0]
  plots.sqnr_bars(error, names, [sites.finite(r, 'sqnr') for r in shown])
  plots.bits_bars(bits, names, [_or_zero(r, 'bits') for r in shown])
  plots.bytes_bars(
    size,
    names,
    [_or_zero(r, 'nbytes') for r in shown],
    [_or_zero(r, 'float_nbytes') for r in shown],
  )
  for ax in (bits, size):
    ax.set_yticklabels([])
  return plots.to_png(fig), (
    'Error, bits and bytes by site' + _rest(table, shown)
  )


def _block_bars(blocks: Sequence[Mapping[str, Any]]) -> Picture | None:
  if not blocks:
    return None
  shown = blocks[:_MOST_SITES]
  names = [b['block'] for b in shown]
  fig, axes = plots.grid(
    3.5,
    0.7 + 0.2 * len(shown),
    (1, 1),
    left=plots.label_width(names),
    below=0.55,
    above=0.1,
  )
  errors = [sites.finite(b, 'relative_error') for b in shown]
  plots.block_bars(axes[0, 0], names, errors)
  left = len(blocks) - len(shown)
  return plots.to_png(fig), (
    'Squared error over squared norm of what each block hands on, all blocks '
    'before it quantized' + (f'; {left} more follow.' if left else '.')
  )


def _losses(blocks: Sequence[Mapping[str, Any]]) -> Picture | None:
  """The losses of tuners, by block."""
  curves = {
    b['block']: [float(x) for x in facts['loss']]
    for b in blocks
    for facts in b.get('tuned', {}).values()
    if facts.get('loss')
  }
  if not curves:
    return None
  shown = dict(list(curves.items())[:_CURVES])
  fig = plots.figure(5.2, 2.2)
  plots.loss_curves(fig.subplots(), shown)
  left = len(curves) - len(shown)
  return plots.to_png(fig), (
    'Loss while the norms of each block were tuned'
    + (f'; {left} more blocks were.' if left else '.')
  )


def _preparation(
  table: Sequence[sites.SiteRow], prepared: Sequence[str]
) -> Picture | None:
  """Inputs and weights of the worst sites before and after transforms."""
  worst = [r for r in sites.worst_first(table) if r.get('before')]
  panels = [
    (r, what)
    for r in worst[:_PREPARED]
    for what in ('input', 'weight')
    if what in r['before']
  ]
  if not panels:
    return None
  after = ' and '.join(prepared)
  fig, axes = _panels(len(panels))
  for i, (ax, (r, what)) in enumerate(zip(axes, panels, strict=True)):
    title = f'{plots.shorten(r["site"], 24)} {what}'
    changed = r.get('after', {}).get(what)
    plots.histogram(
      ax, r['before'][what], changed, title, ('before', f'after {after}')
    )
    if i == 0:
      ax.legend(fontsize=6, frameon=False, loc='upper right')
  head = 'Inputs (one batch of calibration) and weights of the worst sites'
  if prepared:
    return plots.to_png(fig), (
      f'{head} in float, before (filled) and after {after} (line), log counts.'
    )
  return plots.to_png(fig), (
    f'{head} in float, log counts; no transform changed them before encoding.'
  )


def _panels(count: int) -> tuple[plots.Figure, list[plots.Axes]]:
  """A figure of so many histograms, four in a row."""
  across = 4
  down = -(-count // across)
  fig, axes = plots.grid(9.6, 1.7 * down, (down, across))
  found = list(axes.ravel())
  for ax in found[count:]:
    ax.set_visible(False)
  return fig, found[:count]


def _histograms(table: Sequence[sites.SiteRow]) -> Picture | None:
  """Weights, and inputs where observed, of the sites with the most error."""
  known = [r for r in table if r.get('histograms')]
  if not known:
    return None
  worst = sorted(known, key=lambda r: _error_first(sites.finite(r, 'sqnr')))
  worst = worst[:_HISTOGRAMS]
  panels = [
    (r, what)
    for r in worst
    for what in ('weight', 'input')
    if {what, f'{what}_coded'} & r['histograms'].keys()
  ]
  fig, axes = _panels(len(panels))
  for ax, (r, what) in zip(axes, panels, strict=True):
    found = r['histograms']
    title = f'{plots.shorten(r["site"], 24)} {what}'
    plots.histogram(ax, found.get(what), found.get(f'{what}_coded'), title)
  return plots.to_png(fig), (
    'Values in float (filled, where they are kept) and after coding (line), '
    'log counts; the sites with the most error first' + _rest(known, worst)
  )


def _error_first(sqnr: float) -> float:
  return math.inf if math.isnan(sqnr) else sqnr


def _or_zero(row: sites.SiteRow, name: str) -> float:
  value = sites.finite(row, name)
  return 0.0 if math.isnan(value) else value


def _rest(everything: Sequence, shown: Sequence) -> str:
  left = len(everything) - len(shown)
  return f'; {left} more are in the table.' if left else '.'
