"""Quantizers by name: one factory a format.

Every factory takes the fields of `Quantizer` as keywords (`Fields`). What
makes the format what it is, such as the group of a block format or the range
rule of ternary weights, is a default that keywords override.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypedDict, Unpack

from quantlab import formats
from quantlab.core import scales
from quantlab.core.quantizer import Quantizer


class Fields(TypedDict, total=False):
  """The keywords of every factory: see `Quantizer`."""

  per: str | None
  group: int | None
  block: tuple[int, int] | None
  symmetric: bool
  narrow: bool
  scale: scales.Rule | None
  scale_format: str
  exponent: str
  ragged: bool
  rounding: str
  static: bool


_GRANULARITY = ('per', 'group', 'block')


def _make(
  fmt: formats.Format | str, fields: Fields, **defaults: Any
) -> Quantizer:
  """The quantizer of `defaults` overridden by `fields`."""
  if any(fields.get(name) is not None for name in _GRANULARITY):
    defaults = {k: v for k, v in defaults.items() if k not in _GRANULARITY}
  return Quantizer(fmt, **{**defaults, **fields})  # type: ignore[arg-type]


def int2(**fields: Unpack[Fields]) -> Quantizer:
  """Signed 2-bit integers, -2 to 1."""
  return _make('int2', fields)


def int3(**fields: Unpack[Fields]) -> Quantizer:
  """Signed 3-bit integers, -4 to 3."""
  return _make('int3', fields)


def int4(**fields: Unpack[Fields]) -> Quantizer:
  """Signed 4-bit integers, -8 to 7."""
  return _make('int4', fields)


def int5(**fields: Unpack[Fields]) -> Quantizer:
  """Signed 5-bit integers, -16 to 15."""
  return _make('int5', fields)


def int6(**fields: Unpack[Fields]) -> Quantizer:
  """Signed 6-bit integers, -32 to 31."""
  return _make('int6', fields)


def int7(**fields: Unpack[Fields]) -> Quantizer:
  """Signed 7-bit integers, -64 to 63."""
  return _make('int7', fields)


def int8(**fields: Unpack[Fields]) -> Quantizer:
  """Signed 8-bit integers, -128 to 127."""
  return _make('int8', fields)


def int16(**fields: Unpack[Fields]) -> Quantizer:
  """Signed 16-bit integers, -32768 to 32767."""
  return _make('int16', fields)


def uint2(**fields: Unpack[Fields]) -> Quantizer:
  """Unsigned 2-bit integers, 0 to 3."""
  return _make('uint2', fields)


def uint3(**fields: Unpack[Fields]) -> Quantizer:
  """Unsigned 3-bit integers, 0 to 7."""
  return _make('uint3', fields)


def uint4(**fields: Unpack[Fields]) -> Quantizer:
  """Unsigned 4-bit integers, 0 to 15."""
  return _make('uint4', fields)


def uint5(**fields: Unpack[Fields]) -> Quantizer:
  """Unsigned 5-bit integers, 0 to 31."""
  return _make('uint5', fields)


def uint6(**fields: Unpack[Fields]) -> Quantizer:
  """Unsigned 6-bit integers, 0 to 63."""
  return _make('uint6', fields)


def uint7(**fields: Unpack[Fields]) -> Quantizer:
  """Unsigned 7-bit integers, 0 to 127."""
  return _make('uint7', fields)


def uint8(**fields: Unpack[Fields]) -> Quantizer:
  """Unsigned 8-bit integers, 0 to 255."""
  return _make('uint8', fields)


def fp8_e4m3(**fields: Unpack[Fields]) -> Quantizer:
  """FP8 E4M3, up to 448 (OFP8)."""
  return _make('fp8_e4m3', fields)


def fp8_e5m2(**fields: Unpack[Fields]) -> Quantizer:
  """FP8 E5M2, up to 57344 (OFP8)."""
  return _make('fp8_e5m2', fields)


def fp6_e3m2(**fields: Unpack[Fields]) -> Quantizer:
  """FP6 E3M2, up to 28."""
  return _make('fp6_e3m2', fields)


def fp6_e2m3(**fields: Unpack[Fields]) -> Quantizer:
  """FP6 E2M3, up to 7.5."""
  return _make('fp6_e2m3', fields)


def fp4_e2m1(**fields: Unpack[Fields]) -> Quantizer:
  """FP4 E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
  return _make('fp4_e2m1', fields)


def nf4(**fields: Unpack[Fields]) -> Quantizer:
  """NF4, by default in groups of 64 (QLoRA, arXiv 2305.14314)."""
  return _make('nf4', fields, group=64)


def ternary(**fields: Unpack[Fields]) -> Quantizer:
  """-1, 0, 1 times the mean magnitude (BitNet b1.58, arXiv 2402.17764)."""
  return _make('ternary', fields, scale=scales.absmean())


def binary(**fields: Unpack[Fields]) -> Quantizer:
  """-1, 1 times the mean magnitude (XNOR-Net, arXiv 1603.05279)."""
  return _make('binary', fields, scale=scales.absmean())


