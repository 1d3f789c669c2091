"""Allocations, quantized by encoders and judged.

What an encoder makes of a weight depends here on its own format and on the
float model's inputs alone, not on what the weights before it became (as in
`ql.ptq`, whose walk hands on the quantized stream). So every weight is encoded
once a format, and serves every allocation that gives it that format.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

import quantlab as ql
from experiments import spaces, variants
from quantlab import models, quality, runtime, search
from quantlab.calibration import ranges
from quantlab.graph import tracing
from quantlab.ptq.transform import Encoder


def on_floats(member: Encoder, work: models.Workload, plan: ql.Plan) -> Encoder:
  """The encoder with statistics of the float stream for every weight.

  Args:
    member: an encoder.
    work: the model, with the calibration set.
    plan: any plan of the space that quantizes all of its weights.

  Raises:
    ConfigError: a site of the model lies in a scan, whose layers the encoder
      would have to take one by one.
  """
  sites = _sites(work, plan)
  stats: Mapping[str, Any] = {}
  if member.observe is not None:
    scanned = [s.id for s in plan.quantized.values() if s.loops]
    if scanned:
      raise variants.ConfigError(
        f'{member.name} takes no sites in a scan here: {scanned[:3]}; '
        "use encoders=('rtn',)"
      )
    observer = member.observe(plan)
    stats = ranges.stream(
      ql.observe(work.apply, observer, plan, quantize=False),
      work.params,
      work.calibration,
      observer,
    )

  def encode(target, stat, key):
    del stat
    site = sites.get(target.name)
    mine = stats.get(site.id) if site is not None else None
    return member.encode(dataclasses.replace(target, site=site), mine, key)

  return Encoder(member.name, encode)


def _sites(work: models.Workload, plan: ql.Plan) -> dict[str, Any]:
  """The product of each weight that is in one product alone."""
  traced, *_ = tracing.Tracer(work.apply)(work.params, work.example, {})
  found: dict[str, list[Any]] = {}
  for site in traced.analysis.sites:
    planned = plan.quantized.get(site.id)
    for name in {site.id, *planned.paths} if planned else ():
      found.setdefault(name, []).append(site)
  return {
    k: v[0] for k, v in found.items() if len(v) == 1 and v[0].kind != 'gather'
  }


def encoding(config: Any, work: models.Workload, label: str) -> Callable:
  """`plan -> variables` by 'encoder/seed', see `search.Encoded`."""
  name, seed = label.split('/')
  drawn = _drawn(config, work, int(seed))
  plan = spaces.space(config, work).columns[0]
  member = on_floats(encoder(name), drawn, plan)

  def encode(plan):
    key = jax.random.key(int(seed))
    return ql.ptq(
      work.apply, work.params, plan, drawn.calibration, member, key=key
    ).params

  return encode


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
    encode = encoding(config, work, f'{name}/0') if reads and todo else None
    for mark, base in todo.items():
      made = spaces.direct_tables(config, work, encode, base)
      kept[mark] = {k: t.to_json() for k, t in made.items()}
      folder.write_json(file, kept)
    for mark, group in kept.items():
      for metric, table in group.items():
        found[metric + mark] = search.Table.from_json(table)
  return found


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
    program = search.Encoded(plain, encoding(config, work, label))
    apply = apply or program.simulated()
    measured: dict[tuple[int, ...], dict[str, Any]] = {}
    for name in todo:
      made = found[name]
      if made.choice not in measured:
        state = program.bits(program.choice(made.choice))
        values = quality.assess(
          work.apply,
          work.params,
          apply,
          program.variables(work.params, state),
          spaces.judged_on(config, work),
          work.metric,
        )
        measured[made.choice] = quality.flat(values['quality']) | quality.flat(
          values['contrast']
        )
      folder.metrics.record(
        f'q/{name}/{label}',
        measured[made.choice] | {'nbytes': made.costs['bytes']},
      )


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
