"""One variant trained: from a config's values to frozen models, seed by seed.

A variant is `{'name': ..., 'rules': ((pattern, rule), ...), ...}`:

  rules       as in `experiments.variants`; without them it is trained in float
  estimator   a name, `{'name': 'ewgs', 'delta': 0.1}`, or either by role;
              'lsq' unless it says otherwise
  lora        `{'pattern': ..., 'rank': 8, ...}`, what `ql.lora` takes: the
              base is rounded to nearest and stays, adapters are trained
  start       'float' (the float net of the same seed), or 'scratch'
  steps, batch_size, optimizer (see `experiments.optimizers`)
  model       sizes in the place of `config.model`'s
  warm_up     share of the steps in which quantization sets in (lambda)
  distill     `{'weight': 0.5, 'temperature': 4.0}`, from the float net
  batch_norm  share of the steps in which BatchNorms are live; 0: frozen
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import quantlab as ql
from experiments import optimizers, tasks, variants
from quantlab.runtime import training

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to train; fields as the module says, checked."""

  name: str
  rules: tuple = ()
  estimator: Any = None
  lora: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  start: str = 'float'
  steps: int = 0
  batch_size: int = 0
  optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  warm_up: float = 0.0
  distill: Mapping[str, float] = dataclasses.field(default_factory=dict)
  batch_norm: float = 0.0


FIELDS = tuple(f.name for f in dataclasses.fields(Variant))
ESTIMATORS = ('ste', 'clipped_ste', 'lsq', 'pact', 'dorefa', 'ewgs')
ROLES = ('weight', 'input', 'output', 'lhs', 'rhs')


