"""Where a program is cut into blocks.

A cut belongs where a single value that depends on a site is alive: after every
attention and every MLP of a transformer, after every residual block of a conv
net. Where none comes for long (the skips of a U-Net, a time embedding that is
used everywhere), the program is cut where the fewest values are in use, and
what merely passes through is carried along.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence

from quantlab.graph import _jaxpr
from quantlab.graph.flat import Fact, Flat, Op, producers

# A stretch of more sites than this without a single-value cut is divided.
LONG = 12
# A value waiting for its next use for more sites than this passes through: a
# residual waits for an attention or an MLP, a skip for much of the network.
WAIT = 6
# A value that is used in more places than this, sites between them, belongs to
# all of them, not to the stream.
SHARED = 4

_CONTRACTIONS = (
  'dot_general',
  'conv_general_dilated',
  'ragged_dot_general',
  'gather',
)
_LAYOUT = (
  'transpose',
  'reshape',
  'squeeze',
  'expand_dims',
  'broadcast_in_dim',
  'convert_element_type',
  'copy',
  'stop_gradient',
  'slice',
  'split',
  'unstack',
)


@dataclasses.dataclass(frozen=True)
class Liveness:
  """The values that depend on a site, and where they are needed.

  Attributes:
    born: operation that makes each value.
    births: (operation, value), in order.
    last: last operation that needs it.
    readers: operations that need it, in order.
    needed: operations whose results reach the output.
    returned: values that the program returns.
    held: inputs that go through sites and are added to what comes out (hidden
      states given from outside): alive until they are, though no stream.
  """

  born: dict[int, int]
  births: list[tuple[int, int]]
  last: dict[int, int]
  readers: dict[int, list[int]]
  needed: frozenset[int]
  returned: frozenset[int]
  held: dict[int, int]

  def crossing(self, position: int) -> list[int]:
    """Values made before a position and needed after it, the soonest first."""

    def next_use(v):
      readers = self.readers.get(v, ())
      k = bisect.bisect_left(readers, position)
      return readers[k] if k < len(readers) else float('inf')

    return sorted(
      (
        v
        for v, b in self.born.items()
        if b < position
        and (self.last.get(v, -1) >= position or v in self.returned)
      ),
      key=lambda v: (next_use(v), -self.born[v], v),
    )


def liveness(flat: Flat, known: dict[int, Fact]) -> Liveness:
  """Where every value of the stream is made and needed."""
  made = producers(flat)
  returned = {a for a in flat.outs if isinstance(a, int)}
  needed: set[int] = {
    i
    for i, op in enumerate(flat.ops)
    if op.eqn is not None and _jaxpr.has_effects(op.eqn)
  }
  needed |= {made[v] for v in returned if v in made}
  for i in range(len(flat.ops) - 1, -1, -1):
    if i in needed:
      needed |= {made[v] for v in flat.ops[i].variables if v in made}
  readers: dict[int, list[int]] = {}
  for i in sorted(needed):
    for v in set(flat.ops[i].variables):
      if known[v].stream:
        readers.setdefault(v, []).append(i)
  born = {
    v: i
    for i in needed
    for v in flat.ops[i].outs
    if known[v].stream and (v in readers or v in returned)
  }
  last = {v: r[-1] for v, r in readers.items()}
  births = sorted((i, v) for v, i in born.items())
  return Liveness(
    born,
    births,
    last,
    readers,
    frozenset(needed),
    frozenset(returned),
    _held(flat, known, sorted(needed)),
  )


def _held(flat, known, needed: Sequence[int]) -> dict[int, int]:
  """Values of the inputs alone that are a residual: their last sum."""

  def alone(var):
    return known[var].inputs and not known[var].stream

  data: set[int] = set()
  for i in reversed(needed):
    op = flat.ops[i]
    if op.name in _CONTRACTIONS[:3] or data & set(op.outs):
      data |= {v for v in op.variables if alone(v)}
  held: dict[int, int] = {}
  for i in needed:
    op = flat.ops[i]
    if op.name == 'add' and any(known[v].stream for v in op.variables):
      held |= {v: i for v in op.variables if v in data}
  return held


@dataclasses.dataclass(frozen=True)
class Gap:
  """The best place for a cut between two neighbouring sites.

  Attributes:
    position: operations before it belong to the block before.
    live: the fewest values of the stream alive between the two.
    busy: the fewest in use there, those aside that merely pass through.
  """

  position: int
  live: int
  busy: int


def choose(
  flat: Flat,
  live: Liveness,
  sites_of: Callable[[Op], Sequence[str]],
  low: int,
  high: int,
  fixed: Sequence[int] = (),
) -> list[int]:
  """Positions of the cuts inside operations [low, high), in order.

  Args:
    flat: the program.
    live: its stream.
    sites_of: the sites an operation holds.
    low: first operation.
    high: one past the last operation.
    fixed: positions where there must be a cut.
  """
  places = [
    i for i in range(low, high) if i in live.needed and sites_of(flat.ops[i])
  ]
  cuts = set(fixed)
  bounds = [low, *sorted(fixed), high]
  for a, b in itertools.pairwise(bounds):
    here = [i for i in places if a <= i < b]
    gaps = _gaps(flat, live, here, places)
    single = [k for k, g in enumerate(gaps) if g.live <= 1]
    cuts |= {gaps[k].position for k in single}
    ends = [-1, *single, len(gaps)]
    for first, last in itertools.pairwise(ends):
      cuts |= set(_divide(gaps[first + 1 : last]))
  return _merge_lookups(flat, places, sorted(cuts), low, high, set(fixed))


def _divide(gaps: Sequence[Gap]) -> list[int]:
  """Cuts a stretch without a single-value cut where the least is in use."""
  if len(gaps) + 1 <= LONG:
    return []
  least = min(g.busy for g in gaps)
  chosen = [k for k, g in enumerate(gaps) if g.busy == least]
  cuts = [gaps[k].position for k in chosen]
  ends = [-1, *chosen, len(gaps)]
  for first, last in itertools.pairwise(ends):
    cuts += _divide(gaps[first + 1 : last])
  return cuts


def _gaps(flat, live, here, places) -> list[Gap]:
  """One candidate between each pair of neighbouring sites."""
  if len(here) < 2:
    return []
  alive = _Count(here[0] + 1, here[-1])
  busy = _Count(here[0] + 1, here[-1])
  late: set[int] = set()
  for stop in live.held.values():
    alive.add(-1, stop)
    busy.add(-1, stop)
  for var, readers in live.readers.items():
    alive.add(live.born[var], readers[-1])
    points = [live.born[var], *readers]
    waits = [
      bisect.bisect_left(places, b) - bisect.bisect_right(places, a)
      for a, b in itertools.pairwise(points)
    ]
    shared = sum(w > 0 for w in waits) >= SHARED
    for a, b, wait in zip(points[:-1], points[1:], waits, strict=True):
      if wait > WAIT:
        late.add(b)
      elif not shared:
        busy.add(a, b)
  gaps = []
  for a, b in itertools.pairwise(here):
    positions = range(a + 1, b + 1)
    least = min(map(alive.at, positions))
    quiet = min(map(busy.at, positions))
    if least <= 1:
      best = [p for p in positions if alive.at(p) == least]
    else:
      best = [p for p in positions if busy.at(p) == quiet]
      # What takes up a skip again belongs to the block after.
      stop = min((i for i in late if a < i < b), default=b)
      best = [p for p in best if p <= stop] or best
    gaps.append(Gap(_place(flat, live, best), least, quiet))
  return gaps


class _Count:
  """How many intervals cover each of the positions first to last."""

  def __init__(self, first: int, last: int):
    self.first, self.last = first, last
    self.steps = [0] * (last - first + 2)
    self.total: list[int] | None = None

  def add(self, start: int, stop: int) -> None:
    """Covers the positions start + 1 to stop."""
    a, b = max(start + 1, self.first), min(stop, self.last)
    if a <= b:
      self.steps[a - self.first] += 1
      self.steps[b - self.first + 1] -= 1

  def at(self, position: int) -> int:
    if self.total is None:
      self.total = list(itertools.accumulate(self.steps))
    return self.total[position - self.first]


def _place(flat, live, positions: Sequence[int]) -> int:
  """Which of equally good positions: the last, but before a lone reduction.

  What follows a site (a bias, an activation, a norm after the residual) goes
  with it; a norm or a mean over positions that feeds sites alone goes with
  those.
  """
  newest = _newest(live, positions[-1])
  if newest is None or not _feeds_sites_only(flat, live, newest):
    return positions[-1]

  def between(k):
    return [
      flat.ops[i]
      for i in range(positions[k - 1], positions[k])
      if i in live.needed
    ]

  for k in range(len(positions) - 1, 0, -1):
    if any(map(_reduces, between(k))):
      k -= 1
      while k and all(op.name in _LAYOUT for op in between(k)):
        k -= 1
      return positions[k]
  return positions[-1]


def _newest(live, position) -> int | None:
  k = bisect.bisect_left(live.births, (position, -1))
  for _, var in reversed(live.births[:k]):
    if live.last.get(var, -1) >= position:
      return var
  return None


def _feeds_sites_only(flat, live, var) -> bool:
  if var in live.returned:
    return False
  for i in live.readers.get(var, ()):
    op = flat.ops[i]
    if op.name in _LAYOUT:
      if not all(_feeds_sites_only(flat, live, v) for v in op.outs):
        return False
    elif op.name not in _CONTRACTIONS:
      return False
  return True


def _reduces(op: Op) -> bool:
  """Whether an operation sums over an axis, or a call inside it does."""
  return op.eqn is not None and _jaxpr.contains(op.eqn, 'reduce_sum')


def _merge_lookups(flat, places, cuts, low, high, fixed) -> list[int]:
  """Joins neighbouring blocks that hold nothing but embedding lookups."""

  def lookups(a, b):
    inside = [flat.ops[i].name for i in places if a <= i < b]
    return all(name == 'gather' for name in inside)

  kept: list[int] = []
  bounds = [low, *cuts, high]
  for k in range(1, len(bounds) - 1):
    before = kept[-1] if kept else low
    if bounds[k] in fixed or not (
      lookups(before, bounds[k]) and lookups(bounds[k], bounds[k + 1])
    ):
      kept.append(bounds[k])
  return kept
