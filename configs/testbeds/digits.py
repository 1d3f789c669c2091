r"""A small CNN on scikit-learn's handwritten digits.

  python -m experiments.testbed --config=configs/testbeds/digits.py \
    --out=tests/data/digits_model.npz

Seconds on two cores.
"""

import ml_collections


def get_config():
  return ml_collections.ConfigDict(
    {
      'bed': 'digits',
      'seed': 0,
      'model': {'widths': (16, 32, 32)},
      'training': {'epochs': 40, 'learning_rate': 1e-2},
    }
  )
