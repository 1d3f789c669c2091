r"""Cost of tracing, compiling and calibrating, beside float and qwix.

  pip install -e '.[bench]'
  python -m experiments.bench --config=configs/bench/trace.py \
    --workdir=runs/trace

Ratios to expect: @TO_FILL@
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  return config_dict.ConfigDict(
    {
      'benchmark': 'trace',
      'seed': 0,
      'model': {
        'blocks': 24,
        'dim': 256,
        'heads': 4,
        'vocab': 256,
        'length': 64,
        'batch': 4,
      },
      'images': 64,  # of a calibration batch of ResNet-20
      'batches': 4,  # of a calibration pass
      'rounds': {'trace': 11, 'compile': 5, 'calibration': 15},
      # Largest ratios: identity to float, W8A8 to qwix, pass to forward.
      'limits': {'trace': 1.2, 'compile': 1.0, 'calibration': 1.3},
    }
  )
