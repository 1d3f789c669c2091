"""Packaging of quantlab and of its kernel package quantlab_kernels."""

import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent

# What the main job needs, pictures and embedded data included.
INSTALL = [
  'absl-py',
  'array-record',
  'flax>=0.12',
  'grain>=0.2.18',
  'jax>=0.10',
  'jaxtyping>=0.3',
  'matplotlib>=3.9',
  'ml-collections>=1.1',
  'numpy>=2.0',
  'optax>=0.2.8',
  'orbax-checkpoint>=0.12',
  'rich>=13',
  'scikit-learn>=1.5',
  'scipy>=1.13',
  'tensorboardX>=2.6',
  'tensorflow-datasets>=4.9.10',
]
EXTRAS = {
  'gpu': ['jax[cuda13]', 'jax-triton>=0.3.1'],
  'search': ['optuna>=5', 'threadpoolctl>=3.5'],
  'interop': ['safetensors>=0.6'],
  'bench': ['onnx>=1.16', 'onnxruntime>=1.20', 'qwix>=0.1.8', 'torch>=2.5'],
  'llama': ['gguf>=0.10', 'llama-cpp-python>=0.3'],
  'test': [
    'beartype',
    'dm-haiku>=0.0.17',
    'equinox>=0.13',
    'hypothesis',
    'import-linter>=2',
    'ipykernel>=6',
    'jupytext>=1.17',
    'mypy>=1.15',
    'nbclient>=0.10',
    'nbformat>=5.10',
    'optuna>=5',
    'pytest>=8',
    'pytest-xdist>=3.6',
    'ruff>=0.12',
    'threadpoolctl>=3.5',
  ],
}

# The kernel core lives in kernels/ and is imported as quantlab_kernels: it
# depends on nothing of quantlab and may be used alone.
PACKAGES = setuptools.find_packages(ROOT, include=['quantlab', 'quantlab.*'])
KERNELS = [
  'quantlab_kernels' + p.removeprefix('kernels')
  for p in setuptools.find_packages(ROOT, include=['kernels', 'kernels.*'])
]

setuptools.setup(
  name='quantlab',
  version='0.1.0',
  description='Quantization of JAX programs: functional transforms on '
  'parameter pytrees and apply functions',
  long_description=(ROOT / 'README.md').read_text(encoding='utf-8')
  if (ROOT / 'README.md').exists()
  else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=PACKAGES + KERNELS,
  package_dir={'quantlab_kernels': 'kernels'},
  package_data={
    'quantlab': ['py.typed'],
    'quantlab_kernels': ['py.typed', 'crossover.json', 'cpu/source/*'],
  },
  install_requires=INSTALL,
  extras_require=EXTRAS,
)
