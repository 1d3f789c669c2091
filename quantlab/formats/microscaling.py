"""Block formats: an element format, a block length and the scale's format.

References:
  OCP microscaling formats (MX) specification, version 1.0, section 5.
  NVFP4: two-level scaling as documented for NVIDIA Blackwell.
"""

from __future__ import annotations

from typing import NamedTuple

from quantlab.formats import integer, minifloat
from quantlab.formats.base import Format


class Preset(NamedTuple):
  """A block format; the scale is shared along the contraction axis."""

  element: Format
  block: int
  scale_format: str


PRESETS = {
  ('mxfp8', 'e4m3'): Preset(minifloat.FP8_E4M3, 32, 'e8m0'),
  ('mxfp8', 'e5m2'): Preset(minifloat.FP8_E5M2, 32, 'e8m0'),
  ('mxfp6', 'e2m3'): Preset(minifloat.FP6_E2M3, 32, 'e8m0'),
  ('mxfp6', 'e3m2'): Preset(minifloat.FP6_E3M2, 32, 'e8m0'),
  ('mxfp4', 'e2m1'): Preset(minifloat.FP4_E2M1, 32, 'e8m0'),
  ('mxint8', 'int8'): Preset(integer.INT8, 32, 'e8m0'),
  ('nvfp4', 'e2m1'): Preset(minifloat.FP4_E2M1, 16, 'e4m3'),
}
