"""What launchers do with one model: load it, quantize it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import rich
from rich import markup

import quantlab as ql
from experiments import variants
from quantlab import models
from quantlab.ptq.transform import Transform


def load(config: Any, name: str, **options: Any) -> models.Workload | None:
  """A workload, or None with a message where its files are absent."""
  sizes = {k: config[k] for k in ('calibration', 'evaluation') if config[k] > 0}
  try:
    return models.workload(name, seed=config.seed, **sizes, **options)
  except FileNotFoundError as error:
    rich.print(f'[yellow]{name} is skipped:[/] {markup.escape(str(error))}')
    return None


def quantize(
  work: models.Workload, variant: variants.Variant, key: jax.Array, walk: Any
) -> Any:
  """The quantized model, finished on the device."""
  return quantize_watched(work, variant, key, walk)[0]


def quantize_watched(
  work: models.Workload,
  variant: variants.Variant,
  key: jax.Array,
  walk: Any,
  block_errors: bool = False,
) -> tuple[Any, list[str], Any]:
  """The quantized model, and the float model as its chain prepared it.

  Returns:
    The model, finished on the device; the names of the members that prepare;
    the variables they left, or None where there is no such member.
  """
  members = list(variant.transform)
  seen: dict[str, Any] = {}
  prepare = [i for i, m in enumerate(members) if m.phase == 'prepare']
  if prepare:
    last = members[prepare[-1]]
    # Under its own name: what is fingerprinted and reported stays the same.
    members[prepare[-1]] = dataclasses.replace(last, run=_keeping(last, seen))
  model = ql.ptq(
    work.apply,
    work.params,
    variant.recipe,
    work.calibration,
    members,
    key=key,
    workdir=walk,
    block_errors=block_errors,
  )
  names = [members[i].name for i in prepare]
  return jax.block_until_ready(model), names, seen.get('variables')


def _keeping(member: Transform, seen: dict[str, Any]) -> Callable[..., Any]:
  """What a member does, the model it leaves also kept in `seen`."""

  def run(context):
    context = member.run(context)
    seen['variables'] = {
      'weights': context.params,
      'sites': dict(context.state),
    }
    return context

  return run
