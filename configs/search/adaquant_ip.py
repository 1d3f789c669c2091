r"""Mixed precision of CIFAR-10 ResNet-20 by an integer program (AdaQuant).

  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/adaquant_ip.py --workdir=runs/search_adaquant_ip

The change of the loss from each site alone at each option, and the integer
program over their sum (arXiv 2006.10518, section 4).
"""

from configs.search import common, resnet20


def get_config():
  return common.by(resnet20.get_config(), 'loss', 'milp')
