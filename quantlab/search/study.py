"""Black-box refinement: measured choices, by any number of workers (Optuna).

Workers are copies of one program that open one study: a journal file on a
file system that all see, or any database that Optuna knows. Nothing a worker
does is lost with it: what it was measuring when it was killed is measured
again.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from quantlab import runtime
from quantlab.search import predict, samplers, storages
from quantlab.search.table import Table, check_count, check_name, check_table

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
    first: trials of a Sobol design before the sampler's own.
    known: objectives that need no measurement to predict: `choice -> value`.
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
    ValueError: the storage cannot be reached, or holds a study of another
      space under this name; the source is not there, of other rows or
      options, or without finished trials; a worker of this name is running;
      names or numbers that cannot be used.
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
    for each, f in (known or {}).items():
      check_name('objective in known=', each, objectives)
      if not callable(f):
        raise TypeError(
          f'known= has a function of a choice for each name, got {f!r} for '
          f'{each!r}'
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    self.table, self.objectives = table, tuple(objectives)
    self.sizes = {r.name: len(r.options) for r in table.rows}
    self.worker = uuid.uuid4().hex if worker is None else worker
    # A worker that was killed may come back under its name.
    self._life = uuid.uuid4().hex
    past = None
    if source is not None:
      if sampler != 'predicted':
        raise ValueError(
          f'source={os.fspath(source)!r} trains predictors, and '
          f"sampler={sampler!r} has none: 'predicted' has"
        )
      past = trials_of(source, table, len(self.objectives), name)
    self._locks = storages.locks(storage)
    made = self._sampler(sampler, first, dict(known or {}), past, seed)
    shown, reached = os.fspath(storage), storages.reach(storage)
    try:
      self.study = optuna.create_study(
        study_name=name,
        storage=reached,
        directions=['minimize'] * len(self.objectives),
        sampler=made,
        load_if_exists=True,
      )
      found = self.study.user_attrs.get('space')
      if found is None:
        self.study.set_user_attr('rows', _options(table))
        self.study.set_user_attr('space', self._fingerprint())
    except ValueError as error:
      raise ValueError(
        f'the study {name!r} in {shown!r} cannot be opened: {error}'
      ) from error
    except Exception as error:  # of the driver of any database
      raise storages.unreachable(storage, error) from error
    if found not in (None, self._fingerprint()):
      raise ValueError(
        f'the study {name!r} in {shown!r} is of another space: its rows, '
        'options, costs, model or objectives are not these. Give another name, '
        'or the table that it was begun with'
      )
    self._lock = self._sign()

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
        as there are objectives; `trials` is no number of trials.
      TypeError: `measure` cannot be called.
    """
    if not callable(measure):
      raise TypeError(
        f'measure must be a function choice -> numbers, got {measure!r}'
      )
    check_count('trials', trials, 1)
    for choice in starts:
      self.table.check_choice(choice)
    for choice in starts:
      params = dict(zip(self.sizes, map(int, choice), strict=True))
      self.study.enqueue_trial(params, skip_if_exists=True)

    def objective(trial):
      trial.set_user_attr('worker', self.worker)
      trial.set_user_attr('life', self._life)
      choice = tuple(
        trial.suggest_int(n, 0, k - 1) for n, k in self.sizes.items()
      )
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

    while self.counts()['finished'] < trials:
      self.reclaim()
      self.study.optimize(objective, n_trials=1)

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
    for t in self.study.get_trials(deepcopy=False):
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
      (self._choice(t), tuple(t.values) if done else None)
      for t in self.study.get_trials(deepcopy=False)
      if (done := t.state == TrialState.COMPLETE)
      or (t.state.is_finished() and 'values' in t.user_attrs)
    ]

  def seconds(self) -> list[float]:
    """How long each finished trial took, in the order of `history`."""
    return [
      t.duration.total_seconds() if t.duration else 0.0
      for t in self.study.get_trials(deepcopy=False)
      if t.state == TrialState.COMPLETE
      or (t.state.is_finished() and 'values' in t.user_attrs)
    ]

  def best(self) -> list[tuple[Choice, tuple[float, ...]]]:
    """Choices that none beats in all objectives, sorted by the first."""
    found = {self._choice(t): tuple(t.values) for t in self.study.best_trials}
    return sorted(found.items(), key=lambda pair: pair[1])

  def _choice(self, trial: Any) -> Choice:
    return tuple(trial.params[n] for n in self.sizes)

  def _fingerprint(self) -> str:
    table = self.table.to_json()
    return runtime.fingerprint(
      {
        'rows': table['rows'],
        'costs': table['costs'],
        'model': self.table.model,
        'objectives': list(self.objectives),
      }
    )

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
    """A file that stays locked as long as this process lives."""
    if self._locks is None:
      return None
    lock = open(self._locks / self.worker, 'w')  # noqa: SIM115 (held open)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      lock.close()
      raise ValueError(
        f'a worker {self.worker!r} of this study is running: give another '
        'name, or let go of that study first'
      ) from None
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
    ValueError: there is no such study, it is of other rows, options or
      objectives, or has fewer than two completed trials.
    TypeError: the storage is no path and no URL.
  """
  storages.check(storage)
  source = f'source={os.fspath(storage)!r}'
  if not storages.exists(storage):
    raise ValueError(
      f'{source} is not there: expected the storage of a finished study over '
      'the same rows and options'
    )
  try:
    found = optuna.load_study(study_name=name, storage=storages.reach(storage))
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
  complete = found.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
  if len(complete) < 2:
    raise ValueError(
      f'{source} has {len(complete)} completed trials, and predictors are '
      'trained on two at least: finish that study first'
    )
  return [(tuple(t.params[n] for n in mine), tuple(t.values)) for t in complete]


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
