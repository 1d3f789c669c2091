r"""Mixed precision of CIFAR-10 ResNet-20: weights of 2 to 8 bits, per channel.

  QUANTLAB_DATA=... python -m experiments.sensitivity \
    --config=configs/search/resnet20.py --workdir=runs/search_resnet20
  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/resnet20.py --workdir=runs/search_resnet20

Tables on 250 test images (derivatives on 64), choices judged on 750 others.
"""

from configs.search import common


def get_config():
  config = common.base('resnet20_jpeg')
  config.calibration = 512
  config.batches = 1
  config.curved = 64
  config.judged = 4
  config.iterations = 4
  return config
