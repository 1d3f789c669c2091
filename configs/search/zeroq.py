r"""Mixed precision of CIFAR-10 ResNet-20 without data (ZeroQ).

  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/zeroq.py --workdir=runs/search_zeroq

The table, and what GPTQ reads, are of 64 images that were distilled from the
statistics of the BatchNorms (arXiv 2001.00281); their labels are the float
model's. Choices are judged on the images of `resnet20.py`.
"""

from configs.search import resnet20


def get_config():
  config = resnet20.get_config()
  config.calibration = 0
  config.distilled = 64
  config.metrics = ('kl',)
  config.interactions = ('kl',)
  config.around = ()
  config.allocations = (
    ('kl', 'dp'),
    ('kl', 'quadratic'),
    ('kl.gptq', 'dp'),
    ('kl.gptq', 'quadratic'),
    ('kl', 'random'),
  )
  config.measured = ('kl', 'kl.gptq')
  config.seeds = 1
  return config
