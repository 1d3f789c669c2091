r"""Settings of one 8-bit quantization of ResNet-8, tuned as Quantune does.

  QUANTLAB_DATA=... python -m experiments.tune \
    --config=configs/search/quantune.py --workdir=runs/quantune \
    --storage=runs/quantune.journal --trials=24

The 96 settings of arXiv 2202.05048: three calibration sets, four schemes, two
ways to clip, two granularities, first and last layer quantized or not. Eight
bits lose so little on ResNet-8 that settings differ by less than the images
measure: `quantune.py:4` has the same settings at four.
"""

import ml_collections


def _both(**fields):
  return {'weight': fields, 'input': fields}


def get_config(bits: str = '8'):
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.calibration = 0  # set by each trial
  config.evaluation = 0  # 0: all
  config.batch_size = 0  # 0: the workload's own
  config.model = 'resnet8'
  config.batches = 4  # labelled, that settings are measured on
  config.sampler = 'predicted'
  config.first = 8  # trials of a Sobol design, before predictions
  config.settings = {
    'images': {str(n): {'calibration': n} for n in (50, 250, 500)},
    'scheme': {
      'asymmetric': _both(format=f'int{bits}', symmetric=False),
      'symmetric': _both(format=f'int{bits}'),
      'symmetric, unsigned': {
        'weight': {'format': f'int{bits}'},
        'input': {'format': f'uint{bits}'},
      },
      'power of two': _both(format=f'int{bits}', scale_format='pow2'),
    },
    'clipping': {
      'none': {},
      'divergence': {'input': {'scale': {'rule': 'kl'}}},
    },
    'granularity': {
      kind: {
        'weight': {'per': kind},
        'input': {'per': 'tensor', 'static': True},
      }
      for kind in ('tensor', 'channel')
    },
    'ends': {'quantized': {}, 'float': {'float': ('^/stem/', '^/head/')}},
  }
  return config
