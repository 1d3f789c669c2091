"""Convolutions of real models, shared by tests and benchmarks."""

from typing import NamedTuple


class Spec(NamedTuple):
  """One convolution in NHWC and HWIO layouts."""

  x: tuple[int, int, int, int]
  w: tuple[int, int, int, int]
  strides: tuple[int, int] = (1, 1)
  padding: str = 'SAME'
  groups: int = 1


SPECS = {
  'resnet20_stem': Spec((64, 32, 32, 3), (3, 3, 3, 16)),
  'resnet20_stage1': Spec((64, 32, 32, 16), (3, 3, 16, 16)),
  'resnet20_down2': Spec((64, 32, 32, 16), (3, 3, 16, 32), (2, 2)),
  'resnet20_stage2': Spec((64, 16, 16, 32), (3, 3, 32, 32)),
  'resnet20_stage3': Spec((64, 8, 8, 64), (3, 3, 64, 64)),
  'resnet20_shortcut': Spec((64, 32, 32, 16), (1, 1, 16, 32), (2, 2)),
  'mobilenet025_stem': Spec((64, 96, 96, 3), (3, 3, 3, 8), (2, 2)),
  'mobilenet025_dw1': Spec((64, 48, 48, 8), (3, 3, 1, 8), groups=8),
  'mobilenet025_dw3': Spec((64, 24, 24, 32), (3, 3, 1, 32), groups=32),
  'mobilenet025_dw4': Spec((64, 24, 24, 32), (3, 3, 1, 32), (2, 2), groups=32),
  'mobilenet025_dw7': Spec((64, 6, 6, 128), (3, 3, 1, 128), groups=128),
  'mobilenet025_pw2': Spec((64, 48, 48, 8), (1, 1, 8, 16)),
  'mobilenet025_pw7': Spec((64, 6, 6, 128), (1, 1, 128, 128)),
  'lenet5_conv1': Spec((64, 28, 28, 1), (5, 5, 1, 6)),
  'resnet50_stem': Spec((8, 224, 224, 3), (7, 7, 3, 64), (2, 2)),
  'vit_patches': Spec((8, 224, 224, 3), (16, 16, 3, 192), (16, 16), 'VALID'),
}
