r"""A W4A8 training step beside the float step, and beside qwix's.

  pip install -e '.[bench]'
  python -m experiments.bench --config=configs/bench/qat.py \
    --workdir=runs/qat_step

About two minutes on two cores. A step with learned ranges (LSQ) is held to
1.35 times the float step and to the step of qwix.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  return config_dict.ConfigDict(
    {
      'benchmark': 'training',
      'seed': 0,
      'model': {
        'blocks': 4,
        'dim': 128,
        'heads': 4,
        'vocab': 96,
        'length': 128,
        'batch': 16,
      },
      'images': 128,
      'rounds': 15,
      'limits': {'float': 1.35, 'qwix': 1.0},
    }
  )
