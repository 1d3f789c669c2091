r"""Cost of a search on ResNet-20: table, Hessian products, population of plans.

  python -m experiments.bench --config=configs/bench/search.py \
    --workdir=runs/search_cost

Three minutes on two cores. Of the loop that compiles each entry anew `compiled`
entries are run, and their time is scaled to all of them.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  return config_dict.ConfigDict(
    {
      'benchmark': 'search',
      'seed': 0,
      'model': {'blocks': 3, 'widths': (16, 32, 64)},  # ResNet-20
      'images': {'table': 32, 'probes': 64, 'population': 32},
      'widths': (2, 3, 4, 6, 8),
      'compiled': 3,
      'probes': 64,
      'plans': 32,
      'rounds': {'table': 3, 'probes': 3, 'population': 7},
      # Largest ratios: to the loop, to forward passes, to sequential calls.
      'limits': {'table': 0.1, 'probes': 6.0, 'population': 1.1},
    }
  )
