"""Data: embedded digits, sets on disk through tensorflow-datasets, batches."""

from quantlab.data.batches import Batches as Batches
from quantlab.data.builder import data_source as data_source
from quantlab.data.builder import npz_builder as npz_builder
from quantlab.data.draws import Draws as Draws
from quantlab.data.draws import crop_and_flip as crop_and_flip
from quantlab.data.draws import iterator as iterator
from quantlab.data.embedded import Digits as Digits
from quantlab.data.embedded import digits as digits
from quantlab.data.npz import load_npz as load_npz
from quantlab.data.paths import cache_dir as cache_dir
from quantlab.data.paths import require as require
from quantlab.data.paths import shared_dir as shared_dir
from quantlab.data.sets import load_set as load_set
