"""Pictures of a quantized model; every function draws on the Axes it is given.

Only matplotlib's object interface is used: no global state, no display.
"""

import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import textpath, ticker

# A palette that stays apart for colour-blind readers (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#8A8F98'
_CYCLE = (BLUE, ORANGE, GREEN, '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_SMALL = 7  # points, for labels
_MARKERS = ('o', '^', 's', 'v')
_GAP = 1.5  # lines between one case and the next

Axes = mpl_axes.Axes
Figure = matplotlib.figure.Figure


def figure(width: float, height: float) -> Figure:
  """An empty figure of a size in inches, whose parts make room by themselves.

  That takes several drawings of everything: a report has two figures for every
  variant, and these are laid out by `grid` instead.
  """
  return Figure(figsize=(width, height), layout='constrained')


def grid(
  width: float,
  height: float,
  shape: tuple[int, int],
  *,
  left: float = 0.4,
  below: float = 0.25,
  above: float = 0.25,
) -> tuple[Figure, np.ndarray]:
  """A figure of equal panels at fixed places, in inches.

  Args:
    width: of the figure.
    height: of the figure.
    shape: rows and columns of panels.
    left: room for tick labels at the left of the first column.
    below: room for tick labels under each panel.
    above: room for a title over each panel.

  Returns:
    The figure and its axes, of that shape.
  """
  down, across = shape
  gap = 0.4  # between columns
  panel_width = (width - left - 0.1 - gap * (across - 1)) / across
  panel_height = height / down - below - above
  fig = Figure(figsize=(width, height))
  axes = fig.subplots(
    down,
    across,
    squeeze=False,
    gridspec_kw={
      'left': left / width,
      'right': 1 - 0.1 / width,
      'bottom': below / height,
      'top': 1 - above / height,
      'wspace': gap / panel_width,
      'hspace': (below + above) / panel_height,
    },
  )
  return fig, axes


def to_png(fig: Figure, dpi: int = 110) -> bytes:
  """The figure as PNG; the same figure gives the same bytes."""
  buffer = io.BytesIO()
  fig.savefig(buffer, format='png', dpi=dpi, metadata={'Software': None})
  return buffer.getvalue()


def sqnr_bars(ax: Axes, sites: Sequence[str], sqnr: Sequence[float]) -> Axes:
  """Signal to quantization noise of each site, in dB; more is better.

  Args:
    ax: where to draw.
    sites: names, drawn top to bottom.
    sqnr: dB; a site that is not finite is left without a bar.

  Returns:
    ax.
  """
  values = np.asarray(sqnr, float)
  finite = np.isfinite(values)
  _site_axis(ax, sites)
  ax.barh(np.flatnonzero(finite), values[finite], height=0.7, color=BLUE)
  ax.axvline(0, color=GREY, lw=0.8)
  ax.set_xlabel('SQNR of the output (dB)')
  return ax


def block_bars(
  ax: Axes, blocks: Sequence[str], errors: Sequence[float]
) -> Axes:
  """Relative squared error of the stream after each block; less is better.

  Args:
    ax: where to draw.
    blocks: names, drawn top to bottom.
    errors: squared error over squared norm, drawn on a logarithmic axis; one
      that is zero or not finite is left without a bar.

  Returns:
    ax.
  """
  values = np.asarray(errors, float)
  drawn = np.isfinite(values) & (values > 0)
  _site_axis(ax, blocks)
  if drawn.any():
    low = 10 ** np.floor(np.log10(values[drawn].min()) - 0.3)
    ax.set_xscale('log')
    ax.barh(np.flatnonzero(drawn), values[drawn] - low, 0.7, low, color=ORANGE)
    ax.set_xlim(low, 10 ** np.ceil(np.log10(values[drawn].max()) + 0.1))
    ax.xaxis.set_major_locator(ticker.LogLocator(numticks=6))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.set_xlabel('noise / signal after the block')
  return ax


def loss_curves(ax: Axes, curves: Mapping[str, Sequence[float]]) -> Axes:
  """The loss of every block over the steps of its tuning."""
  for i, (name, losses) in enumerate(curves.items()):
    style = '-' if i < len(_CYCLE) else '--'
    ax.plot(
      range(1, len(losses) + 1),
      losses,
      style,
      marker='.',
      lw=1.0,
      color=_CYCLE[i % len(_CYCLE)],
      label=shorten(name, 30),
    )
  ax.set_xlabel('step')
  ax.set_ylabel('loss')
  ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  ax.tick_params(labelsize=_SMALL)
  ax.grid(alpha=0.25)
  ax.legend(
    loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7
  )
  _bare(ax)
  return ax


def bits_bars(ax: Axes, sites: Sequence[str], bits: Sequence[float]) -> Axes:
  """Bits per weight of each site, scales included."""
  _site_axis(ax, sites)
  ax.barh(range(len(bits)), bits, height=0.7, color=GREEN)
  ax.set_xlabel('bits per weight')
  return ax


def bytes_bars(
  ax: Axes,
  sites: Sequence[str],
  nbytes: Sequence[float],
  float_nbytes: Sequence[float],
) -> Axes:
  """Bytes of each site's weight, over those of the float weight."""
  _site_axis(ax, sites)
  ax.barh(
    range(len(nbytes)), float_nbytes, height=0.7, color='#DDE1E6', label='float'
  )
  ax.barh(range(len(nbytes)), nbytes, height=0.7, color=ORANGE, label='coded')
  ax.xaxis.set_major_formatter(ticker.EngFormatter(unit='B', places=0))
  ax.xaxis.set_major_locator(ticker.MaxNLocator(4))
  ax.set_xlabel('bytes')
  ax.legend(loc='lower right', fontsize=7, edgecolor='none')
  return ax


def histogram(
  ax: Axes,
  before: Mapping[str, Any] | None,
  after: Mapping[str, Any] | None = None,
  title: str = '',
  labels: tuple[str, str] = ('float', 'coded'),
) -> Axes:
  """Distribution of values in float, and of the coded ones on top.

  Args:
    ax: where to draw.
    before: {'edges': n + 1, 'counts': n} of the float values; None where they
      are not known.
    after: the same of the values their codes stand for.
    title: above it.
    labels: what the two are.

  Returns:
    ax. Counts are logarithmic: the tails decide the scale.
  """
  if before is not None:
    ax.stairs(
      before['counts'],
      before['edges'],
      fill=True,
      color='#B9D6EA',
      label=labels[0],
    )
  if after is not None:
    ax.stairs(
      after['counts'], after['edges'], color=ORANGE, lw=1.0, label=labels[1]
    )
  ax.set_yscale('log')
  ax.set_ylim(bottom=0.5)
  ax.yaxis.set_major_locator(ticker.LogLocator(numticks=4))
  ax.yaxis.set_minor_locator(ticker.NullLocator())
  ax.set_title(literal(title), fontsize=8)
  ax.tick_params(labelsize=7)
  ax.xaxis.set_major_locator(ticker.MaxNLocator(4))
  _bare(ax)
  return ax


def quality_against_size(
  ax: Axes,
  points: Mapping[str, tuple[float, float]],
  reference: tuple[float, float] | None = None,
  label: str = 'accuracy',
) -> Axes:
  """Each variant's quality over its size, with the best ones joined.

  Args:
    ax: where to draw.
    points: variant -> (bytes, quality); more quality is better.
    reference: the float model's (bytes, quality).
    label: what quality is.

  Returns:
    ax.
  """
  # A legend, not labels at the points: near the top they would overlap.
  for i, (name, (size, quality)) in enumerate(points.items()):
    ax.scatter(
      [size],
      [quality],
      s=30,
      **_look(i),
      label=literal(name),
      zorder=3,
    )
  front = pareto_front(list(points.values()))
  ax.plot(*zip(*front, strict=True), color=GREY, lw=0.9, zorder=1)
  if reference is not None:
    ax.axhline(reference[1], color=GREY, lw=0.8, ls='--')
    ax.scatter(
      *reference, s=36, marker='D', color='black', label='float', zorder=3
    )
  ax.legend(
    loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8
  )
  ax.set_xscale('log')
  ax.xaxis.set_major_formatter(ticker.EngFormatter(unit='B'))
  ax.xaxis.set_minor_formatter(ticker.NullFormatter())
  ax.margins(x=0.08, y=0.12)
  ax.set_xlabel('size of the parameters')
  ax.set_ylabel(label)
  ax.grid(alpha=0.25)
  _bare(ax)
  return ax


def speedups(
  ax: Axes,
  cases: Mapping[str, Mapping[str, tuple[float, float, float]]],
) -> Axes:
  """How many times as fast as a baseline each contestant of each case is.

  Args:
    ax: where to draw; `speedup_lines(cases)` says how high.
    cases: case -> contestant -> lower quartile, median and upper quartile, all
      positive. A contestant looks the same in every case.

  Returns:
    ax.
  """
  names: list[str] = []  # seen so far
  bottom, middles = 0.0, list[float]()
  for case in cases.values():
    if middles:
      ax.axhline(bottom, color=GREY, lw=0.4)
    for i, (name, (low, median, high)) in enumerate(case.items()):
      new = name not in names
      if new:
        names.append(name)
      ax.errorbar(
        [median],
        [bottom + _GAP / 2 + i + 0.5],
        xerr=[[median - low], [high - median]],
        ls='',
        ms=4.5,
        elinewidth=1.2,
        label=literal(name) if new else None,
        **_look(names.index(name)),
      )
    middles.append(bottom + (_GAP + len(case)) / 2)
    bottom += _GAP + len(case)
  ax.axvline(1, color=GREY, lw=0.8, ls='--')
  ax.set_xscale('log')
  ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  ax.xaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.set_yticks(middles, [shorten(case) for case in cases])
  ax.set_ylim(bottom, 0)
  ax.tick_params(labelsize=_SMALL)
  ax.tick_params(axis='y', length=0)
  ax.grid(axis='x', alpha=0.25)
  ax.legend(
    loc='upper left',
    bbox_to_anchor=(1.01, 1),
    frameon=False,
    fontsize=_SMALL,
  )
  _bare(ax)
  return ax


def speedup_lines(cases: Mapping[str, Mapping[str, Any]]) -> float:
  """Lines that `speedups` draws, gaps between cases included."""
  return sum(_GAP + len(case) for case in cases.values())


def sqnr_map(
  ax: Axes,
  sites: Sequence[str],
  variants: Sequence[str],
  sqnr: Sequence[Sequence[float]],
) -> Axes:
  """SQNR of every site under every variant: which sites are hard, and when.

  Args:
    ax: where to draw.
    sites: rows.
    variants: columns.
    sqnr: dB, (sites, variants); NaN where a site stayed float.

  Returns:
    ax.
  """
  values = np.asarray(sqnr, float)
  shown = np.where(np.isfinite(values), values, np.nan)
  image = ax.imshow(shown, aspect='auto', cmap='viridis', vmin=0)
  names = [literal(v) for v in variants]
  ax.set_xticks(range(len(names)), names, rotation=40, ha='right')
  ax.set_yticks(range(len(sites)), [shorten(s) for s in sites])
  ax.tick_params(labelsize=7, length=0)
  ax.set_facecolor('#EEF0F3')
  for i, j in np.argwhere(np.isfinite(shown)):
    dark = shown[i, j] < 0.6 * np.nanmax(shown)
    ax.text(
      j,
      i,
      f'{shown[i, j]:.0f}',
      ha='center',
      va='center',
      fontsize=6,
      color='white' if dark else 'black',
    )
  ax.figure.colorbar(image, ax=ax, label='SQNR (dB)', shrink=0.8)
  for spine in ax.spines.values():
    spine.set_visible(False)
  return ax


def learning_curves(
  ax: Axes,
  curves: Mapping[str, Sequence[Sequence[Sequence[float]]]],
  label: str,
) -> Axes:
  """A quantity over training steps; a variant's seeds share a colour.

  Args:
    ax: where to draw.
    curves: variant -> a curve a seed, each of [step, value].
    label: of the quantity; a loss is drawn on a logarithmic axis.

  Returns:
    ax.
  """
  for i, (name, runs) in enumerate(curves.items()):
    for j, run in enumerate(runs):
      steps, values = np.asarray(run, float).T
      label_ = literal(name) if j == 0 else None
      color = _CYCLE[i % len(_CYCLE)]
      style = '-' if i < len(_CYCLE) else '--'
      ax.plot(steps, values, style, color=color, lw=1.1, label=label_)
  if 'loss' in label:
    ax.set_yscale('log')
  ax.set_xlabel('step')
  ax.set_ylabel(label.replace('_', ' '))
  ax.grid(alpha=0.25)
  ax.legend(fontsize=_SMALL, frameon=False)
  _bare(ax)
  return ax


def pareto_front(
  points: Sequence[tuple[float, float]],
) -> list[tuple[float, float]]:
  """The points that none beats: smaller and better. Sorted by size."""
  front: list[tuple[float, float]] = []
  for size, quality in sorted(points, key=lambda p: (p[0], -p[1])):
    if not front or quality > front[-1][1]:
      front.append((size, quality))
  return front


def shorten(name: str, limit: int = 38) -> str:
  """Keeps the end of a long path, which tells one site from the next."""
  name = name if len(name) <= limit else '…' + name[1 - limit :]
  return literal(name)


def literal(text: str) -> str:
  """Text that matplotlib shows as it is: '$' would start a formula."""
  return text.replace('$', r'\$')


def label_width(names: Sequence[str]) -> float:
  """Inches that the names of sites take beside an axis."""
  return 0.2 + max(map(_text_width, names), default=0.0)


@functools.lru_cache(maxsize=1024)  # every variant has the same sites
def _text_width(name: str) -> float:
  path = textpath.TextPath((0, 0), shorten(name), size=_SMALL)
  return path.get_extents().width / 72


def _look(i: int) -> dict[str, Any]:
  """Colour and marker of the i-th of many series."""
  return {
    'color': _CYCLE[i % len(_CYCLE)],
    'marker': _MARKERS[i // len(_CYCLE) % len(_MARKERS)],
  }


def _site_axis(ax: Axes, sites: Sequence[str]) -> None:
  """One row a site, the first on top."""
  ax.set_yticks(range(len(sites)), [shorten(s) for s in sites])
  ax.set_ylim(len(sites) - 0.4, -0.6)
  ax.tick_params(labelsize=_SMALL)
  ax.tick_params(axis='y', length=0)
  ax.grid(axis='x', alpha=0.25)
  _bare(ax)


def _bare(ax: Axes) -> None:
  for side in ('top', 'right'):
    ax.spines[side].set_visible(False)
