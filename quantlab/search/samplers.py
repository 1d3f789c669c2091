"""Which choice is tried next: designs, and searches on predictors (Optuna)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import threadpoolctl
from scipy.stats import qmc

from quantlab.search import predict

Choice = tuple[int, ...]
MOST_FIRST = 2**16  # trials of a design, whose points are held in memory
_POPULATION = 20  # of the search on predictors


def one_thread() -> contextlib.AbstractContextManager[Any]:
  """For trees on a few hundred rows.

  Threads would only wait for each other, by spinning, which costs a busy
  machine ten times the work.
  """
  return threadpoolctl.threadpool_limits(1, 'openmp')


class Designed(optuna.samplers.BaseSampler):
  """The first trials are a low-discrepancy design, the others another's.

  Trial n takes point n of one scrambled Sobol sequence, so that any number of
  workers fill one design together.

  Args:
    sizes: options of every row, by name.
    first: trials of the design, up to `MOST_FIRST`.
    inner: makes the trials after it.
    seed: of the scrambling.

  Raises:
    ValueError: the design is too long.
  """

  def __init__(
    self,
    sizes: Mapping[str, int],
    first: int,
    inner: optuna.samplers.BaseSampler,
    seed: int = 0,
  ):
    if first > MOST_FIRST:
      raise ValueError(
        f'first={first!r}: expected at most {MOST_FIRST} trials of a design'
      )
    self.sizes, self.first, self.inner = dict(sizes), first, inner
    sobol = qmc.Sobol(len(self.sizes), rng=np.random.default_rng(seed))
    points = sobol.random_base2(max(first - 1, 1).bit_length())
    self.design = np.floor(points * list(self.sizes.values())).astype(int)

  def infer_relative_search_space(self, study, trial):
    """All rows: they are drawn together."""
    del study, trial
    return {
      k: optuna.distributions.IntDistribution(0, n - 1)
      for k, n in self.sizes.items()
    }

  def sample_relative(self, study, trial, search_space):
    """A point of the design, or the inner sampler's."""
    found = self.inner.sample_relative(study, trial, search_space)
    if trial.number >= self.first:
      return found
    point = self.design[trial.number]
    return dict(zip(self.sizes, map(int, point), strict=True))

  def sample_independent(self, study, trial, param_name, param_distribution):
    """The inner sampler's."""
    return self.inner.sample_independent(
      study, trial, param_name, param_distribution
    )

  def before_trial(self, study, trial):
    """The inner sampler's."""
    self.inner.before_trial(study, trial)

  def after_trial(self, study, trial, state, values):
    """The inner sampler's."""
    self.inner.after_trial(study, trial, state, values)

  def reseed_rng(self):
    """The inner sampler's."""
    self.inner.reseed_rng()


class Predicted(optuna.samplers.BaseSampler):
  """Searches on predictors; what they like best is measured next.

  NSGA-II runs on the predicted objectives (one of them: a genetic algorithm),
  and a choice of its front that was not tried yet is the next trial. This is
  the loop of SimQ-NAS and of Quantune, with their predictors.

  Args:
    sizes: options of every row, by name.
    make: makes the predictor of one objective.
    exact: objectives that need no predictor, by position: `choice -> value`.
    sources: fitted predictors of the same objectives elsewhere, by position:
      what is measured here corrects them (`predict.Transferred`).
    evaluations: of the predictors for each trial.
    seed: of everything random.
  """

  def __init__(
    self,
    sizes: Mapping[str, int],
    make: Callable[[], predict.Predictor] = predict.boosted,
    exact: Mapping[int, Callable[[Choice], float]] | None = None,
    sources: Mapping[int, predict.Predictor] | None = None,
    evaluations: int = 200,
    seed: int = 0,
  ):
    self.sizes = dict(sizes)
    self.make, self.exact = make, dict(exact or {})
    self.sources = dict(sources or {})
    self.evaluations = evaluations
    self.rng = np.random.default_rng(seed)

  def infer_relative_search_space(self, study, trial):
    """All rows."""
    return Designed.infer_relative_search_space(self, study, trial)  # type: ignore[arg-type]

  def sample_independent(self, study, trial, param_name, param_distribution):
    """At random."""
    del study, trial, param_name
    low, high = param_distribution.low, param_distribution.high
    return int(self.rng.integers(low, high + 1))

  def sample_relative(self, study, trial, search_space):
    """The next choice; a random one until there are measurements."""
    del trial, search_space
    seen = study.get_trials(
      deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)
    )
    if len(seen) < 2:
      return {}
    tried = {
      tuple(t.params.values())
      for t in study.get_trials(deepcopy=False)
      if len(t.params) == len(self.sizes)
    }
    with one_thread():
      front = self._front(study, seen)
    fresh = [c for c in front if c not in tried] or [self._random()]
    pick = fresh[self.rng.integers(len(fresh))]
    return dict(zip(self.sizes, pick, strict=True))

  def _random(self) -> Choice:
    return tuple(int(self.rng.integers(n)) for n in self.sizes.values())

  def fit(self, seen: Sequence[Any]) -> list[predict.Predictor | None]:
    """Predictors of the objectives; None of those that need none.

    Args:
      seen: completed trials.
    """
    choices = np.array([[t.params[n] for n in self.sizes] for t in seen])
    x = predict.one_hot(choices, list(self.sizes.values()))
    values = np.array([t.values for t in seen], float)
    return [
      None if j in self.exact else self._predictor(j).fit(x, values[:, j])
      for j in range(values.shape[1])
    ]

  def _predictor(self, objective: int) -> predict.Predictor:
    source = self.sources.get(objective)
    return self.make() if source is None else predict.Transferred(source)

  def _front(self, study, seen) -> list[Choice]:
    """Choices that the predictors like best."""
    names, sizes = list(self.sizes), list(self.sizes.values())
    fitted = self.fit(seen)
    inner = optuna.create_study(
      directions=study.directions,
      sampler=optuna.samplers.NSGAIISampler(
        population_size=_POPULATION, seed=int(self.rng.integers(2**31))
      ),
    )
    for t in study.best_trials[:10]:  # begin at what is known to be good
      inner.enqueue_trial(t.params)
    space = self.infer_relative_search_space(study, None)
    for _ in range(max(1, self.evaluations // _POPULATION)):
      asked = [inner.ask(space) for _ in range(_POPULATION)]
      picks = np.array([[t.params[n] for n in names] for t in asked])
      x = predict.one_hot(picks, sizes)
      columns = [
        [self.exact[j](tuple(map(int, p))) for p in picks]
        if f is None
        else f.predict(x)
        for j, f in enumerate(fitted)
      ]
      for t, *found in zip(asked, *columns, strict=True):
        inner.tell(t, [float(v) for v in found])
    best: Sequence[Any] = inner.best_trials
    return list(dict.fromkeys(tuple(t.params[n] for n in names) for t in best))
