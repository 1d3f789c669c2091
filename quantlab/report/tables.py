"""The numbers of a run as rows, and rows as a table on the terminal."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich import console as rich_console
from rich import table as rich_table
from rich import text as rich_text

_UNLIMITED = 10_000  # characters
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
  """One metric as a column: header, how a value reads, and its spread.

  Attributes:
    name: the metric's key.
    header: what stands above it.
    show: value -> text.
    spread: key of the metric's standard error, shown as '± ...'.
    better: 'high' or 'low' where one is better, else None.
  """

  name: str
  header: str
  show: Callable[[float], str]
  spread: str | None = None
  better: str | None = None


def _percent(x: float) -> str:
  return f'{100 * x:.2f} %'


def _number(x: float) -> str:
  return f'{x:.4f}'


def _short(x: float) -> str:
  return f'{x:.2e}' if 0 < abs(x) < 1e-3 else f'{x:.4f}'


def _decibel(x: float) -> str:
  return f'{x:.1f} dB'


def nbytes(x: float) -> str:
  """A size in bytes as people read it, in powers of 1000."""
  for unit in ('B', 'kB', 'MB', 'GB'):
    if abs(x) < 1000:
      return f'{x:.0f} B' if unit == 'B' else f'{x:.1f} {unit}'
    x /= 1000
  return f'{x:.1f} TB'


COLUMNS = (
  Column('accuracy', 'accuracy', _percent, 'accuracy_stderr', 'high'),
  Column('spearman', 'Spearman', _number, 'spearman_stderr', 'high'),
  Column('perplexity', 'perplexity', _number, 'perplexity_stderr', 'low'),
  Column(
    'cross_entropy', 'cross-entropy', _number, 'cross_entropy_stderr', 'low'
  ),
  Column('similarity_error', 'similarity error', _number, None, 'low'),
  Column('agreement', 'agreement', _percent, 'agreement_stderr', 'high'),
  Column('kl_mean', 'KL', _short, 'kl_mean_stderr', 'low'),
  Column('kl_p99', 'KL 99 %', _short, None, 'low'),
  Column('sqnr_db', 'SQNR', _decibel, None, 'high'),
  Column('nbytes', 'size', nbytes, None, 'low'),
  Column('bits_per_weight', 'bits/weight', lambda x: f'{x:.2f}', None, 'low'),
)


def rows(metrics: Mapping[str, Any]) -> list[Row]:
  """Groups flat metrics by model and variant.

  Args:
    metrics: `fp/<model>/<metric>` and `q/<model>/<variant>/<metric>`; other
      keys are left out.

  Returns:
    One dict a (model, variant), with 'model', 'variant' ('float' for the
    unquantized one) and its metrics; models in order of appearance, each
    with its float row first.
  """
  found: dict[tuple[str, str], Row] = {}
  for key, value in metrics.items():
    parts = key.split('/')
    if parts[0] == 'fp' and len(parts) > 2:
      model, variant, name = parts[1], 'float', '/'.join(parts[2:])
    elif parts[0] == 'q' and len(parts) > 3:
      model, variant, name = parts[1], parts[2], '/'.join(parts[3:])
    else:
      continue
    row = found.setdefault(
      (model, variant), {'model': model, 'variant': variant}
    )
    row[name] = value
  models = list(dict.fromkeys(row['model'] for row in found.values()))
  return sorted(
    found.values(),
    key=lambda r: (models.index(r['model']), r['variant'] != 'float'),
  )


def columns(table: Sequence[Row]) -> list[Column]:
  """The known columns of which any row has a value."""
  return [
    c
    for c in COLUMNS
    if any(number(row.get(c.name)) is not None for row in table)
  ]


def number(value: Any) -> float | None:
  """A metric as a float, strings 'nan' and 'inf' included, else None."""
  if isinstance(value, bool) or value is None:
    return None
  try:
    return float(value)
  except ValueError:
    return None


def cell(row: Row, column: Column) -> str:
  """What a row shows in a column: value, spread; '' when it has none."""
  value = number(row.get(column.name))
  if value is None:
    return ''
  spread = number(row.get(column.spread)) if column.spread else None
  text = column.show(value)
  return text if spread is None else f'{text} ± {_spread(column, spread)}'


def results_table(
  metrics: Mapping[str, Any],
  title: str = '',
  chosen: Sequence[Column] | None = None,
) -> rich_table.Table:
  """Every model and variant with the metrics they have, as a rich table.

  Args:
    metrics: flat metrics, see `rows`.
    title: above the table.
    chosen: the columns to show; by default all that have values.

  Returns:
    A `rich.table.Table`; `show` prints one whole.
  """
  body = rows(metrics)
  shown = columns(body) if chosen is None else chosen
  table = rich_table.Table(title=title or None, box=box.SIMPLE_HEAD)
  table.add_column('model', no_wrap=True)
  table.add_column('variant', no_wrap=True)
  for column in shown:
    table.add_column(column.header, justify='right', no_wrap=True)
  for i, row in enumerate(body):
    first = i == 0 or body[i - 1]['model'] != row['model']
    if first and i:
      table.add_section()
    table.add_row(
      # Text, not str: a name may hold the brackets of rich's markup.
      rich_text.Text(row['model'] if first else ''),
      rich_text.Text(row['variant']),
      *(cell(row, column) for column in shown),
      style='bold' if row['variant'] == 'float' else None,
    )
  return table


def results_tables(
  metrics: Mapping[str, Any], width: int
) -> list[rich_table.Table]:
  """`results_table`, its columns spread over as many tables as fit a width."""
  body = rows(metrics)
  edges = 3  # what rich puts beside a column: two spaces and a divider
  names = sum(
    edges + max((len(r[name]) for r in body), default=0)
    for name in ('model', 'variant')
  )
  parts: list[list[Column]] = [[]]
  left = width - 1 - names
  for column in columns(body):
    needed = edges + max(
      len(column.header), *(len(cell(r, column)) for r in body)
    )
    if parts[-1] and needed > left:
      parts.append([])
      left = width - 1 - names
    parts[-1].append(column)
    left -= needed
  return [results_table(metrics, chosen=part) for part in parts]


def show(metrics: Mapping[str, Any]) -> None:
  """Prints the results: a terminal gets what fits it, a file one table."""
  console = rich_console.Console()
  width = console.width if console.is_terminal else _UNLIMITED
  for table in results_tables(metrics, width):
    options = console.options.update_width(_UNLIMITED)
    needed = console.measure(table, options=options).maximum
    # A wider print than the terminal wraps; a narrower one would cut names.
    rich_console.Console(width=max(needed, 1)).print(table)


def _spread(column: Column, spread: float) -> str:
  """A standard error in the unit of its column, without the unit."""
  if column.show is _percent:
    return f'{100 * spread:.2f}'
  return column.show(spread).removesuffix(' dB')
