r"""Mixed precision of CIFAR-10 ResNet-20 by top eigenvalues (HAWQ).

  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/hawq_v1.py --workdir=runs/search_hawq_v1

Options are scored by the top eigenvalue of a site's Hessian block times the
squared error of its weight, and lowered greedily (arXiv 1905.03696, which
sets bits by hand in the order of eigenvalues over sizes).
"""

from configs.search import common, resnet20


def get_config():
  return common.by(resnet20.get_config(), 'eigenvalue', 'greedy')