def resolve(
  specs: Iterable[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> list[Variant]:
  """The variants of a config, all of them checked.

  Args:
    specs: variants, the float baseline first.
    defaults: what those take that do not say.

  Raises:
    ConfigError: names that are unknown, missing, or given twice.
  """
  found: list[Variant] = []
  for spec in specs:
    name = spec.get('name') if isinstance(spec, Mapping) else None
    if not isinstance(name, str) or not re.fullmatch(r'[\w.+-]+', name):
      raise variants.ConfigError(
        f'a variant is a dict whose name is letters, digits and "_.+-", found '
        f'{spec!r}'
      )
    if name in {v.name for v in found}:
      raise variants.ConfigError(f'the variant name {name!r} is taken.')
    for field in spec:
      variants.check_name('field', field, FIELDS)
    if 'steps' not in spec:
      raise variants.ConfigError(
        f'variant {name!r} has no steps; 0 judges what training begins with.'
      )
    variant = Variant(**{**defaults, **spec})
    try:
      _check(variant)
    except (TypeError, ValueError) as error:
      raise variants.ConfigError(f'variant {name!r}: {error}') from error
    found.append(variant)
  return found


def _check(variant: Variant) -> None:
  variants.check_name('start', variant.start, ('float', 'scratch'))
  for name in ('warm_up', 'batch_norm'):
    share = getattr(variant, name)
    if not 0 <= share <= 1:
      raise variants.ConfigError(
        f'{name}={share} is a share of the steps: expected 0 to 1.'
      )
  optimizers.make(variant.optimizer, max(variant.steps, 1), 'state')
  if variant.rules:
    recipe(variant)
    estimator(variant)
  if variant.lora:
    _check_lora(variant)
  if variant.steps < 0 or variant.batch_size < 1:
    raise variants.ConfigError(
      f'steps={variant.steps}, batch_size={variant.batch_size}: expected none '
      'or more steps of at least one example.'
    )
  if variant.distill and set(variant.distill) != {'weight', 'temperature'}:
    raise variants.ConfigError(
      f"distill={dict(variant.distill)}: expected 'weight' and 'temperature'."
    )
  if variant.model and variant.start == 'float':
    raise variants.ConfigError(
      "another model cannot start from the float net: say start='scratch'."
    )


def _check_lora(variant: Variant) -> None:
  if not variant.rules:
    raise variants.ConfigError('adapters need rules: the base that they adapt.')
  if variant.estimator or variant.warm_up:
    raise variants.ConfigError(
      'adapters leave their base as it is: no estimator, no warm_up.'
    )
  # Of its arguments; whether the pattern meets anything, the plan tells.
  known = tuple(inspect.signature(ql.lora).parameters)[2:]
  for name in variant.lora:
    variants.check_name('argument of lora', name, known)
  if 'pattern' not in variant.lora:
    raise variants.ConfigError("lora needs a 'pattern', such as '/kernel$'.")


def recipe(variant: Variant) -> Any:
  """The recipe of a variant that is not float."""
  return variants.recipe({'rules': variant.rules})


def estimator(variant: Variant) -> Any:
  """The estimator of every role."""
  spec = variant.estimator or 'lsq'
  if isinstance(spec, Mapping) and 'name' not in spec:
    for role in spec:
      variants.check_name('role', role, ROLES)
    return {k: _estimator(v, variant.warm_up) for k, v in spec.items()}
  return _estimator(spec, variant.warm_up)


def _estimator(spec: str | Mapping[str, Any], warm_up: float) -> Any:
  args = {'name': spec} if isinstance(spec, str) else dict(spec)
  name = variants.check_name('estimator', args.pop('name'), ESTIMATORS)
  if isinstance(args.get('inner'), str | Mapping):
    args['inner'] = _estimator(args['inner'], 0.0)
  made = variants.call(getattr(ql.estimators, name), args, name)
  return ql.estimators.warm_up(made) if warm_up else made


@dataclasses.dataclass(frozen=True, eq=False)
class Trainee:
  """A task under a variant, ready to train.

  Attributes:
    task: what is trained.
    variant: how.
    apply: `(variables, *inputs) -> outputs`, simulated.
    train_apply: the same in training mode, or None; see `tasks.Task`.
    init: `(key, params, batches) -> variables`.
    example: inputs it was planned with.
    plan: None in float.
    freeze: `(variables, *inputs) -> Quantized`; None in float.
  """

  task: tasks.Task
  variant: Variant
  apply: Callable[..., Any]
  train_apply: Callable[..., Any] | None
  init: Callable[..., Variables]
  example: tuple[Any, ...]
  plan: ql.Plan | None
  freeze: Callable[..., Any] | None

  def settled(self, variables: Variables) -> Variables:
    """With quantization fully set in."""
    if not (self.plan and self.variant.warm_up):
      return variables
    return ql.set_leaves(variables, 'strength', 1.0)


def trainee(task: tasks.Task, variant: Variant, example: Any) -> Trainee:
  """Plans a variant.

  Args:
    task: with the variant's model.
    variant: how to train it.
    example: a batch of inputs.
  """
  live = task.train_apply if variant.batch_norm else None
  if variant.batch_norm and live is None:
    raise variants.ConfigError(
      f'variant {variant.name!r}: the task has no BatchNorms to keep live.'
    )
  if not variant.rules:
    return Trainee(
      task,
      variant,
      lambda v, *inputs: task.apply(v['weights'], *inputs),
      live and (lambda v, *inputs: live(v['weights'], *inputs)),
      lambda key, params, batches: {'weights': params, 'sites': {}},
      tuple(example),
      None,
      None,
    )
  params = jax.eval_shape(task.init, jax.random.key(0))
  plan = ql.plan(task.apply, params, recipe(variant), *example)
  if variant.lora:
    return _adapted(task, variant, tuple(example), plan)
  train = ql.qat(task.apply, plan, estimator(variant))
  return Trainee(
    task,
    variant,
    train.apply,
    live and ql.qat(live, plan, estimator(variant)).apply,
    lambda key, params, batches: train.init(params, batches),
    tuple(example),
    plan,
    train.freeze,
  )


def _adapted(
  task: tasks.Task, variant: Variant, example: tuple[Any, ...], plan: ql.Plan
) -> Trainee:
  """Adapters on the base that the plan quantizes."""
  if variant.batch_norm:
    raise variants.ConfigError(
      f'variant {variant.name!r}: adapters leave BatchNorms as they are.'
    )
  train = ql.lora(task.apply, plan, **variant.lora)

  def init(key, params, batches):
    return train.init(key, ql.ptq(task.apply, params, plan, batches).params)

  return Trainee(
    task, variant, train.apply, None, init, example, plan, train.freeze
  )


def labels(made: Trainee, variables: Variables) -> Any:
  """'weight', 'step', 'adapter' or 'state' of every leaf of the variables.

  Running statistics are state, and so is everything but adapters beside them.
  """
  if made.plan is None:
    found = {
      'weights': jax.tree.map(lambda _: 'weight', variables['weights']),
      'sites': {},
    }
  else:
    found = made.plan.labels(variables)
  weights = jax.tree.map(
    lambda running, label: 'state' if running else label,
    made.task.is_running(variables['weights']),
    found['weights'],
  )
  found = {**found, 'weights': weights}
  if made.variant.lora:
    return jax.tree.map(lambda x: x if x == 'adapter' else 'state', found)
  return found


def losses(made: Trainee) -> Callable[..., tuple[jax.Array, Any]]:
  """`(variables, step, *batch, teacher) -> (loss, settle)` for `updater`."""
  variant, task = made.variant, made.task
  rise = max(1.0, variant.warm_up * variant.steps)
  live = variant.batch_norm * variant.steps

  def outputs(variables, step, inputs):
    train_apply = made.train_apply
    if train_apply is None:
      return made.apply(variables, *inputs), None
    found, after = train_apply(variables, *inputs, step < live)
    mask = task.is_running(variables['weights'])
    still = jax.tree.map(lambda _: False, variables['sites'])
    after = {**variables, 'weights': jax.lax.stop_gradient(after)}
    return found, ({'weights': mask, 'sites': still}, after)

  def loss(variables, step, *batch):
    *arrays, teacher = batch
    inputs, targets = arrays[: task.inputs], arrays[task.inputs :]
    if variant.warm_up:
      strength = jnp.minimum(1.0, (step + 1) / rise)
      variables = ql.set_leaves(variables, 'strength', strength)
    found, settle = outputs(variables, step, inputs)
    value = task.loss(found, *targets)
    if variant.distill:
      share, t = variant.distill['weight'], variant.distill['temperature']
      told = ql.distill.kd(found, task.apply(teacher, *inputs), temperature=t)
      value = (1 - share) * value + share * told
    return value, settle

  return loss


def starts(
  made: Trainee, seeds: Sequence[int], floats: Sequence[Any] | None
) -> list[Variables]:
  """Variables to begin with, of each seed.

  Args:
    made: what is trained.
    seeds: of the initial parameters and of the calibration batches.
    floats: parameters of the float net of each seed, for those that start
      from it.
  """
  found, init = [], jax.jit(made.task.init)
  for i, seed in enumerate(seeds):
    params = (
      floats[i]
      if floats is not None and made.variant.start == 'float'
      else init(jax.random.key(seed))
    )
    draws = made.task.draws(made.variant.batch_size, steps=4, seed=seed)
    batches = [b[: made.task.inputs] for b in draws]
    found.append(made.init(jax.random.key(seed), params, batches))
  return found


def checking(made: Trainee, runs: int, limit: int) -> Callable[..., Any]:
  """`(state) -> {name: mean over the runs}` on part of the evaluation set."""
  task = made.task
  batches = [
    task.evaluation[i] for i in range(min(limit, len(task.evaluation)))
  ]
  classes = task.metric.name != 'sentence_pairs'

  def one(variables, batch):
    inputs, targets = batch[: task.inputs], batch[task.inputs :]
    found = made.apply(made.settled(variables), *inputs)
    values = {'validation_loss': task.loss(found, *targets)}
    if classes:
      values['validation_accuracy'] = tasks.accuracy(found, *targets)
    return values

  each = jax.jit(jax.vmap(one, (0, None)) if runs > 1 else one)

  def check(state):
    found = [each(state['variables'], b) for b in batches]
    weights = [len(b[0]) for b in batches]
    return {
      k: float(np.average([np.mean(f[k]) for f in found], weights=weights))
      for k in found[0]
    }

  return check


def lanes(tree: Any, runs: int) -> list[Any]:
  """The trees of each run, on this host."""
  if runs == 1:
    return [jax.tree.map(np.asarray, tree)]
  host = jax.tree.map(np.asarray, tree)
  return [jax.tree.map(lambda x, i=i: x[i], host) for i in range(runs)]


def stack(trees: Sequence[Any]) -> Any:
  """The reverse of `lanes`."""
  if len(trees) == 1:
    return trees[0]
  return jax.tree.map(lambda *xs: np.stack(xs), *trees)


def begin(
  made: Trainee, variables: Sequence[Variables]
) -> tuple[training.State, Callable[..., Any]]:
  """The state to train from, and the update."""
  named = labels(made, variables[0])
  optimizer = _optimizer(made, named)
  start = jax.jit(lambda v: training.begin(v, optimizer))
  trained = jax.tree.map(lambda label: label != 'state', named)
  update = training.updater(losses(made), optimizer, trained)
  return stack([start(v) for v in variables]), update


def _optimizer(made: Trainee, named: Any) -> Any:
  spec = made.variant.optimizer
  return optimizers.make(spec, max(made.variant.steps, 1), named)


def optimizer_nbytes(made: Trainee, variables: Variables) -> int:
  """Bytes of the optimizer's state, of one run."""
  optimizer = _optimizer(made, labels(made, variables))
  return ql.nbytes(jax.eval_shape(optimizer.init, variables))
