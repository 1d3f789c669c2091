r"""Mixed precision of ResNet-8: weights of 2 to 8 bits, per channel.

  QUANTLAB_DATA=... python -m experiments.sensitivity \
    --config=configs/search/resnet8.py --workdir=runs/search_resnet8
  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/resnet8.py --workdir=runs/search_resnet8

Tables on 500 test images (derivatives on 250), choices judged on 2,500 others.
"""

from configs.search import common


def get_config():
  config = common.base('resnet8')
  config.calibration = 512
  config.curved = 250
  config.judged = 12
  return config
