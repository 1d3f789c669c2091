r"""int8 convolutions of real models on the CPU beside float32.

  python -m experiments.bench --config=configs/bench/conv_cpu.py \
    --workdir=runs/conv_cpu

Ratios are seconds over those of XLA's float32 convolution.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  return config_dict.ConfigDict(
    {
      'benchmark': 'conv',
      'seed': 0,
      'shapes': (
        *('resnet20_stem', 'resnet20_stage1', 'resnet20_down2'),
        *('resnet20_stage2', 'resnet20_stage3', 'resnet20_shortcut'),
        *('mobilenet025_stem', 'mobilenet025_dw1', 'mobilenet025_dw3'),
        *('mobilenet025_dw4', 'mobilenet025_dw7', 'mobilenet025_pw2'),
        *('mobilenet025_pw7', 'lenet5_conv1', 'resnet50_stem', 'vit_patches'),
      ),
      'batches': (1, 4, 16, 64, 256),
      'most': 2**25,  # bytes of images or results in float
      'rounds': 5,
      'implementations': ('cpu', 'xla'),  # the first has to be faster
    }
  )
