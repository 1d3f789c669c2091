"""What launchers do with one model: load it, quantize it."""

from typing import Any

import jax
import rich
from rich import markup

import quantlab as ql
from experiments import variants
from quantlab import models


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
  model = ql.ptq(
    work.apply,
    work.params,
    variant.recipe,
    work.calibration,
    variant.transform,
    key=key,
    workdir=walk,
  )
  return jax.block_until_ready(model)
