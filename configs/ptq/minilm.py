r"""MiniLM-L6 sentence embeddings on STS-B dev.

  QUANTLAB_DATA=... python -m experiments.ptq \
    --config=configs/ptq/minilm.py --workdir=runs/minilm

Float Spearman 0.8672. Expect 0.8658 and a similarity error of 0.73 for W8A8
dynamic, 2.8 for W4 in groups of 64.
"""

import ml_collections

INT8_TOKEN = {'format': 'int8', 'per': 'token'}


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.calibration = 0  # examples; 0: the workload's own choice
  config.evaluation = 0  # 0: all
  config.models = ('minilm',)
  config.variants = (
    {
      'name': 'w8a8_dynamic',
      'rules': (('.*', {'weight': {'format': 'int8'}, 'input': INT8_TOKEN}),),
    },
    {
      'name': 'w4_group64',
      'rules': (
        ('/embed/', None),
        (
          '/kernel$',
          {'weight': {'format': 'int4', 'group': 64, 'symmetric': False}},
        ),
      ),
    },
  )
  return config
