r"""Seconds of the products of a model in every format of its search.

  python -m experiments.bench --config=configs/bench/latency.py:stories \
    --workdir=runs/latency_stories
  python -m experiments.search --config=configs/search/stories.py \
    --config.latency=runs/latency_stories/bench.json --config.cost=latency \
    --workdir=runs/search_stories_latency

The second command divides a budget of seconds instead of bytes: those of the
uniform formats. The word after the colon is a config of configs/search.
"""

import importlib

from ml_collections import config_dict


def get_config(which: str = 'stories') -> config_dict.ConfigDict:
  """The products of the model of one search config."""
  chosen = importlib.import_module(f'configs.search.{which}').get_config()
  if 'model' not in chosen:
    raise ValueError(f'the search config {which!r} has no model to measure')
  return config_dict.ConfigDict(
    {
      'benchmark': 'latency',
      'seed': 0,
      'search': chosen,
      'rotate': 2**27,  # bytes of float weights, past the caches,
      'copies': 16,  # in at most so many
      'rounds': 7,
    }
  )
