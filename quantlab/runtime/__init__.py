"""What the launchers share: folders, numbers, progress, checkpoints."""

from quantlab.runtime.checkpoint import CheckpointError as CheckpointError
from quantlab.runtime.interrupt import interruptible as interruptible
from quantlab.runtime.manifest import environment as environment
from quantlab.runtime.manifest import fingerprint as fingerprint
from quantlab.runtime.mesh import make_mesh as make_mesh
from quantlab.runtime.progress import track as track
from quantlab.runtime.saves import Saves as Saves
from quantlab.runtime.training import DivergedError as DivergedError
from quantlab.runtime.usage import peak_bytes as peak_bytes
from quantlab.runtime.usage import timed as timed
from quantlab.runtime.workdir import Workdir as Workdir
from quantlab.runtime.workdir import WorkdirError as WorkdirError
from quantlab.runtime.workdir import check_owner as check_owner
from quantlab.runtime.workdir import make_writable as make_writable
