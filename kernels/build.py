"""`python -m quantlab_kernels.build`: compiles the cpu kernels ahead of use.

For images without a compiler at run time: build where there is one, with
QUANTLAB_CACHE naming a folder that goes with the image.
"""

from quantlab_kernels.cpu import build

if __name__ == '__main__':
  build.main()
