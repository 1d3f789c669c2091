"""Black-box refinement: measured choices, by any number of workers (Optuna).

Workers are copies of one program that open one study: a journal file on a
file system that all see, or any database that Optuna knows. Nothing a worker
does is lost with it: what it was measuring when it was killed is measured
again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import time
import uuid
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from quantlab import runtime
from quantlab.runtime import files, manifest
from quantlab.search import predict, samplers, storages
from quantlab.search.table import (
  Table,
  check_count,
  check_name,
  check_number,
  check_table,
)

Choice = tuple[int, ...]
SAMPLERS = ('nsga2', 'predicted', 'random')
_UNSIGNED = 30.0  # seconds that a trial may run without its worker's name
_GUARD = 'reclaim'  # a file beside those of the workers


class Study:
  """Choices of the rows of a table, with what was measured of them.

  Args:
    table: its rows are the space; of another table the study is refused.
    storage: a path (a journal file), or a URL of a database such as
      'postgresql://...' or 'sqlite:///file'.
    objectives: names of what is minimized.
    name: of the study in the storage.
    sampler: 'nsga2', 'predicted' (NSGA-II on boosted trees) or 'random'.
    first: trials of a Sobol design before the sampler's own, up to 2^16.
    known: objectives that need no measurement to predict: `choice -> value`,
      finite.
    about: what is measured, beyond the table: data, settings, seeds; JSON-able.
      A study that was begun with another is refused, whose measurements would
      be mixed with these.
    source: storage of a study of this name over the same rows and options: of
      another training or encoder, or by a cheaper measure. Its trials train
      the predictors of 'predicted', objective by objective in order, and those
      of this study only correct them (APQ, arXiv 2006.08509).
    seed: of the design and, with the worker's name, of the sampler; below
      2^31.
    worker: name of this worker among those of the study, none twice: it names
      a file. A random one by default; with a name one worker's draws are
      repeatable.

  Raises:
    ValueError: the storage cannot be reached, is a file of something else, or
      holds a study of another space, or about something else, under this name;
      the source is the storage itself, is not there, of other rows or options,
      or without finished trials; a worker of this name is running; what is
      known is no number; names or numbers that cannot be used.
    TypeError: arguments of another kind.
  """

  def __init__(
    self,
    table: Table,
    storage: str | os.PathLike,
    objectives: Sequence[str] = ('loss',),
    *,
    name: str = 'search',
    sampler: str = 'nsga2',
    first: int = 16,
    known: Mapping[str, Callable[[Choice], float]] | None = None,
    about: Mapping[str, Any] | None = None,
    source: str | os.PathLike | None = None,
    seed: int = 0,
    worker: str | None = None,
  ):
    check_table('Study', table)
    check_name('sampler', sampler, SAMPLERS)
    if isinstance(objectives, str):
      objectives = (objectives,)
    storages.check(storage)
    _check_names(name, objectives, worker)
    check_count('first', first, 0)
    check_count('seed', seed, 0)
    exact = _checked(known, objectives, (0,) * len(table.rows))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    self.table, self.objectives = table, tuple(objectives)
    self.about = _jsonable(about)
    self.sizes = {r.name: len(r.options) for r in table.rows}
    self.worker = uuid.uuid4().hex if worker is None else worker
    # A worker that was killed may come back under its name.
    self._life = uuid.uuid4().hex
    past = None
    if source is not None:
      storages.check_source(source, storage)
      if sampler != 'predicted':
        raise ValueError(
          f'source={storages.shown(source)!r} trains predictors, and '
          f"sampler={sampler!r} has none: 'predicted' has"
        )
      past = trials_of(source, table, len(self.objectives), name)
    made = self._sampler(sampler, first, exact, past, seed)
    self._storage = storage
    self.study = self._open(name, made)
    self._locks = storages.locks(storage)
    self._lock = self._sign()

  def _open(self, name: str, sampler: Any) -> optuna.Study:
    """The study in its storage, begun here or there."""
    shown, reached = (
      storages.shown(self._storage),
      storages.reach(self._storage),
    )
    try:
      made = optuna.create_study(
        study_name=name,
        storage=reached,
        directions=['minimize'] * len(self.objectives),
        sampler=sampler,
        load_if_exists=True,
      )
      found = made.user_attrs
      if 'space' not in found:
        made.set_user_attr('rows', _options(self.table))
        if self.about is not None:
          made.set_user_attr('about', self.about)
        made.set_user_attr('space', self._fingerprint())
        return made
    except ValueError as error:
      raise ValueError(
        f'the study {name!r} in {shown!r} cannot be opened: {error}'
      ) from error
    except Exception as error:  # of the driver of any database
      raise storages.unreachable(self._storage, error) from error
    _check_about(found, self.about, f'the study {name!r} in {shown!r}')
    if found['space'] != self._fingerprint():
      raise ValueError(
        f'the study {name!r} in {shown!r} is of another space: its rows, '
        'options, costs, model or objectives are not these. Give another name, '
        'or the table that it was begun with'
      )
    return made

  def run(
    self,
    measure: Callable[[Choice], float | Sequence[float]],
    trials: int,
    starts: Sequence[Choice] = (),
  ) -> None:
    """Measures choices until the study has this many finished trials.

    What was begun by workers that are gone is taken up first. A measurement
    that is NaN or infinite is recorded as failed, and is never best; so is one
    that raises `optuna.TrialPruned`, while any other exception ends the run.

    Args:
      measure: the objectives of a choice, all to be small.
      trials: finished trials in all, of all workers; failed ones count.
      starts: choices to begin with, such as allocations; each once.

    Raises:
      ValueError: a start is no choice; a measurement has not as many numbers
        as there are objectives; `trials` is no number of trials; the storage
        fails, after which the study goes on when run again.
      TypeError: `measure` cannot be called.
    """
    if not callable(measure):
      raise TypeError(
        f'measure must be a function choice -> numbers, got {measure!r}'
      )
    check_count('trials', trials, 1)
    for choice in starts:
      self.table.check_choice(choice)
    try:
      with storages.guarded(self._storage):
        for choice in starts:
          params = dict(zip(self.sizes, map(int, choice), strict=True))
          self.study.enqueue_trial(params, skip_if_exists=True)
        while self.counts()['finished'] < trials:
          self.reclaim()
          self.study.optimize(
            functools.partial(self._trial, measure), n_trials=1
          )
    except ValueError:
      # What a failing storage left running is of a life that is over.
      self._life = uuid.uuid4().hex
      raise

  def _trial(self, measure: Callable[[Choice], Any], trial: Any) -> Any:
    """Measures what a trial asks for."""
    try:
      trial.set_user_attr('worker', self.worker)
      trial.set_user_attr('life', self._life)
      choice = tuple(
        trial.suggest_int(n, 0, k - 1) for n, k in self.sizes.items()
      )
      return self._measured(measure, trial, choice)
    except StorageInternalError as error:
      raise storages.Broken from error

  def _measured(self, measure, trial, choice) -> float | list[float]:
    try:
      values = self._numbers(measure(choice))
    except Exception as error:
      trial.set_user_attr('values', [repr(error)])
      raise
    except BaseException:  # stopped from the keyboard: measured again
      trial.set_user_attr('killed', True)
      raise
    if not np.isfinite(values).all():
      trial.set_user_attr('values', [str(v) for v in values])
      values = [float('nan')] * len(values)
    return values if len(values) > 1 else values[0]

  def _numbers(self, found: Any) -> list[float]:
    """A measurement: as many numbers as there are objectives."""
    raw = np.ravel(np.asarray(found))
    other = raw.dtype.kind in 'OSUMmc'  # bfloat16 has a kind of its own
    values = [] if other else raw.astype(float).tolist()
    if len(values) != len(self.objectives):
      raise ValueError(
        f'measure must return a number for each of {list(self.objectives)}, '
        f'got {found!r}'
      )
    return values

  def reclaim(self) -> int:
    """Gives up what dead workers were measuring, and queues it again.

    Of a database, whose workers may be anywhere, Optuna's heartbeat does it.

    Returns:
      How many trials were queued again.
    """
    if self._locks is None:
      return 0
    with open(self._locks / _GUARD, 'w') as guard:
      fcntl.flock(guard, fcntl.LOCK_EX)
      storage, queued = self.study._storage, 0
      trials = self.study.get_trials(deepcopy=False)
      retried = {t.user_attrs.get('retry_of') for t in trials}
      for t in trials:
        if t.state == TrialState.RUNNING and self._dead(t):
          storage.set_trial_user_attr(t._trial_id, 'killed', True)
          self.study.tell(t.number, state=TrialState.FAIL)
        elif not t.user_attrs.get('killed'):
          continue
        if t.number not in retried:
          params = t.params or t.system_attrs.get('fixed_params', {})
          self.study.enqueue_trial(params, {'retry_of': t.number})
          queued += 1
    return queued

  def _dead(self, trial: Any) -> bool:
    assert self._locks is not None
    worker = trial.user_attrs.get('worker')
    if worker is None:
      begun = trial.datetime_start
      return begun is not None and time.time() - begun.timestamp() > _UNSIGNED
    if worker == self.worker:  # begun by this process, or by one before it
      return trial.user_attrs.get('life') != self._life
    path = self._locks / worker
    if not path.exists():
      return True
    with open(path) as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return False
    return True

  def counts(self) -> dict[str, int]:
    """Every trial in exactly one of: complete, failed, killed, running,
    waiting; and 'finished', those that were measured (complete or failed).
    """
    found = dict.fromkeys(
      ('complete', 'failed', 'killed', 'running', 'waiting'), 0
    )
    for t in self._trials():
      if t.state == TrialState.COMPLETE:
        found['complete'] += 1
      elif t.state == TrialState.RUNNING:
        found['running'] += 1
      elif t.state == TrialState.WAITING:
        found['waiting'] += 1
      elif t.user_attrs.get('killed') or 'values' not in t.user_attrs:
        found['killed'] += 1
      else:
        found['failed'] += 1
    return {**found, 'finished': found['complete'] + found['failed']}

  def history(self) -> list[tuple[Choice, tuple[float, ...] | None]]:
    """Finished trials in order; None where one failed."""
    return [
      (
        self._choice(t),
        tuple(t.values) if t.state == TrialState.COMPLETE else None,
      )
      for t in self._finished()
    ]

  def seconds(self) -> list[float]:
    """How long each finished trial took, in the order of `history`."""
    return [
      t.duration.total_seconds() if t.duration else 0.0
      for t in self._finished()
    ]

  def best(self) -> list[tuple[Choice, tuple[float, ...]]]:
    """Choices that none beats in all objectives, sorted by the first."""
    with storages.guarded(self._storage):
      best = self.study.best_trials
    found = {self._choice(t): tuple(t.values) for t in best}
    return sorted(found.items(), key=lambda pair: pair[1])

  def _trials(self) -> list[Any]:
    with storages.guarded(self._storage):
      return self.study.get_trials(deepcopy=False)

  def _finished(self) -> list[Any]:
    """Those that were measured, in order; a killed one was not."""
    return [
      t
      for t in self._trials()
      if t.state == TrialState.COMPLETE
      or (t.state.is_finished() and 'values' in t.user_attrs)
    ]

  def _choice(self, trial: Any) -> Choice:
    return tuple(trial.params[n] for n in self.sizes)

  def _fingerprint(self) -> str:
    table = self.table.to_json()
    identity = {
      'rows': table['rows'],
      'costs': table['costs'],
      'model': self.table.model,
      'objectives': list(self.objectives),
    }
    if self.about is not None:
      identity['about'] = self.about
    return runtime.fingerprint(identity)

  def _sampler(self, word, first, known, past, seed):
    # No two workers draw the same.
    own = seed + zlib.crc32(self.worker.encode()) % 2**28
    if word == 'predicted':
      exact = {self.objectives.index(n): f for n, f in known.items()}
      sources = {} if past is None else self._learned(past, exact)
      inner: Any = samplers.Predicted(
        self.sizes, exact=exact, sources=sources, seed=own
      )
    elif word == 'nsga2':
      inner = optuna.samplers.NSGAIISampler(population_size=16, seed=own)
    else:
      inner = optuna.samplers.RandomSampler(own)
    return samplers.Designed(self.sizes, first, inner, seed)

  def _learned(self, past, exact) -> dict[int, predict.Predictor]:
    """Predictors of what is measured, trained on another study's trials."""
    choices = np.array([c for c, _ in past])
    values = np.array([v for _, v in past])
    x = predict.one_hot(choices, list(self.sizes.values()))
    with samplers.one_thread():
      return {
        j: predict.boosted().fit(x, values[:, j])
        for j in range(len(self.objectives))
        if j not in exact
      }

  def _sign(self) -> Any:
    """A file that stays locked as long as this study lives."""
    if self._locks is None:
      return None
    try:
      lock = open(self._locks / self.worker, 'w')  # noqa: SIM115 (held open)
    except OSError as error:
      raise storages.unreachable(self._storage, error) from error
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      lock.close()
      raise ValueError(
        f'a worker {self.worker!r} of this study is running: give another '
        'name, or let go of that study first'
      ) from None
    weakref.finalize(self, lock.close)
    return lock


