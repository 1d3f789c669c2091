r"""stories260K, a tiny Llama, perplexity on TinyStories.

  QUANTLAB_DATA=... python -m experiments.ptq \
    --config=configs/ptq/stories.py --workdir=runs/stories

Float 4.505. Expect +0.2 % for W8A8 dynamic and +7.0 % for W4 in groups of 32
with the embedding at 8 bits.
"""

import ml_collections

INT8_TOKEN = {'format': 'int8', 'per': 'token'}
W4 = {
  'format': 'int4',
  'group': 32,
  'ragged': True,
  'symmetric': False,
  'scale': {'rule': 'mse', 'p': 2.4},
}


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.calibration = 0  # examples; 0: the workload's own choice
  config.evaluation = 0  # 0: all
  config.models = ('stories',)
  config.variants = (
    {
      'name': 'w8a8_dynamic',
      'rules': (
        ('/embed/', {'weight': {'format': 'int8'}}),
        ('.*', {'weight': {'format': 'int8'}, 'input': INT8_TOKEN}),
      ),
    },
    {
      'name': 'w4_group32',
      'rules': (
        ('/embed/', {'weight': {'format': 'int8'}}),
        ('.*', {'weight': W4}),
      ),
    },
  )
  return config
