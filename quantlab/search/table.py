"""The table: what each option of each row costs, and what it does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from quantlab.recipe import Rule, expression

Columns = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Row:
  """Sites that are decided together.

  Attributes:
    name: of the first site, unless it is given another.
    options: what each choice is called.
    sites: ids; several where they are tied.
    rules: what each choice is, None for float; () in a table of no program.
  """

  name: str
  options: tuple[str, ...]
  sites: tuple[str, ...] = ()
  rules: tuple[Rule | None, ...] = ()

  def __post_init__(self):
    if not all(isinstance(n, str) for n in (self.name, *self.options)):
      raise TypeError(
        f'rows and options have names, got {self.name!r}: {self.options!r}'
      )
    if not self.options:
      raise ValueError(f'row {self.name!r} has no options to choose from')
    if len(set(self.options)) < len(self.options):
      raise ValueError(
        f'row {self.name!r} has options of one name: {self.options}'
      )
    if self.rules and len(self.rules) != len(self.options):
      raise ValueError(
        f'row {self.name!r} has {len(self.options)} options and '
        f'{len(self.rules)} rules'
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """Rows times options: the value of each, its standard error, its costs.

  Rows may differ in their number of options: everything by option is a tuple
  of arrays (options,), one a row. Less value is better. A value that is NaN
  was measured and failed; it is kept, and never chosen.

  Attributes:
    rows: what is decided.
    values: increase of the metric where this row alone takes the option.
    stderr: standard errors of the values.
    costs: by name ('bytes', 'bops', ...), of each option.
    metric: what the values are.
    unit: what they are measured in.
    fixed: by the same names, the cost of everything that is not decided.
    kept: rules of the sites that are not decided, by id.
    model: fingerprint of the float parameters; '' in a table of no program.
    interactions: (options, options) over all options of all rows in order,
      symmetric: what two rows do together beside the sum of their values;
      None where it was not measured.
    facts: how it was made, JSON-able.
    layers: of each site whose layers are decided one by one, what rows call
      them.
  """

  rows: tuple[Row, ...]
  values: Columns
  stderr: Columns
  costs: Mapping[str, Columns]
  metric: str
  unit: str
  fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
  kept: Mapping[str, Rule | None] = dataclasses.field(default_factory=dict)
  model: str = ''
  interactions: np.ndarray | None = None
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  layers: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    if not self.rows:
      raise ValueError('a table needs at least one row to decide')
    for what, names in (
      ('rows of one name', [r.name for r in self.rows]),
      ('rows of one site', [s for r in self.rows for s in r.sites]),
    ):
      if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f'a table cannot have two {what}: {twice[:5]}')
    for what, columns in (
      ('values', self.values),
      ('stderr', self.stderr),
      *((f'cost {name!r}', c) for name, c in self.costs.items()),
    ):
      sizes = [np.shape(c) for c in columns]
      if sizes != [(len(r.options),) for r in self.rows]:
        raise ValueError(
          f'the {what} have the shapes {sizes}; expected one number for each '
          f'option of {[(r.name, len(r.options)) for r in self.rows]}'
        )
    unknown = [n for n in self.fixed if n not in self.costs]
    if unknown:
      raise ValueError(
        f'fixed costs {unknown} are none of the costs {list(self.costs)}'
      )
    for name, x in self.fixed.items():
      if not (math.isfinite(x) and x >= 0):
        raise ValueError(
          f'the fixed cost {name!r} is a number from 0 on, got {x!r}'
        )
    if any((np.asarray(s) < 0).any() for s in self.stderr):
      raise ValueError('standard errors are not negative')
    if any(np.isinf(v).any() for v in self.values):
      raise ValueError('values are numbers, or NaN where one failed; found inf')
    for name, columns in self.costs.items():
      if not all(
        (np.isfinite(c) & (np.asarray(c) >= 0)).all() for c in columns
      ):
        raise ValueError(
          f'the cost {name!r} has entries that are negative or not finite'
        )
    size = len(self.flat)
    q = self.interactions
    if q is not None and not np.isfinite(q).all():
      raise ValueError('interactions hold NaN or infinity')
    if q is not None and (q.shape != (size, size) or not np.allclose(q, q.T)):
      raise ValueError(
        f'interactions are symmetric, ({size}, {size}); got {q.shape}'
      )

  def __str__(self) -> str:
    """Every row with the value of each option, and its standard error."""
    lines = [f'{self.metric} ({self.unit}) of {len(self.rows)} rows']
    for row, value, error in zip(
      self.rows, self.values, self.stderr, strict=True
    ):
      cells = [
        f'{o} {v:.3g} ± {e:.1g}'
        for o, v, e in zip(row.options, value, error, strict=True)
      ]
      lines.append(f'  {row.name}: ' + ', '.join(cells))
    if self.interactions is not None:
      lines.append('  with what every two entries do jointly')
    left = {k: v for k, v in self.fixed.items() if v}
    if left:
      lines.append(f'  not decided, and counted: {left}')
    return '\n'.join(lines)

  @property
  def flat(self) -> tuple[tuple[int, int], ...]:
    """(row, option) of every entry, in order."""
    return tuple(
      (i, k) for i, r in enumerate(self.rows) for k in range(len(r.options))
    )

  def check_choice(self, choice: Sequence[int]) -> None:
    """Refuses what is not one option for each row.

    Raises:
      ValueError: says which row, and what it has.
    """
    if np.ndim(choice) != 1 or len(choice) != len(self.rows):
      raise ValueError(
        f'a choice has one option for each of {len(self.rows)} rows, got '
        f'{choice!r}'
      )
    for row, k in zip(self.rows, choice, strict=True):
      if not (is_whole(k) and 0 <= k < len(row.options)):
        raise ValueError(
          f'row {row.name!r} has the options 0 to {len(row.options) - 1} '
          f'{row.options}, got {k!r}'
        )

  def cost(self, choice: Sequence[int], name: str = 'bytes') -> float:
    """The whole cost of a choice of one option for each row."""
    columns = self.costs[check_name('cost', name, self.costs)]
    self.check_choice(choice)
    picked = _pick(columns, choice)
    return float(math.fsum(picked) + self.fixed.get(name, 0.0))

  def predict(self, choice: Sequence[int]) -> float:
    """The value of a choice: the sum of its entries and, where they were
    measured, of the interactions of every two rows.
    """
    total = math.fsum(_pick(self.values, choice))
    if self.interactions is not None:
      at = self.index(choice)
      total += float(np.triu(self.interactions[np.ix_(at, at)], 1).sum())
    return total

  def spread(self, choice: Sequence[int]) -> float:
    """Standard error of the additive prediction, rows taken as independent."""
    return float(np.sqrt(np.square(_pick(self.stderr, choice)).sum()))

  def index(self, choice: Sequence[int]) -> np.ndarray:
    """Where a choice lies in the order of `flat`."""
    starts = np.cumsum([0, *(len(r.options) for r in self.rows)])[:-1]
    return starts + np.asarray(choice, int)

  def labels(self, choice: Sequence[int]) -> dict[str, str]:
    """The chosen option of each row, by name."""
    return {
      r.name: r.options[k] for r, k in zip(self.rows, choice, strict=True)
    }

  def uniform(self, option: str) -> tuple[int, ...]:
    """The same option in every row; rows with one option keep that.

    Raises:
      ValueError: names a row that has no such option.
    """
    return uniform(self.rows, option)

  def tied(self, groups: Iterable[Sequence[str]]) -> Table:
    """Rows joined so that each group takes one option.

    Values, costs and interactions add up, standard errors by their squares.

    Args:
      groups: names of rows (or of their sites); groups that share one join.

    Raises:
      ValueError: an unknown row, or rows of different options in one group.
    """
    parts = _groups(self, groups)
    for part in parts:
      first = self.rows[part[0]]
      for i in part[1:]:
        row = self.rows[i]
        if (row.options, row.rules) != (first.options, first.rules):
          raise ValueError(
            f'tied rows need the same options: {first.name!r} has '
            f'{first.options}, {row.name!r} has {row.options}'
          )

    def add(columns):
      return tuple(sum(columns[i] for i in part) for part in parts)

    rows = tuple(
      dataclasses.replace(
        self.rows[part[0]],
        name=' + '.join(self.rows[i].name for i in part),
        sites=tuple(s for i in part for s in self.rows[i].sites),
      )
      for part in parts
    )
    values, inner = add(self.values), None
    if self.interactions is not None:
      values, inner = self._tie_interactions(parts, values)
    squares = tuple(np.square(s) for s in self.stderr)
    return dataclasses.replace(
      self,
      rows=rows,
      values=values,
      stderr=tuple(np.sqrt(s) for s in add(squares)),
      costs={k: add(c) for k, c in self.costs.items()},
      interactions=inner,
    )

  def _tie_interactions(self, parts, values):
    """Interactions within a group move into its values."""
    assert self.interactions is not None
    home = {i: g for g, part in enumerate(parts) for i in part}
    width = [len(self.rows[p[0]].options) for p in parts]
    start = np.cumsum([0, *width])
    where = [start[home[i]] + k for i, k in self.flat]
    merge = np.zeros((start[-1], len(where)))
    merge[where, np.arange(len(where))] = 1
    whole = merge @ self.interactions @ merge.T
    values = [np.array(v) for v in values]
    for g, v in enumerate(values):
      block = slice(start[g], start[g + 1])
      # Each pair is in the sum twice.
      v += np.diag(whole[block, block]) / 2
      whole[block, block] = 0
    return tuple(values), whole

  def select(self, pattern: str) -> Table:
    """The rows whose name a regular expression is found in.

    What the others cost is not in `fixed`: budgets are for these rows alone.
    """
    search = expression(pattern, 'the pattern').search
    keep = [i for i, r in enumerate(self.rows) if search(r.name)]
    if not keep:
      raise ValueError(
        f'no row matches {pattern!r}: {[r.name for r in self.rows]}'
      )

    def some(columns):
      return tuple(columns[i] for i in keep)

    q = self.interactions
    if q is not None:
      at = [n for n, (i, _) in enumerate(self.flat) if i in keep]
      q = q[np.ix_(at, at)]
    return dataclasses.replace(
      self,
      rows=some(self.rows),
      values=some(self.values),
      stderr=some(self.stderr),
      costs={k: some(c) for k, c in self.costs.items()},
      fixed={},
      interactions=q,
    )

  def floored(self, sigmas: float = 0.0) -> Table:
    """Values that are negative, or within some standard errors of 0, are 0.

    What quantizing a site seems to gain is nearly always noise, and an
    allocation that believes it spends bytes on it.
    """
    new = tuple(
      np.where(v < np.maximum(sigmas * np.nan_to_num(s), 0), 0.0, v)
      for v, s in zip(self.values, self.stderr, strict=True)
    )
    return dataclasses.replace(self, values=new)

  def check_model(self, fingerprint: str) -> None:
    """Refuses to be used for other parameters than it was measured on."""
    if self.model != fingerprint:
      raise ValueError(
        f'the table was measured on another model: its parameters have the '
        f'fingerprint {self.model!r}, these have {fingerprint!r}. Measure one '
        'on these; an allocation is taken for other parameters as '
        'allocation.recipe'
      )

  def to_json(self) -> dict[str, Any]:
    """Plain JSON values; what is not finite is written as null (NaN)."""
    q = self.interactions
    return {
      'rows': [
        {
          'name': r.name,
          'options': list(r.options),
          'sites': list(r.sites),
          'rules': [x and x.to_json() for x in r.rules],
        }
        for r in self.rows
      ],
      'values': _plain(self.values),
      'stderr': _plain(self.stderr),
      'costs': {k: _plain(c) for k, c in self.costs.items()},
      'metric': self.metric,
      'unit': self.unit,
      'fixed': dict(self.fixed),
      'kept': {k: r and r.to_json() for k, r in self.kept.items()},
      'model': self.model,
      'interactions': None if q is None else q.tolist(),
      'facts': dict(self.facts),
      **({'layers': dict(self.layers)} if self.layers else {}),
    }

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Table:
    """Undoes `to_json`.

    Raises:
      ValueError: it is no table: a field is missing, or of another kind.
    """
    try:
      return cls._read(data)
    except KeyError as error:
      raise ValueError(f'this is no table: it has no {error}') from error
    except (TypeError, AttributeError) as error:
      raise ValueError(f'this is no table: {error}') from error

  @classmethod
  def _read(cls, data: Mapping[str, Any]) -> Table:
    rows = tuple(
      Row(
        r['name'],
        tuple(_list(r['options'])),
        tuple(r['sites']),
        tuple(x and Rule.from_json(x) for x in r['rules']),
      )
      for r in data['rows']
    )
    q = data['interactions']
    return cls(
      rows=rows,
      values=_arrays(data['values']),
      stderr=_arrays(data['stderr']),
      costs={k: _arrays(c) for k, c in data['costs'].items()},
      metric=data['metric'],
      unit=data['unit'],
      fixed=dict(data['fixed']),
      kept={k: r and Rule.from_json(r) for k, r in data['kept'].items()},
      model=data['model'],
      interactions=None if q is None else np.asarray(q, float),
      facts=dict(data['facts']),
      layers={k: tuple(v) for k, v in data.get('layers', {}).items()},
    )


def uniform(rows: Sequence[Row], option: str) -> tuple[int, ...]:
  """See `Table.uniform`."""
  found = []
  for row in rows:
    if option in row.options:
      found.append(row.options.index(option))
    elif len(row.options) == 1:
      found.append(0)
    else:
      raise ValueError(
        f'row {row.name!r} has no option {option!r}; it has {row.options}'
      )
  return tuple(found)


def additive(table: Table) -> Table:
  """The table without its interactions."""
  return dataclasses.replace(table, interactions=None)


def check_table(name: str, table: Any) -> None:
  """Refuses what is not one table.

  Raises:
    TypeError: says what was found.
  """
  if isinstance(table, Mapping):
    raise TypeError(
      f'{name} takes one table, got those of {list(table)}: pass one of them'
    )
  if not isinstance(table, Table):
    raise TypeError(f'{name} takes a search.Table, got {table!r}')


def refuse_failed(table: Table) -> None:
  """Refuses a table with a row none of whose options can be chosen.

  Raises:
    ValueError: names it.
  """
  for row, value in zip(table.rows, table.values, strict=True):
    if not np.isfinite(value).any():
      raise ValueError(
        f'every option of row {row.name!r} failed: {row.options} have the '
        f'values {value.tolist()}'
      )


def is_whole(x: Any) -> bool:
  """Whether something is a whole number, of Python or of NumPy."""
  return isinstance(x, int | np.integer) and not isinstance(x, bool)


def check_count(name: str, value: Any, least: int) -> None:
  """Refuses what is not a whole number from `least` on, below 2^31.

  Raises:
    ValueError: says what was found.
  """
  if not (is_whole(value) and least <= value < 2**31):
    raise ValueError(
      f'{name}={value!r}: expected a whole number, at least {least} and below '
      '2^31'
    )


def check_number(what: str, x: Any) -> float:
  """Any real number, of Python, NumPy or JAX, as a float.

  Raises:
    ValueError: it is none, or NaN; says what it is the number of.
  """
  scalar = np.ndim(x) == 0 and not isinstance(x, bool | np.bool_ | str)
  try:
    found = float(x) if scalar else math.nan
  except TypeError:
    found = math.nan
  if math.isnan(found):
    raise ValueError(f'{what} is a number, got {x!r}')
  return found


def check_name(kind: str, name: str, known: Iterable[str]) -> str:
  """The name, if it is known."""
  if not isinstance(name, str) or name not in known:
    raise ValueError(f'unknown {kind} {name!r}; known: {sorted(known)}')
  return name


def _pick(columns: Columns, choice: Sequence[int]) -> list[float]:
  return [float(c[k]) for c, k in zip(columns, choice, strict=True)]


def _plain(columns: Columns) -> list[list[float | None]]:
  return [
    [x if math.isfinite(x) else None for x in map(float, c)] for c in columns
  ]


def _list(value: Any) -> list[Any]:
  if not isinstance(value, list):
    raise TypeError(f'expected a list, got {value!r}')
  return value


def _arrays(columns: Sequence[Sequence[float | None]]) -> Columns:
  return tuple(
    np.array([math.nan if x is None else x for x in c], float) for c in columns
  )


def _groups(table: Table, groups: Iterable[Sequence[str]]) -> list[list[int]]:
  """Rows by group, groups that overlap joined, in the order of the table."""
  where = {r.name: i for i, r in enumerate(table.rows)}
  where |= {s: i for i, r in enumerate(table.rows) for s in r.sites}
  parent = list(range(len(table.rows)))

  def root(i: int) -> int:
    while parent[i] != i:
      i = parent[i]
    return i

  for group in groups:
    if isinstance(group, str) or not group:
      raise ValueError(f'a tie is a list of names of rows, got {group!r}')
    unknown = [name for name in group if name not in where]
    if unknown:
      raise ValueError(
        f'ties name unknown rows {unknown}; known: {sorted(where)}'
      )
    for name in group:
      low, high = sorted((root(where[group[0]]), root(where[name])))
      parent[high] = low
  found: dict[int, list[int]] = {}
  for i in range(len(parent)):
    found.setdefault(root(i), []).append(i)
  return list(found.values())