def trials_of(
  storage: str | os.PathLike,
  table: Table,
  objectives: int,
  name: str = 'search',
) -> list[tuple[Choice, tuple[float, ...]]]:
  """Completed trials of a study over the same rows and options.

  Args:
    storage: of that study; nothing is written to it.
    table: whose rows and options they are; costs and model may be others.
    objectives: how many.
    name: of that study.

  Raises:
    ValueError: there is no such study, it cannot be read, is of other rows,
      options or objectives, or has fewer than two completed trials.
    TypeError: the storage is no path and no URL.
  """
  storages.check(storage, 'source')
  source = f'source={storages.shown(storage)!r}'
  if not storages.exists(storage):
    raise ValueError(
      f'{source} is not there: expected the storage of a finished study over '
      'the same rows and options'
    )
  try:
    with storages.guarded(storage):
      found = optuna.load_study(study_name=name, storage=storages.read(storage))
      complete = found.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
  except KeyError as error:
    raise ValueError(f'{source} holds no study {name!r}') from error
  theirs, mine = found.user_attrs.get('rows'), _options(table)
  if theirs != mine:
    other = {k: (theirs or {}).get(k) for k in mine} | dict(theirs or {})
    k = next(k for k in other if other[k] != mine.get(k))
    raise ValueError(
      f'{source} is a study of other rows or options: there {k!r} has '
      f'{other[k]}, here {mine.get(k)}. Predictors transfer where rows and '
      'options are the same'
    )
  if len(found.directions) != objectives:
    raise ValueError(
      f'{source} is a study of {len(found.directions)} objectives, expected '
      f'{objectives}'
    )
  if len(complete) < 2:
    raise ValueError(
      f'{source} has {len(complete)} completed trials, and predictors are '
      'trained on two at least: finish that study first'
    )
  return [(tuple(t.params[n] for n in mine), tuple(t.values)) for t in complete]


