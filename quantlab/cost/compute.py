"""Multiply-accumulates, bit operations and energy of a plan."""

from __future__ import annotations

import dataclasses
import math

from quantlab.core import Quantizer
from quantlab.cost import storage
from quantlab.formats import Integer
from quantlab.plan import Plan, SitePlan


def macs(plan: Plan) -> dict[str, int]:
  """Multiply-accumulates of one run of the program, by site id."""
  return {name: site.macs for name, site in plan.sites.items()}


def bops(plan: Plan, *, float_bits: int = 32) -> dict[str, int]:
  """Bit operations: multiply-accumulates times the bits of both operands.

    BOPs = MACs b_w b_a      (arXiv 1911.09723; HAWQ-v3 divides them by 1024)

  Args:
    plan: the plan.
    float_bits: what an operand without a quantizer counts.
  """
  found = {}
  for name, site in plan.sites.items():
    first, second = _operands(site)
    bits = (q.bits if q else float_bits for q in (first, second))
    found[name] = site.macs * math.prod(bits)
  return found


@dataclasses.dataclass(frozen=True)
class Energy:
  """Picojoules of operations at 45 nm and 0.9 V.

  M. Horowitz, Computing's energy problem (and what we can do about it),
  ISSCC 2014, figure 1.1.9. Its multiplier takes 0.2 pJ at 8 bits and 3.1 at
  32: other widths are scaled with the product of both operands' bits.

  Attributes:
    int8_multiply: of two 8-bit integers.
    int32_add: to an accumulator.
    float32_multiply, float32_add: of a product computed in float.
    sram_byte: an activation byte, from an 8 KB cache (10 pJ for 8 bytes).
    dram_byte: a weight byte (1300 pJ for 8 bytes, the lower end).
  """

  int8_multiply: float = 0.2
  int32_add: float = 0.1
  float32_multiply: float = 3.7
  float32_add: float = 0.9
  sram_byte: float = 10 / 8
  dram_byte: float = 1300 / 8


def energy(plan: Plan, constants: Energy | None = None) -> dict[str, float]:
  """Picojoules of one run of the program, by site id.

  Products of two integer operands are integer products; any other is computed
  in float32, whatever is stored. Each weight is read once from DRAM, each
  operand and result once from and to SRAM, at the bits of its quantizer.

  Args:
    plan: the plan.
    constants: of the machine; Horowitz's by default.
  """
  c = constants or Energy()
  stored = storage.nbytes(plan)
  found = {}
  for name, site in plan.sites.items():
    first, second = _operands(site)
    if _integer(first) and _integer(second):
      assert first is not None
      assert second is not None
      each = c.int8_multiply * first.bits * second.bits / 64 + c.int32_add
    else:
      each = c.float32_multiply + c.float32_add
    moved = _activation_bytes(site) * c.sram_byte
    found[name] = site.macs * each + moved + stored[name] * c.dram_byte
  return found


def _operands(site: SitePlan) -> tuple[Quantizer | None, Quantizer | None]:
  """Quantizers of both operands: weight and input, or lhs and rhs."""
  rule = site.rule
  if rule is None:
    return None, None
  return rule.weight or rule.lhs, rule.input or rule.rhs


def _integer(quantizer: Quantizer | None) -> bool:
  return quantizer is not None and isinstance(quantizer.format, Integer)


def _activation_bytes(site: SitePlan) -> float:
  """Bytes of the activations that a site reads and writes, loops included."""
  lhs, rhs, out = (math.prod(shape) for shape in site.tensors)
  first, second = _operands(site)
  output = site.rule.output if site.rule else None
  read = lhs + rhs
  if site.matrix:
    weight = math.prod(site.matrix[len(site.weight_loops) :])
    read = max(read - weight, 0)
  width = second.bits if second else 32
  if not site.matrix and first:
    width = max(width, first.bits)
  bits = read * width + out * (output.bits if output else 32)
  return math.prod(site.loops) * bits / 8