def odd(*, bits: int = 2, **fields: Unpack[Fields]) -> Quantizer:
  """Odd integers -(2^b - 1) .. 2^b - 1, the levels of DoReFa-Net."""
  return _make(formats.odd(bits), fields)


def pow2(*, bits: int = 4, **fields: Unpack[Fields]) -> Quantizer:
  """Signed powers of two and zero (arXiv 1909.13144, equation 3)."""
  return _make(formats.pow2(bits), fields)


def codebook(*, bits: int = 4, **fields: Unpack[Fields]) -> Quantizer:
  """A table of 2^bits values, learned by k-means for each channel or tensor."""
  return _make(formats.codebook(bits), fields)


def mxfp8(*, element: str = 'e4m3', **fields: Unpack[Fields]) -> Quantizer:
  """OCP MXFP8: blocks of 32, E8M0 scale; element 'e4m3' or 'e5m2'."""
  return _block('mxfp8', element, fields)


def mxfp6(*, element: str = 'e2m3', **fields: Unpack[Fields]) -> Quantizer:
  """OCP MXFP6: blocks of 32, E8M0 scale; element 'e2m3' or 'e3m2'."""
  return _block('mxfp6', element, fields)


def mxfp4(**fields: Unpack[Fields]) -> Quantizer:
  """OCP MXFP4: E2M1 in blocks of 32, E8M0 scale."""
  return _block('mxfp4', 'e2m1', fields)


def mxint8(**fields: Unpack[Fields]) -> Quantizer:
  """OCP MXINT8: int8 times 2^-6 in blocks of 32, E8M0 scale.

  The code -128 is left unused, as the specification allows, for symmetry.
  """
  fields = {'narrow': True, **fields}
  return _block('mxint8', 'int8', fields)


def nvfp4(**fields: Unpack[Fields]) -> Quantizer:
  """NVFP4: E2M1 in blocks of 16, E4M3 scales under one float32 scale."""
  return _block('nvfp4', 'e2m1', fields)


def dfp16(**fields: Unpack[Fields]) -> Quantizer:
  """Dynamic fixed point: int16, one power-of-two scale for the tensor."""
  return _make('int16', fields, per='tensor', scale_format='pow2')


def _block(name: str, element: str, fields: Fields) -> Quantizer:
  """A block format of `formats.PRESETS`."""
  known = {e: p for (n, e), p in formats.PRESETS.items() if n == name}
  if element not in known:
    raise ValueError(
      f'{name} takes element={" or ".join(map(repr, known))}, found {element!r}'
    )
  p = known[element]
  return _make(
    p.element,
    fields,
    group=p.block,
    scale_format=p.scale_format,
    **({'exponent': 'floor'} if p.scale_format == 'e8m0' else {}),
  )


def _calls() -> list[tuple[str, dict[str, Any], Quantizer]]:
  """(factory, its own keywords, the quantizer it gives) for every format."""
  simple = [
    *(f for f in formats.names() if f in globals()),
    *('mxfp8', 'mxfp6', 'mxfp4', 'mxint8', 'nvfp4', 'dfp16'),
  ]
  calls: list[tuple[str, dict[str, Any], Quantizer]] = [
    (name, {}, globals()[name]()) for name in simple
  ]
  calls += [('odd', {'bits': b}, odd(bits=b)) for b in range(2, 8)]
  calls += [('pow2', {'bits': b}, pow2(bits=b)) for b in range(2, 8)]
  calls += [('codebook', {'bits': b}, codebook(bits=b)) for b in range(1, 9)]
  calls.append(('mxfp8', {'element': 'e5m2'}, mxfp8(element='e5m2')))
  calls.append(('mxfp6', {'element': 'e3m2'}, mxfp6(element='e3m2')))
  return calls


def call(q: Quantizer) -> str:
  """The shortest factory call that gives this quantizer."""
  found = [
    (name, {**own, **_difference(q, base)})
    for name, own, base in _calls()
    if base.format == q.format
  ]
  found.append(('Quantizer', {'format': q.format.name, **_difference(q, None)}))
  name, args = min(found, key=lambda item: len(item[1]))
  if args.get('bits') == {'odd': 2, 'pow2': 4, 'codebook': 4}.get(name):
    args.pop('bits', None)
  return f'{name}({", ".join(f"{k}={v!r}" for k, v in args.items())})'


def _difference(q: Quantizer, base: Quantizer | None) -> dict[str, Any]:
  """The keywords that turn `base` into q."""
  base = base or Quantizer(q.format)
  args: dict[str, Any] = {}
  if any(getattr(q, n) != getattr(base, n) for n in _GRANULARITY):
    args = {n: getattr(q, n) for n in _GRANULARITY if getattr(q, n) is not None}
  for field in dataclasses.fields(q):
    name = field.name
    if name in ('format', 'scale', *_GRANULARITY):
      continue
    if getattr(q, name) != getattr(base, name):
      args[name] = getattr(q, name)
  implied = base.scale if q.symmetric == base.symmetric else scales.minmax()
  if q.scale != implied:
    args['scale'] = q.scale
  return args