def check_about(
  storage: str | os.PathLike, about: Mapping[str, Any], name: str = 'search'
) -> None:
  """Refuses a study about something else, before any work for its table.

  Args:
    storage: of the study; opened as a worker does.
    about: what is to be measured, as `Study` has it.
    name: of the study, which may not be there yet.

  Raises:
    ValueError: says what differs; the storage cannot be reached.
  """
  reached = storages.reach(storage)
  with storages.guarded(storage), contextlib.suppress(KeyError):
    found = optuna.load_study(study_name=name, storage=reached).user_attrs
    where = f'the study {name!r} in {storages.shown(storage)!r}'
    if 'space' in found:
      _check_about(found, _jsonable(about), where)


def _check_about(found: Mapping[str, Any], about: Any, where: str) -> None:
  """Refuses the attributes of a study that was begun about something else."""
  theirs = found.get('about')
  if theirs == about:
    return
  lines = manifest.differences(theirs or {}, about or {})
  told = '; '.join(lines[:5] + ['...'] * (len(lines) > 5))
  raise ValueError(
    f'{where} is about something else: {told}. Its measurements would be mixed '
    'with these: give another name or storage, or what it was begun with'
  )


def _jsonable(about: Any) -> dict[str, Any] | None:
  if about is not None and not isinstance(about, Mapping):
    raise TypeError(
      f'about={about!r}: expected a mapping of names to JSON-able values, such '
      "as {'seed': 0}"
    )
  return files.to_jsonable(about) if about else None


