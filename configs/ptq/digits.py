r"""A small CNN and a small ViT on scikit-learn's handwritten digits.

  python -m experiments.ptq --config=configs/ptq/digits.py \
    --workdir=runs/digits

Trains both (seconds), quantizes each in ten variants; nothing is downloaded.
Expect 99 % (CNN) and 97 % (ViT) in float and at 8 bits, and less at 3 bits and
below.
"""

import ml_collections

INT8_TOKEN = {'format': 'int8', 'per': 'token'}
INT8_STATIC = {
  'format': 'int8',
  'per': 'tensor',
  'static': True,
  'symmetric': False,
}
FP8_TOKEN = {'format': 'fp8_e4m3', 'per': 'token'}


def _all(name, **roles):
  return {'name': name, 'rules': (('/kernel$', roles),)}


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.calibration = 0  # examples; 0: the workload's own choice
  config.evaluation = 0  # 0: all
  config.diagnosis = False  # histograms and causes, twice the time
  config.models = ('digits_cnn', 'digits_vit')
  config.variants = (
    _all('w8a8_static', weight={'format': 'int8'}, input=INT8_STATIC),
    _all('w8a8_dynamic', weight={'format': 'int8'}, input=INT8_TOKEN),
    _all('w4a16', weight={'format': 'int4', 'symmetric': False}),
    _all(
      'w4a8',
      weight={'format': 'int4', 'scale': {'rule': 'mse', 'p': 2.4}},
      input=INT8_TOKEN,
    ),
    _all('w3', weight={'format': 'int3', 'scale': {'rule': 'mse', 'p': 2.4}}),
    _all('fp8', weight={'format': 'fp8_e4m3'}, input=FP8_TOKEN),
    _all('mxfp4', weight={'format': 'mxfp4', 'ragged': True}),
    _all('nvfp4', weight={'format': 'nvfp4', 'ragged': True}),
    _all('nf4', weight={'format': 'nf4', 'group': 64, 'ragged': True}),
    _all('ternary', weight={'format': 'ternary'}),
  )
  return config
