r"""A small CNN on scikit-learn's handwritten digits.

  python -m experiments.testbed --config=configs/testbeds/digits.py \
    --out=tests/data/digits_model.npz

Ten seconds on two cores; 98.6 to 99.2 % of 500 held-out images, cross-entropy
0.025 to 0.05 (three seeds). The committed fixture was made by it.
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
