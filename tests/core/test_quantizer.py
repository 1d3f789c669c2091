"""Quantizers as values: spelling, JSON, and what is refused and how."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from quantlab import formats
from quantlab.core import Quantizer, presets, scales

SCOPE = {**vars(presets), 'scales': scales, 'Quantizer': Quantizer}
SCOPE.update({name: getattr(scales, name) for name in scales._RULES})
RULES = [
  scales.absmax(),
  scales.minmax(),
  scales.percentile(),
  scales.percentile(p=99.5),
  scales.mse(),
  scales.mse(100, p=2.4),
  scales.absmean(),
  scales.absmedian(),
]


@st.composite
def quantizers(draw):
  fields = draw(
    st.fixed_dictionaries(
      {'format': st.sampled_from(formats.names())},
      optional={
        'symmetric': st.booleans(),
        'narrow': st.booleans(),
        'scale': st.sampled_from(RULES),
        'scale_format': st.sampled_from(['float32', 'e8m0', 'e4m3']),
        'exponent': st.sampled_from(['floor', 'ceil', 'nearest']),
        'rounding': st.sampled_from(['nearest', 'stochastic']),
        'static': st.booleans(),
      },
    )
  )
  fields.update(
    draw(
      st.sampled_from(
        [
          {},
          {'per': 'tensor'},
          {'per': 'token'},
          {'group': 32},
          {'group': 64, 'ragged': True},
          {'block': (16, 16)},
        ]
      )
    )
  )
  try:
    return Quantizer(**fields)
  except ValueError:  # fields that do not go together: tested below
    hypothesis.reject()


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(quantizers())
def test_repr_and_json_give_the_quantizer_back(q):
  assert eval(repr(q), SCOPE) == q
  text = json.dumps(q.to_json())
  back = Quantizer.from_json(json.loads(text))
  assert back == q
  assert hash(back) == hash(q)


@pytest.mark.parametrize(
  ('q', 'text'),
  [
    (presets.int8(), 'int8()'),
    (
      presets.int4(group=128, symmetric=False),
      'int4(group=128, symmetric=False)',
    ),
    (presets.nf4(), 'nf4()'),
    (presets.nf4(group=128), 'nf4(group=128)'),
    (presets.nf4(per='channel'), "nf4(per='channel')"),
    (presets.nf4(block=(64, 64)), 'nf4(block=(64, 64))'),
    (presets.mxfp8(), 'mxfp8()'),
    (presets.mxfp8(element='e5m2'), "mxfp8(element='e5m2')"),
    (presets.mxint8(), 'mxint8()'),
    (presets.mxfp4(exponent='ceil'), "mxfp4(exponent='ceil')"),
    (presets.nvfp4(), 'nvfp4()'),
    (presets.dfp16(), 'dfp16()'),
    (presets.pow2(), 'pow2()'),
    (presets.codebook(bits=3, per='tensor'), "codebook(bits=3, per='tensor')"),
    (presets.ternary(), 'ternary()'),
    (presets.int4(scale=scales.mse(100)), 'int4(scale=mse(candidates=100))'),
  ],
)
def test_repr_is_the_factory_call(q, text):
  assert repr(q) == text


def test_presets():
  assert presets.mxfp4() == Quantizer(
    'fp4_e2m1', group=32, scale_format='e8m0', exponent='floor'
  )
  assert presets.nvfp4().scale_format == 'e4m3'
  assert presets.nvfp4().group == 16
  assert presets.dfp16() == presets.int16(per='tensor', scale_format='pow2')
  assert presets.ternary().scale == scales.absmean()
  assert presets.int4(symmetric=False).scale == scales.minmax()
  assert presets.int4().per == 'channel'
  assert presets.int3().bits == 3


def test_every_fixed_format_has_a_factory():
  for name in formats.names():
    if not name.startswith(('codebook', 'odd', 'pow2', 'dynamic', 'udynamic')):
      assert getattr(presets, name)().format is formats.get(name)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'per': 'channel', 'group': 32},
      "int4 got two granularities at once: per='channel' and group=32",
    ),
    ({'group': 32, 'block': (8, 8)}, 'two granularities at once'),
    ({'per': 'row'}, "per='row' is not one of"),
    ({'group': 0}, 'positive integer, found 0'),
    ({'group': 32.0}, 'positive integer, found 32.0'),
    ({'block': (8, 8, 8)}, 'two positive integers'),
    ({'block': (8, -1)}, 'two positive integers'),
    ({'ragged': True}, 'ragged=True needs group= or block='),
    ({'scale_format': 'float16'}, "scale_format='float16' is not one of"),
    ({'exponent': 'up'}, "exponent='up' is not one of"),
    ({'rounding': 'floor'}, "rounding='floor' is not one of"),
    ({'narrow': True, 'symmetric': False}, 'narrow=True needs a symmetric'),
    (
      {'symmetric': False, 'scale': scales.absmax()},
      r'absmax\(\) ignores the sign',
    ),
    ({'scale': scales.absmean()}, 'sets the scale of ternary'),
    ({'format': 'nf4', 'symmetric': False}, 'nf4 has no zero point'),
    ({'format': 'ternary', 'symmetric': False}, 'ternary has no zero point'),
    ({'format': 'uint4', 'narrow': True}, 'narrow=True needs a symmetric'),
    ({'format': 'codebook_4', 'group': 32}, 'learns one table per='),
    ({'format': 'codebook_4', 'scale': scales.mse()}, 'its scale is absmax'),
    ({'format': 'int44'}, "did you mean 'int4'"),
  ],
)
def test_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Quantizer(**{'format': 'int4', **fields})


def test_refused_types():
  with pytest.raises(TypeError, match=r'takes a range rule.*found .mse.'):
    presets.int4(scale='mse')
  with pytest.raises(TypeError, match='unexpected keyword'):
    presets.int4(groups=32)
  with pytest.raises(ValueError, match="takes element='e4m3' or 'e5m2'"):
    presets.mxfp8(element='e3m2')
  with pytest.raises(ValueError, match='found bits=9'):
    presets.codebook(bits=9)


def test_from_json_refuses_what_it_does_not_know():
  data = presets.int4().to_json()
  with pytest.raises(ValueError, match=r"unknown fields.*'colour'"):
    Quantizer.from_json({**data, 'colour': 1})
  with pytest.raises(ValueError, match='unknown range rule'):
    Quantizer.from_json({**data, 'scale': {'rule': 'best'}})
  with pytest.raises(ValueError, match='unknown format'):
    Quantizer.from_json({**data, 'format': 'int99x'})


def test_json_needs_a_registered_format():
  custom = formats.Integer('int4_mine', 4)
  with pytest.raises(ValueError, match='unknown format'):
    Quantizer(custom).to_json()


def test_indivisible_group_message():
  """The wording of design.md, 'Errors'."""
  with pytest.raises(ValueError) as caught:
    presets.int4(group=128).check(96, 50257, 'params/head/kernel')
  assert str(caught.value) == (
    "int4(group=128) does not divide 'params/head/kernel' along its "
    'contraction axis: shape=(96, 50257), axis=-2. Use group=32 (divides 96), '
    'group=128 with ragged=True (a shorter last group), or None for '
    "'.*/head/.*'."
  )


@pytest.mark.parametrize(
  ('q', 'k', 'n', 'where', 'parts'),
  [
    (presets.int4(group=32), 172, 8, 'x/w', ['group=4 (divides 172)']),
    (presets.int4(group=64), 97, 8, 'x/w', ["per='channel'"]),
    (presets.int4(group=30), 45, 8, 'x/w', ['group=15 (divides 45)']),
    (
      presets.int4(block=(32, 32)),
      64,
      48,
      'layers/3/w',
      ['block=(32, 16) (16 divides 48)', 'output axis', "'.*/layers/3/.*'"],
    ),
    (
      presets.int4(block=(32, 32)),
      40,
      64,
      'the weight',
      ['block=(8, 32) (8 divides 40)', 'ragged=True'],
    ),
  ],
)
def test_indivisible_choices(q, k, n, where, parts):
  with pytest.raises(ValueError) as caught:
    q.check(k, n, where)
  for part in parts:
    assert part in str(caught.value)
  dataclasses.replace(q, ragged=True).check(k, n, where)


def test_quantizers_sort_in_sets_and_replace():
  a, b = presets.int4(group=32), presets.int4(group=32)
  assert len({a, b}) == 1
  assert dataclasses.replace(a, group=64) == presets.int4(group=64)
  with pytest.raises(dataclasses.FrozenInstanceError):
    a.group = 3


@pytest.mark.parametrize(
  ('fields', 'error', 'message'),
  [
    ({'symmetric': 'no'}, TypeError, "symmetric takes True or False.*'no'"),
    ({'symmetric': None}, TypeError, 'symmetric takes True or False.*None'),
    ({'static': 1}, TypeError, 'static takes True or False, found 1'),
    ({'narrow': 'x'}, TypeError, "narrow takes True or False, found 'x'"),
    ({'group': 4, 'ragged': 1}, TypeError, 'ragged takes True or False'),
    ({'block': 4}, ValueError, 'two positive integers, found 4'),
    ({'block': 'ab'}, ValueError, "two positive integers, found 'ab'"),
    ({'format': 8}, TypeError, "by its name, such as 'int8', found 8"),
    ({'format': None}, TypeError, 'by its name, .* found None'),
  ],
)
def test_refused_fields_of_another_type(fields, error, message):
  with pytest.raises(error, match=message):
    Quantizer(**{'format': 'int4', **fields})


@pytest.mark.parametrize('bits', ['3', 2.5, None])
@pytest.mark.parametrize('make', [presets.codebook, presets.pow2])
def test_refused_widths(make, bits):
  with pytest.raises(ValueError, match=f'bits, found bits={bits!r}'):
    make(bits=bits)
