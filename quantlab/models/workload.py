"""A model with the data it is calibrated on and judged by: one record."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from quantlab.data import batches
from quantlab.quality import metric as metrics


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
  """Everything a run needs to quantize a model and to measure it.

  Attributes:
    name: as the registry knows it.
    apply: the pure function, `apply(params, *inputs) -> outputs`.
    params: its float parameters.
    calibration: batches `(*inputs,)`.
    evaluation: batches `(*inputs, *targets)`; `metric.targets` says how many.
    metric: what it is judged by.
    expected: the float model's numbers on the whole evaluation set, by the
      metric's names; empty where nothing is published or measured.
    preprocess: raw arrays of a batch -> inputs, as the batches apply it.
    notes: what a reader of the numbers should know.
  """

  name: str
  apply: Callable[..., Any]
  params: Any
  calibration: batches.Batches
  evaluation: batches.Batches
  metric: metrics.Metric
  expected: Mapping[str, float]
  preprocess: Callable[..., Any]
  notes: str = ''

  @property
  def example(self) -> batches.Batch:
    """A batch of inputs, to plan with."""
    return self.calibration[0]
