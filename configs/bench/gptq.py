r"""GPTQ of one large layer beside a PyTorch implementation, on the CPU.

  pip install -e '.[bench]'
  python -m experiments.bench --config=configs/bench/gptq.py \
    --workdir=runs/bench_gptq

Two minutes on two cores.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  return config_dict.ConfigDict(
    {
      'benchmark': 'second_order',
      'seed': 0,
      'sizes': (1024, 4096),
      'group': 128,
      'rounds': 3,
      'limit': 0.5,  # of the peer's seconds
    }
  )
