"""Pictures of a search: sensitivities, fronts, bit maps, progress.

Every function draws on the Axes it is given, as those of `report.plots`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from quantlab.report import plots
from quantlab.report.plots import Axes

# What is in brackets, which may hold others.
_ARGUMENTS = re.compile(r'\((?:[^()]|\([^()]*\))*\)')


def short(names: Iterable[str]) -> dict[str, str]:
  """Names without what is in brackets, where the rest tells them apart."""
  names = list(dict.fromkeys(names))
  bare = [_ARGUMENTS.sub('', n) for n in names]
  shown = bare if len(set(bare)) == len(bare) else names
  return dict(zip(names, shown, strict=True))


def sensitivity_bars(ax: Axes, table: Any) -> Axes:
  """Every option of every row, with one standard error; less is better.

  Args:
    ax: where to draw.
    table: a `search.Table`. Values that failed have no bar. The axis is
      logarithmic, but for what is within 1e-4 of the largest value or below
      zero.

  Returns:
    ax.
  """
  names = short(o for r in table.rows for o in r.options)
  height = 0.8 / len(names)
  values = np.concatenate(table.values)
  positive = bool((values[np.isfinite(values)] > 0).any())
  # Sums that are better where they are more negative have no logarithm.
  log = positive and not (values < 0).mean() > 0.5
  for j, name in enumerate(names):
    at, mean, error = [], [], []
    for i, row in enumerate(table.rows):
      if name not in row.options:
        continue
      k = row.options.index(name)
      if np.isfinite(table.values[i][k]):
        at.append(i - 0.4 + (j + 0.5) * height)
        mean.append(table.values[i][k])
        error.append(np.nan_to_num(table.stderr[i][k]))
    ax.barh(
      at,
      mean,
      height,
      xerr=error,
      color=plots._CYCLE[j % len(plots._CYCLE)],
      error_kw={'lw': 0.7, 'capsize': 1.5},
      label=plots.literal(names[name]),
    )
  plots._site_axis(ax, [r.name for r in table.rows])
  if log and (values[np.isfinite(values)] > 0).all():
    ax.set_xscale('log')
  elif log:
    ax.set_xscale('symlog', linthresh=1e-4 * np.nanmax(values))
  ax.set_xlabel(plots.literal(f'{table.metric} ({table.unit})'))
  ax.legend(
    loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7
  )
  return ax


def front(
  ax: Axes,
  costs: np.ndarray,
  values: np.ndarray,
  points: Mapping[str, tuple[float, float]],
  cost: str = 'bytes',
  value: str = 'predicted',
) -> Axes:
  """The predicted Pareto front of a table, and choices beside it.

  Args:
    ax: where to draw.
    costs: of the front, ascending.
    values: of the front.
    points: name -> (cost, value).
    cost: what the first axis is.
    value: what the second is.

  Returns:
    ax.
  """
  ax.step(costs, values, where='post', color=plots.GREY, lw=1.0, zorder=1)
  names = short(points)
  for i, (name, (x, y)) in enumerate(points.items()):
    ax.scatter(
      [x],
      [y],
      s=28,
      color=plots._CYCLE[i % len(plots._CYCLE)],
      marker=plots._MARKERS[i // len(plots._CYCLE) % len(plots._MARKERS)],
      label=plots.literal(names[name]),
      zorder=3,
    )
  top = max([*values, *(y for _, y in points.values())])
  if top > 0:  # a few very bad choices would hide all others
    ax.set_yscale('symlog', linthresh=1e-4 * top)
  ax.set_xlabel(plots.literal(cost))
  ax.set_ylabel(plots.literal(value))
  ax.grid(alpha=0.25)
  ax.legend(
    loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7
  )
  plots._bare(ax)
  return ax


def bit_map(
  ax: Axes, rows: Sequence[str], choices: Mapping[str, Sequence[str]]
) -> Axes:
  """The option of every row in every choice.

  Args:
    ax: where to draw.
    rows: names, top to bottom.
    choices: name -> options of the rows, left to right.

  Returns:
    ax.
  """
  known = sorted({o for c in choices.values() for o in c}, key=_width)
  image = np.array(
    [[known.index(c[i]) for c in choices.values()] for i in range(len(rows))]
  )
  ax.imshow(image, aspect='auto', cmap='viridis', vmin=0, vmax=len(known))
  options = short(known)
  names = [plots.literal(n) for n in short(choices).values()]
  ax.set_xticks(range(len(names)), names, rotation=40, ha='right')
  ax.set_yticks(range(len(rows)), [plots.shorten(r) for r in rows])
  ax.tick_params(labelsize=7, length=0)
  for (i, j), value in np.ndenumerate(image):
    color = 'white' if value < 0.6 * len(known) else 'black'
    text = _cell(options[known[value]])
    ax.text(j, i, text, ha='center', va='center', fontsize=6, color=color)
  for spine in ax.spines.values():
    spine.set_visible(False)
  return ax


def _cell(option: str) -> str:
  """What fits a cell: one line for each role."""
  return '\n'.join(plots.shorten(part, 11) for part in option.split(', '))


def _width(option: str) -> tuple[int, str]:
  """Sorts options by the first number in them."""
  digits = ''.join(c if c.isdigit() else ' ' for c in option).split()
  return (int(digits[0]) if digits else 99), option


def progress(
  ax: Axes, curves: Mapping[str, Sequence[float]], value: str = 'best so far'
) -> Axes:
  """The best value found so far after each trial; failed trials are NaN."""
  for i, (name, values) in enumerate(curves.items()):
    finite = np.where(np.isfinite(values), values, np.inf)
    best = np.minimum.accumulate(finite)
    ax.step(
      np.arange(1, len(best) + 1),
      np.where(np.isfinite(best), best, np.nan),
      where='post',
      color=plots._CYCLE[i % len(plots._CYCLE)],
      label=plots.literal(name),
    )
  ax.set_xlabel('trials')
  ax.set_ylabel(plots.literal(value))
  ax.grid(alpha=0.25)
  ax.legend(frameon=False, fontsize=7)
  plots._bare(ax)
  return ax
