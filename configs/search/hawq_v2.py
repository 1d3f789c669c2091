r"""Mixed precision of CIFAR-10 ResNet-20 by traces of the Hessian (HAWQ-V2).

  QUANTLAB_DATA=... python -m experiments.search \
    --config=configs/search/hawq_v2.py --workdir=runs/search_hawq_v2

The mean of the trace of a site's Hessian block, by Hutchinson's estimator with
its standard error, times the squared error of its weight; the exact choice
within a budget, a point of the paper's Pareto front (arXiv 1911.03852).
"""

from configs.search import common, resnet20


def get_config():
  return common.by(resnet20.get_config(), 'trace', 'dp')
