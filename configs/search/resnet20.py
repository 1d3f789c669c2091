r"""Mixed precision of CIFAR-10 ResNet-20: weights of 2 to 8 bits, per channel.

  QUANTLAB_DATA=... python -m experiments.sensitivity \
    --config=configs/search/resnet20.py --workdir=runs/search_resnet20
  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/resnet20.py --workdir=runs/search_resnet20

Tables on 500 test images (derivatives on 250), choices judged on 1,000 others.
The exact Hessian's interactions are left out for their time: one product of
the Hessian for each of its 100 options (add 'hessian' to `interactions`).
"""

from configs.search import common


def get_config():
  config = common.base('resnet20_jpeg')
  config.calibration = 512
  config.curved = 1
  config.judged = 6
  config.interactions = ('loss', 'kl')
  config.iterations = 4
  return config
