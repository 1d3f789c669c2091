"""The quantizer: a format, who shares a scale, and how the scale is found."""

from __future__ import annotations

import dataclasses
from typing import Any

from quantlab import formats
from quantlab.core import scale_formats, scales
from quantlab.formats import Format, Integer

GRANULARITIES = ('tensor', 'channel', 'token', 'head')
ROUNDINGS = ('nearest', 'stochastic')


@dataclasses.dataclass(frozen=True, repr=False)
class Quantizer:
  """A value that says everything about how a tensor becomes codes.

  Frozen, hashable and JSON-able; made by the factories of
  `quantlab.core.presets` (`int4(group=128)`), whose call `repr` shows.

  Exactly one granularity holds: `per`, `group` or `block`.

    per='channel'  one scale an output channel (or row): only the contraction
      'token'      axis is shared; the two words mean the same.
    per='tensor'   one scale for the two trailing axes; leading loop axes
      'head'       (layers, experts, heads) are always separate tensors.
    group=g        one scale for g elements along the contraction axis.
    block=(bk, bn) one scale for bk by bn elements of (contraction, output).

  Asymmetric quantizers (integer formats) use s = (hi - lo) / (max - min),
  z = round(min - lo / s), q = clip(round(x / s) + z, min, max), with lo <= 0
  <= hi. Codes keep the format's own sign, so that the codes of an asymmetric
  int8 are int8 operands with an int8 zero point.

  Attributes:
    format: what a code can mean; a name is looked up.
    per: see above; 'channel' when no granularity is given.
    group: see above.
    block: see above.
    symmetric: no zero point; unsigned formats then cover [0, hi].
    narrow: leave the lowest signed code unused.
    scale: the range rule; absmax(), or minmax() when asymmetric.
    scale_format: one of float32, bfloat16, pow2, e8m0, e4m3.
    exponent: how the exponent of pow2 and e8m0 scales is chosen: floor (the
      OCP rule), ceil (clips nothing) or nearest.
    ragged: allow a shorter last group or block.
    rounding: nearest (ties to even) or stochastic, which takes a key.
    static: for activations, the range comes from calibration instead of from
      the tensor itself.
  """

  format: Format
  per: str | None = None
  group: int | None = None
  block: tuple[int, int] | None = None
  symmetric: bool = True
  narrow: bool = False
  scale: scales.Rule = None  # type: ignore[assignment]  # see __post_init__
  scale_format: str = 'float32'
  exponent: str = 'ceil'
  ragged: bool = False
  rounding: str = 'nearest'
  static: bool = False

  def __post_init__(self):
    def put(name, value):
      object.__setattr__(self, name, value)

    if isinstance(self.format, str):
      put('format', formats.get(self.format))
    if isinstance(self.block, list):
      put('block', tuple(self.block))
    self._check_types()
    if (self.per, self.group, self.block) == (None, None, None):
      put('per', 'channel')
    if self.scale is None:
      put('scale', scales.full(self.symmetric))
    self._check_words()
    self._check_granularity()
    self._check_ranges()

  def _check_types(self) -> None:
    if not isinstance(self.format, Format):
      raise TypeError(
        f"a format is given by its name, such as 'int8', found {self.format!r}"
      )
    # A word such as 'no' would count as true.
    for name in ('symmetric', 'narrow', 'ragged', 'static'):
      if not isinstance(getattr(self, name), bool):
        raise TypeError(
          f'{name} takes True or False, found {getattr(self, name)!r}'
        )

  def _check_words(self) -> None:
    for name, known in (
      ('per', (None, *GRANULARITIES)),
      ('scale_format', scale_formats.NAMES),
      ('exponent', scale_formats.EXPONENT_RULES),
      ('rounding', ROUNDINGS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f'{name}={getattr(self, name)!r} is not one of {list(known)}'
        )
    if not isinstance(self.scale, scales.Rule):
      raise TypeError(
        f'scale= takes a range rule such as absmax() or mse(), found '
        f'{self.scale!r}'
      )

  def _check_granularity(self) -> None:
    given = {
      name: getattr(self, name)
      for name in ('per', 'group', 'block')
      if getattr(self, name) is not None
    }
    if len(given) > 1:
      words = ' and '.join(f'{k}={v!r}' for k, v in given.items())
      raise ValueError(
        f'{self.format.name} got two granularities at once: {words}; '
        'give exactly one of per, group, block'
      )
    if self.group is not None and not _is_size(self.group):
      raise ValueError(f'group takes a positive integer, found {self.group!r}')
    if self.block is not None and (
      not isinstance(self.block, tuple)
      or len(self.block) != 2
      or not all(map(_is_size, self.block))
    ):
      raise ValueError(
        f'block takes two positive integers, found {self.block!r}'
      )
    if self.ragged and self.per:
      raise ValueError(
        f'ragged=True needs group= or block=; per={self.per!r} always divides'
      )

  def _check_ranges(self) -> None:
    fmt, integer = self.format, isinstance(self.format, Integer)
    if not self.symmetric:
      if not integer or fmt is formats.TERNARY:
        raise ValueError(
          f'{fmt.name} has no zero point: symmetric=False needs an integer '
          'format'
        )
      if not self.scale.sided:
        raise ValueError(
          f'{self.scale!r} ignores the sign; symmetric=False needs minmax(), '
          'percentile() or mse()'
        )
    if self.narrow and not (integer and fmt.signed and self.symmetric):
      raise ValueError(
        f'narrow=True needs a symmetric signed integer format, found {fmt.name}'
        f' with symmetric={self.symmetric}'
      )
    if self.scale.direct and fmt.max != 1:
      raise ValueError(
        f'{self.scale!r} sets the scale of ternary() and binary() itself; '
        f'{fmt.name} needs a range: absmax(), percentile() or mse()'
      )
    if isinstance(self.scale, scales.kl) and not self.static:
      raise ValueError(
        f'{self.scale!r} compares distributions that calibration counts: it '
        'needs static=True, and is not for weights. mse() and percentile() '
        'are'
      )
    if self.learned:
      if self.per is None:
        raise ValueError(
          f"{fmt.name} learns one table per='channel' or per='tensor', not for "
          f'each group or block; found {self._granularity()}'
        )
      if self.scale != scales.absmax():
        raise ValueError(
          f'{fmt.name} learns its values, its scale is absmax(); found '
          f'{self.scale!r}'
        )

  @property
  def bits(self) -> int:
    """Stored bits of one code."""
    return self.format.bits

  @property
  def learned(self) -> bool:
    """Whether a table is learned with the scale."""
    return isinstance(self.format, formats.Codebook) and self.format.learned

  @property
  def grid(self) -> Format:
    """The format with `narrow` applied: the values that are really used."""
    if self.narrow and isinstance(self.format, Integer):
      return dataclasses.replace(self.format, narrow=True)
    return self.format

  @property
  def exponent_offset(self) -> int:
    """Implicit power of two between an E8M0 scale and integer codes.

    OCP MXINT8 elements are codes times 2^-6, so that the stored exponent is
    6 larger than that of the scale which multiplies the integer code.
    """
    integer = isinstance(self.format, Integer)
    return self.bits - 2 if integer and self.scale_format == 'e8m0' else 0

  def unit(self, k: int, n: int) -> tuple[int, int]:
    """Sizes along (contraction, output) of what shares one scale."""
    if self.group is not None:
      return min(self.group, k), 1
    if self.block is not None:
      return min(self.block[0], k), max(min(self.block[1], n), 1)
    return (k, n) if self.per in ('tensor', 'head') else (k, 1)

  def check(self, k: int, n: int, where: str = 'an array') -> None:
    """Raises ValueError where groups do not divide the axes.

    Args:
      k: length of the contraction axis.
      n: length of the output axis.
      where: what to call the array: a parameter path, or words.
    """
    if self.ragged:
      return
    for size, length, axis, word in (
      (self.group, k, -2, 'contraction'),
      (self.block and self.block[0], k, -2, 'contraction'),
      (self.block and self.block[1], n, -1, 'output'),
    ):
      if size is not None and length % size:
        raise ValueError(_indivisible(self, size, (k, n), axis, word, where))

  def to_json(self) -> dict[str, Any]:
    """The quantizer as plain JSON values, every field spelled out."""
    data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    data['format'] = formats.get(self.format.name).name
    data['scale'] = self.scale.to_json()
    data['block'] = self.block and list(self.block)
    return data

  @classmethod
  def from_json(cls, data: dict[str, Any]) -> Quantizer:
    """Undoes `to_json`."""
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - known):
      raise ValueError(
        f'unknown fields of a quantizer: {unknown}; known are {sorted(known)}'
      )
    args = dict(data)
    if args.get('scale') is not None:
      args['scale'] = scales.from_json(args['scale'])
    return cls(**args)

  def _granularity(self) -> str:
    names = ('per', 'group', 'block')
    return ', '.join(
      f'{n}={getattr(self, n)!r}' for n in names if getattr(self, n) is not None
    )

  def __repr__(self) -> str:
    from quantlab.core import presets  # presets make quantizers

    return presets.call(self)


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _indivisible(
  quantizer: Quantizer,
  size: int,
  shape: tuple[int, int],
  axis: int,
  word: str,
  where: str,
) -> str:
  """What to say when `size` does not divide `shape[axis]`."""
  length = shape[axis]
  below = [d for d in range(min(size, length), 1, -1) if length % d == 0]
  powers = [d for d in below if d & (d - 1) == 0]
  choices = []
  if quantizer.group is not None:
    best = (powers or below)[:1]
    choices += [f'group={d} (divides {length})' for d in best]
    choices += [f'group={size} with ragged=True (a shorter last group)']
    if not best:
      choices.append("per='channel'")
  else:
    for d in (powers or below)[:1]:
      block = list(quantizer.block or ())
      block[0 if axis == -2 else 1] = d
      choices.append(f'block={tuple(block)} ({d} divides {length})')
    choices.append(f'block={quantizer.block} with ragged=True (shorter edges)')
  name = where
  if '/' in where and ' ' not in where:
    name = f'{where.strip(chr(39))!r}'
    choices.append(f'None for {_pattern(where.strip(chr(39)))!r}')
  listed = f'{", ".join(choices[:-1])}, or {choices[-1]}'
  return (
    f'{quantizer!r} does not divide {name} along its {word} axis: '
    f'{shape=}, {axis=}. Use {listed}.'
  )


def _pattern(path: str) -> str:
  """A recipe pattern for the layer that holds this parameter."""
  parts = path.split('/')[:-1] or [path]
  first = len(parts) - 1
  while first and parts[first].isdigit():
    first -= 1
  return f'.*/{"/".join(parts[first:])}/.*'
