"""Allocations, quantized by encoders and judged.

What an encoder makes of a weight depends here on its own format and on the
float model's inputs alone, not on what the weights before it became (as in
`ql.ptq`, whose walk hands on the quantized stream). Codes of a weight in a
format are made once, and serve every allocation that gives it that format.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

import quantlab as ql
from experiments import spaces, variants
from quantlab import models, quality, runtime, search
from quantlab.calibration import ranges
from quantlab.graph import tracing
from quantlab.ptq.transform import Encoder


def remembered(
  member: Encoder, work: models.Workload, plan: ql.Plan
) -> Encoder:
  """The encoder on the float stream, with every code kept that it made.

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
        f'{member.name} is not remembered for sites in a scan: {scanned[:3]}; '
        "use encoders=('rtn',)"
      )
    observer = member.observe(plan)
    stats = ranges.stream(
      ql.observe(work.apply, observer, plan, quantize=False),
      work.params,
      work.calibration,
      observer,
    )
  kept: dict[Any, Any] = {}

  def encode(target, stat, key):
    del stat
    at = target.name, target.storage.quantizer
    if at not in kept:
      site = sites.get(target.name)
      target = dataclasses.replace(target, site=site)
      mine = stats.get(site.id) if site is not None else None
      kept[at] = member.encode(target, mine, key)
    return kept[at]

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


def judge(
  folder: runtime.Workdir,
  config: Any,
  work: models.Workload,
  found: Mapping[str, search.Allocation],
) -> None:
  """Quantizes by every allocation, encoder and calibration seed, and measures.

  An encoder that reads no data is run once. Allocations that chose the same
  are one measurement under several names.
  """
  encoders = _encoders(config, work, next(iter(found.values())))
  applies: dict[tuple[int, ...], Any] = {}
  measured: dict[Any, dict[str, Any]] = {}
  todo = [
    (name, label)
    for name in found
    for label in encoders
    if f'q/{name}/{label}' not in folder.metrics
  ]
  for name, label in runtime.track(todo, config.model):
    made = found[name]
    at = made.choice, label
    if at not in measured:
      drawn, member, key = encoders[label]()
      with runtime.timed() as timer:
        model = ql.ptq(
          work.apply, work.params, made, drawn.calibration, member, key=key
        )
      # One function a plan: its other seeds and encoders compile nothing.
      apply = applies.setdefault(made.choice, model.apply)
      values = quality.assess(
        work.apply,
        work.params,
        apply,
        model.params,
        spaces.judged_on(config, work),
        work.metric,
      )
      measured[at] = (
        quality.flat(values['quality'])
        | quality.flat(values['contrast'])
        | {'nbytes': model.nbytes, 'seconds': timer.seconds}
      )
    folder.metrics.record(f'q/{name}/{label}', measured[at])


def _encoders(
  config: Any, work: models.Workload, made: search.Allocation
) -> dict[str, Callable[[], tuple[models.Workload, Encoder, jax.Array]]]:
  """By 'name/seed': what quantizes, made when it is first asked for."""
  plan = ql.plan(work.apply, work.params, made, *work.example)
  found: dict[str, Callable] = {}
  for name in config.encoders:
    member = _encoder(name)
    for seed in range(config.seeds if member.observe is not None else 1):
      found[f'{name}/{seed}'] = functools.cache(
        functools.partial(_ready, config, work, plan, member, seed)
      )
  return found


def _encoder(name: str) -> Encoder:
  [*before, member] = variants.transform({'transform': name})
  if before or not isinstance(member, Encoder):
    raise variants.ConfigError(
      f'encoders={name!r}: expected one member that makes codes, such as '
      "'rtn' or 'gptq'"
    )
  return member


def _ready(config, work, plan, member, seed):
  drawn = work
  if config.calibration:
    drawn = models.workload(
      config.model, seed=seed, calibration=config.calibration
    )
  drawn = dataclasses.replace(work, calibration=drawn.calibration)
  return drawn, remembered(member, drawn, plan), jax.random.key(seed)