def _checked(
  known: Any, objectives: Sequence[str], choice: Choice
) -> dict[str, Callable[[Choice], float]]:
  """What is known of choices, tried on one; each value is to be finite."""
  if known is not None and not isinstance(known, Mapping):
    raise TypeError(
      'known= has a function of a choice for each name, such as '
      f"{{'bytes': table.cost}}, got {known!r}"
    )
  found: dict[str, Callable[[Choice], float]] = {}
  for name, f in (known or {}).items():
    check_name('objective in known=', name, objectives)
    if not callable(f):
      raise TypeError(
        f'known= has a function of a choice for each name, got {f!r} for '
        f'{name!r}'
      )
    found[name] = functools.partial(_finite, name, f)
    found[name](choice)
  return found


def _finite(name: str, f: Callable[[Choice], float], choice: Choice) -> float:
  what = f'known[{name!r}] of the choice {choice}'
  value = check_number(what, f(choice))
  if not np.isfinite(value):
    raise ValueError(f'{what} is a finite number, got {value!r}')
  return value


def _options(table: Table) -> dict[str, list[str]]:
  return {r.name: list(r.options) for r in table.rows}


def _check_names(name: Any, objectives: Sequence[Any], worker: Any) -> None:
  """Refuses names that a study or a file cannot have."""
  if not objectives:
    raise ValueError('a study needs at least one objective to minimize')
  for each in (name, *objectives):
    if not isinstance(each, str) or not each:
      raise TypeError(
        f'a study and its objectives have names such as "loss", got {each!r}'
      )
  if len(set(objectives)) < len(objectives):
    raise ValueError(f'objectives={tuple(objectives)}: expected each once')
  if worker is None:
    return
  fits = isinstance(worker, str) and re.fullmatch(r'\w[\w.+-]{,99}', worker)
  if not fits or worker == _GUARD:
    raise ValueError(
      f'worker={worker!r} names a file: expected letters, digits and "_.+-", '
      f'and not {_GUARD!r}; such as "worker_0"'
    )
