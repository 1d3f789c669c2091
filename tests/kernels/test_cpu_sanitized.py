"""The C++ kernels under the address and undefined-behaviour sanitizers.

check.cc runs random products and convolutions (shapes, widths, groups,
alignments, threads that start late) against plain loops, each operand in an
allocation of its own size.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess

import pytest

from quantlab_kernels.cpu import build

pytestmark = pytest.mark.usefixtures('cpu_kernels')
HERE = pathlib.Path(__file__).parent
CHECKED = [HERE / name for name in ('check.cc', 'check.h', 'check_conv.h')]
# Of undefined behaviour what can depend on operands; all of it runs clean too,
# and takes five times as long to compile. Small tiles and no optimization, for
# the same reason.
CHECKS = 'bounds,shift,signed-integer-overflow,integer-divide-by-zero'
FLAGS = ('-O0', '-std=c++17', '-pthread', f'-fsanitize=address,{CHECKS}')
FLAGS = (*FLAGS, '-fno-sanitize-recover=all', '-w', '-DQL_ROWS=2')
FLAGS = (*FLAGS, '-I', str(build.SOURCE), '-I', str(HERE))
ISAS = ('avx2', 'avx512vnni', 'amx')
CASES = 40


@pytest.fixture
def check(tmp_path):
  """The program, kept next to the library while nothing of it changes."""
  digest = hashlib.sha256((build.key() + repr(FLAGS)).encode())
  for path in CHECKED:
    digest.update(path.read_bytes())
  kept = build.folder() / f'check-{digest.hexdigest()[:32]}'
  if kept.exists():
    return kept
  cxx, _ = build.compiler()
  objects = {'check': (CHECKED[0], [f'-DQL_{isa.upper()}' for isa in ISAS])}
  for name in (*ISAS, 'conv_avx2', 'conv_avx512vnni'):
    source, flags = build.OBJECTS[name]
    objects[name] = (build.SOURCE / source, flags)
  running = [
    subprocess.Popen(
      [cxx, *FLAGS, *flags, '-c', str(source), '-o', str(tmp_path / name)]
    )
    for name, (source, flags) in objects.items()
  ]
  codes = [p.wait() for p in running]
  assert not any(codes)
  program = tmp_path / 'program'
  linked = subprocess.run(
    [cxx, *FLAGS, *(str(tmp_path / n) for n in objects), '-o', str(program)],
    capture_output=True,
    text=True,
    check=False,
  )
  if linked.returncode:
    pytest.skip(f'no sanitizers here: {linked.stderr[-300:]}')
  shutil.copy(program, kept.with_suffix(f'.{os.getpid()}'))
  os.replace(kept.with_suffix(f'.{os.getpid()}'), kept)
  return kept


def test_random_products_run_clean(check):
  done = subprocess.run(
    [str(check), str(CASES)], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
  assert done.stdout == 'good\n'
