"""A loss as a function of what is added to every operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from quantlab import handlers
from quantlab.search import objectives
from quantlab.search.program import Operand
from quantlab.search.simulate import kind
from quantlab.search.taylor import Expansion


class Offsets:
  """The loss of one batch as a function of what is added to every operand."""

  def __init__(
    self, expansion: Expansion, product: handlers.Product = handlers.plainly
  ):
    self.expansion, self.program = expansion, expansion.program
    self._mean = objectives.mean(expansion.task, expansion.of)
    self._added = _Added()
    self._run = self.program.simulated(self._added, product)

  def shapes(self, inputs: Any) -> dict[Operand, tuple[int, ...]]:
    """Shapes of the offsets; operands inside loops have one for each turn."""
    params = self.program.params
    jax.eval_shape(lambda p: self._outputs(p, {}, {}, inputs), params)
    effective = self.program.space.plan.effective
    found = {}
    for o in self.expansion.searched:
      outside = kind(o[1]) == 'weight' and o[0] not in effective
      loops = () if outside else self.program.operands[o]
      found[o] = (*loops, *self._added.shapes[o])
    return found

  def _outputs(self, params, offsets, slots, inputs):
    state = self.program.state(
      lambda o, loops: {'offset': offsets[o]} if o in offsets else {}
    )
    for site, slot in slots.items():
      state.setdefault(site, {})['probe'] = slot
    return self._run(self.program.variables(params, state), *inputs)

  def loss(self, params, inputs, targets) -> Callable:
    """`(offsets, slots) -> the batch's mean loss`; slots are of the product."""

    def run(offsets, slots):
      outputs = self._outputs(params, offsets, slots, inputs)
      return self._mean(lax.stop_gradient(outputs), outputs, targets)

    return run


class _Added:
  """`handlers.Simulate`: the leaf 'offset' is added; notes shapes."""

  def __init__(self) -> None:
    self.shapes: dict[Operand, tuple[int, ...]] = {}

  def __call__(self, site, role, x, quantizer, leaves, *, axis, shape):
    self.shapes[site, role] = tuple(x.shape)
    return x + leaves['offset'].astype(x.dtype) if 'offset' in leaves else x
