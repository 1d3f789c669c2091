r"""Mixed precision of the small CNN on digits.

  python -m experiments.sensitivity \
    --config=configs/search/digits.py --workdir=runs/search_digits
  python -m experiments.search \
    --config=configs/search/digits.py --workdir=runs/search_digits

Downloads nothing. A few minutes on two cores.
"""

from configs.search import common


def get_config():
  config = common.base('digits_cnn')
  config.seeds = 1
  return config
