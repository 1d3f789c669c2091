r"""QLoRA: MiniLM-L6 on STS-B, a 4-bit base with low-rank adapters.

  QUANTLAB_DATA=... python -m experiments.qat --config=configs/qat/qlora.py \
    --workdir=runs/qlora

The pretrained net, `full` fine-tuning of it in float, the NF4 base alone, and
adapters of rank 8 on it. Trained on the STS-B training pairs of at most 24
tokens, judged by Spearman's correlation on dev. `:codes` has adapters that are
4-bit codes themselves.
"""

import ml_collections

NF4 = (('/kernel$', {'weight': {'format': 'nf4', 'group': 64}}),)
STEPS = 100


def _optimizer(rate, **more):
  return {
    'name': 'adamw',
    'learning_rate': rate,
    'schedule': 'cosine',
    'warm_up': 0.1,
  } | more


def _qlora(name, steps=STEPS, rate=1e-3, **more):
  return {
    'name': name,
    'rules': NF4,
    'lora': {'pattern': '/kernel$', 'rank': 8, 'alpha': 16.0} | more,
    'steps': steps,
    'optimizer': _optimizer(rate),
  }


def get_config(which=''):
  config = ml_collections.ConfigDict()
  config.task = 'minilm_sts'
  config.model = ml_collections.ConfigDict({'longest': 24})
  config.seeds = (0, 1)
  config.vmap = False
  config.mesh = False
  config.batch_size = 16
  config.check_every = 50
  config.checked_batches = 8
  config.log_every = 10
  config.tokens = 0
  full = _optimizer(5e-5, weight_decay=0.01)
  config.float = ml_collections.ConfigDict({'steps': 0, 'optimizer': full})
  config.variants = (
    {'name': 'full', 'steps': STEPS, 'optimizer': full},
    _qlora('nf4', steps=0),
    _qlora('qlora'),
  )
  if which == 'codes':
    config.variants = (_qlora('qlora_4bit', bits=4),)
  return config
