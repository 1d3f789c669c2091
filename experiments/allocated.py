"""Allocations, quantized by encoders and judged.

Weights are encoded on the float model's inputs (see `search.Encoded`): every
one once a format, which serves every allocation that gives it that format.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from experiments import spaces, variants
from quantlab import models, quality, runtime, search
from quantlab.ptq.transform import Encoder


@dataclasses.dataclass(frozen=True)
class Encoding:
  """What encodes, as `search.Encoded` takes it.

  Attributes:
    encoder: a member of a chain.
    batches: what it reads.
    key: for what is random.
  """

  encoder: Encoder
  batches: Any
  key: jax.Array


def encoding(config: Any, work: models.Workload, label: str) -> Encoding:
  """Of 'encoder/seed'."""
  name, seed = label.split('/')
  drawn = _drawn(config, work, int(seed))
  return Encoding(encoder(name), drawn.calibration, jax.random.key(int(seed)))


def tables(
  folder: runtime.Workdir, config: Any, work: models.Workload
) -> dict[str, search.Table]:
  """Further direct tables, by what they were measured with; kept in the folder.

  'metric.encoder' is of what an encoder that reads data makes of each weight,
  on the first calibration set (AdaQuant's integer programs have such tables,
  arXiv 2006.10518); 'metric@option' is around an option of the budgets.
  """
  found: dict[str, search.Table] = {}
  for name in config.encoders:
    reads = encoder(name).observe is not None
    tail = f'.{name}' if reads else ''
    bases: dict[str, str | None] = {tail: None} if reads else {}
    if config.around:
      bases |= {f'{tail}@{option}': option for option in config.budgets}
    file = f'tables_{name}.json'
    kept = folder.read_json(file, {})
    todo = {mark: base for mark, base in bases.items() if mark not in kept}
    more: dict[str, Any] = {}
    if reads and todo:
      how = encoding(config, work, f'{name}/0')
      more = {'encode': how.encoder, 'calibration': how.batches}
    for mark, base in todo.items():
      made = spaces.direct_tables(config, work, base, **more)
      kept[mark] = {k: t.to_json() for k, t in made.items()}
      folder.write_json(file, kept)
    for mark, group in kept.items():
      tables = spaces.read_tables(file, group, work)
      found |= {metric + mark: table for metric, table in tables.items()}
  return found


def measure(
  config: Any, work: models.Workload, metric: str, encoders: Sequence[str] = ()
) -> Callable[[Sequence[int]], float]:
  """`choice -> metric` on the batches of the tables.

  Args:
    config: of a search.
    work: its model.
    metric: a direct one.
    encoders: none, and weights are rounded as the model runs; or the one that
      makes them, on its first calibration set.
  """
  made = program(config, work, encoders)
  run = search.Measure(
    made, spaces.measured_on(config, work), work.metric, [metric]
  )

  def measured(choice):
    [(value, _)] = run([made.choice(choice)])[metric]
    return value

  return measured


def program(
  config: Any, work: models.Workload, encoders: Sequence[str] = ()
) -> search.Program:
  """The model with its choices, weights made by an encoder if one is named."""
  made = spaces.program(config, work)
  for name in encoders:
    how = encoding(config, work, f'{name}/0')
    made = search.Encoded(made, how.encoder, how.batches, how.key)
  return made


def labels(config: Any) -> list[str]:
  """'encoder/seed' of all runs; an encoder that reads no data has one."""
  return [
    f'{name}/{seed}'
    for name in config.encoders
    for seed in range(config.seeds if encoder(name).observe is not None else 1)
  ]


def judge(
  folder: runtime.Workdir,
  config: Any,
  work: models.Workload,
  found: Mapping[str, search.Allocation],
) -> None:
  """Measures every allocation with every encoder and calibration seed.

  All of them run through one compiled function. Allocations that chose the
  same are one measurement under several names.
  """
  plain = spaces.program(config, work)
  apply = None
  for label in runtime.track(labels(config), config.model):
    todo = [n for n in found if f'q/{n}/{label}' not in folder.metrics]
    if not todo:
      continue
    how = encoding(config, work, label)
    program = search.Encoded(plain, how.encoder, how.batches, how.key)
    apply = apply or program.simulated()
    measured: dict[tuple[int, ...], dict[str, Any]] = {}
    for name in todo:
      made = found[name]
      if made.choice not in measured:
        state = program.bits(program.choice(made.choice))
        measured[made.choice] = _judged(
          config, work, apply, program.variables(work.params, state)
        )
      folder.metrics.record(
        f'q/{name}/{label}',
        measured[made.choice] | {'nbytes': made.costs['bytes']},
      )


def _judged(config, work, apply, variables) -> dict[str, Any]:
  """Numbers of one plan; that it failed, if its outputs are no numbers."""
  try:
    values = quality.assess(
      *(work.apply, work.params, apply, variables),
      spaces.judged_on(config, work),
      work.metric,
    )
  except quality.NonFiniteError:
    return {'failed': 1}
  return quality.flat(values['quality']) | quality.flat(values['contrast'])


def _drawn(config: Any, work: models.Workload, seed: int) -> models.Workload:
  """The model with a calibration set of a seed."""
  if not config.calibration:
    return work
  drawn = models.workload(
    config.model, seed=seed, calibration=config.calibration
  )
  return dataclasses.replace(work, calibration=drawn.calibration)


def encoder(name: str) -> Encoder:
  """The one member of a chain that a config names."""
  [*before, member] = variants.transform({'transform': name})
  if before or not isinstance(member, Encoder):
    raise variants.ConfigError(
      f'encoders={name!r}: expected one member that makes codes, such as '
      "'rtn' or 'gptq'"
    )
  return member
