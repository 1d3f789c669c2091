"""Quality with its spread: metrics, evaluation, comparison with float."""

from quantlab.quality.estimate import Estimate as Estimate
from quantlab.quality.evaluate import NonFiniteError as NonFiniteError
from quantlab.quality.evaluate import assess as assess
from quantlab.quality.evaluate import compare as compare
from quantlab.quality.evaluate import evaluate as evaluate
from quantlab.quality.flat import flat as flat
from quantlab.quality.functions import agreement as agreement
from quantlab.quality.functions import correct as correct
from quantlab.quality.functions import cosine as cosine
from quantlab.quality.functions import cross_entropy as cross_entropy
from quantlab.quality.functions import kl_divergence as kl_divergence
from quantlab.quality.functions import similarity_error as similarity_error
from quantlab.quality.functions import spearman as spearman
from quantlab.quality.functions import sqnr as sqnr
from quantlab.quality.metric import Metric as Metric
from quantlab.quality.metric import classification as classification
from quantlab.quality.metric import language_model as language_model
from quantlab.quality.metric import sentence_pairs as sentence_pairs
from quantlab.quality.metric import unlabelled as unlabelled
