"""Text as characters: what small language models are trained on."""

import functools
import pathlib
import sysconfig

import numpy as np

from quantlab.data import paths

VOCABULARY = 96  # printable ASCII and the newline
STORED = {
  'tinyshakespeare': 'text/tinyshakespeare_first90.txt',
  'wikitext2': 'text/wikitext2_valid.txt',
}
EMBEDDED = 'sources'


def encode(text: str) -> np.ndarray:
  """Printable ASCII and newlines as 0..95; other characters are left out."""
  codes = np.frombuffer(text.encode('ascii', 'ignore'), np.uint8)
  codes = codes[((codes >= 32) & (codes < 127)) | (codes == 10)]
  return np.where(codes == 10, 95, codes - 32).astype(np.uint8)


def decode(codes: np.ndarray) -> str:
  """The text of codes 0..95."""
  codes = np.asarray(codes, np.uint8)
  return (
    np.where(codes == 95, 10, codes + 32).astype(np.uint8).tobytes().decode()
  )


def sources(count: int) -> list[np.ndarray]:
  """The first modules of the standard library, each as codes.

  They differ between Python versions; nothing else is at hand everywhere.
  """
  folder = pathlib.Path(sysconfig.get_path('stdlib'))
  files = sorted(folder.glob('*.py'))[:count]
  return [encode(f.read_text(errors='ignore')) for f in files]


@functools.lru_cache(maxsize=4)
def characters(name: str) -> np.ndarray:
  """A text as codes, uint8 (n,).

  Args:
    name: 'tinyshakespeare' or 'wikitext2', of the shared folder; or
      'sources', the first sixty modules of the standard library.

  Raises:
    ValueError: an unknown text.
    FileNotFoundError: the shared folder, or the text in it, is absent.
  """
  if name == EMBEDDED:
    found = np.concatenate(sources(60))
  elif name in STORED:
    found = encode(paths.require(STORED[name]).read_text(encoding='utf-8'))
  else:
    known = ', '.join((*STORED, EMBEDDED))
    raise ValueError(f'Unknown text {name!r}; known: {known}.')
  found.setflags(write=False)  # the cached array is shared by all callers
  return found


class Windows:
  """Every stretch of `length` codes of a text, as rows to draw batches from.

  A row is (its codes, the codes that follow each): two (length,) int32.
  """

  def __init__(self, codes: np.ndarray, length: int, stride: int = 1):
    """Reads nothing yet.

    Args:
      codes: (n,), more than `length` of them.
      length: codes a row.
      stride: codes from the start of one row to that of the next.
    """
    if len(codes) <= length:
      raise ValueError(
        f'A row of {length} codes and the one after it do not fit into a text '
        f'of {len(codes)}; take a longer text or a shorter row.'
      )
    self._codes, self._length, self._stride = codes, length, stride

  def __len__(self) -> int:
    return (len(self._codes) - self._length - 1) // self._stride + 1

  def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows (b, length), and their successors."""
    at = index[:, None] * self._stride + np.arange(self._length + 1)
    rows = self._codes[at].astype(np.int32)
    return rows[:, :-1], rows[:, 1:]


def split(codes: np.ndarray, held_out: float = 0.1) -> tuple[np.ndarray, ...]:
  """The text but for its end, to train on, and its end, to judge by."""
  if not 0 < held_out < 1:
    raise ValueError(f'{held_out=}: expected a share between 0 and 1.')
  cut = round(len(codes) * (1 - held_out))
  return codes[:cut], codes[cut:]
