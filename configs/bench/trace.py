r"""Cost of tracing, compiling and calibrating, beside float and qwix.

  pip install -e '.[bench]'
  python -m experiments.bench --config=configs/bench/trace.py \
    --workdir=runs/trace

Three minutes on two cores (jax 0.10.2). Ratios to expect: identity rewrite 1.05
to 1.15 of the float trace (0.03 to 0.07 once traced), W8A8 trace and compile
0.96 to 1.02 of qwix 0.1.8, a pass for absmax ranges 1.1 to 1.2 of the forward
pass.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  return config_dict.ConfigDict(
    {
      'benchmark': 'trace',
      'seed': 0,
      'model': {
        'blocks': 24,
        'dim': 256,
        'heads': 4,
        'vocab': 256,
        'length': 64,
        'batch': 4,
      },
      'images': 64,  # of a calibration batch of ResNet-20
      'batches': 4,  # of a calibration pass
      'rounds': {'trace': 11, 'compile': 15, 'calibration': 15},
      # Largest ratios: identity to float, W8A8 to qwix, pass to forward.
      'limits': {'trace': 1.2, 'compile': 1.0, 'calibration': 1.3},
    }
  )
