"""A word about an alpha that does not suit the metric loss: it belongs to the scale of that."""

import logging
import math

from gcahng.generation.interpolation import SMALLEST_MEAN_LOSS, Interpolation
from gcahng.training.averages import EpochAverages
from gcahng.training.config_schema import Config

# A factor beyond these says the same for any coefficients; our choice.
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-6, 0.999
# The papers' alpha is 5 for NP+, whose loss is about 3: their ratio, rounded.
ALPHA_PER_LOSS = 1.7

log = logging.getLogger(__name__)


class PullHint:
    """Closes the epochs of a run, and warns once if the pull factor exp(-alpha / mean metric loss) says nothing."""

    def __init__(self, config: Config) -> None:
        self._metric = config.loss.metric
        self._alpha = config.generation.alpha
        # An alpha of 0 is meant to leave the coefficients as they are.
        self._silent = not config.generation.enabled or self._alpha == 0

    def end_epoch(self, averages: EpochAverages, epoch: int) -> None:
        """Close an epoch's averages.

        Args:
            averages: With the mean that was in force in the epoch.
            epoch: Its number, from 0; in the first one every alpha has a factor of about 1.
        """
        mean = averages.metric_loss
        factor = Interpolation(self._alpha, mean).factor
        averages.end_epoch()
        if self._silent or epoch == 0 or SMALLEST_FACTOR <= factor <= LARGEST_FACTOR:
            return
        self._silent = True
        effect = (
            "every synthetic negative lies as near as its positive, whatever its pull coefficients"
            if factor < SMALLEST_FACTOR
            else "alpha has no effect on the synthetic negatives"
        )
        advice = (
            f"The papers' alpha is about {ALPHA_PER_LOSS} times the mean loss, here "
            f"generation.alpha={ALPHA_PER_LOSS * mean:.2g}"
            if mean > SMALLEST_MEAN_LOSS and not math.isclose(mean, SMALLEST_MEAN_LOSS)
            else "No alpha suits a loss that is 0 or below"
        )
        log.warning(
            f"generation.alpha={self._alpha:g} does not suit loss.metric={self._metric}: with the mean metric loss of "
            f"the epoch before, {mean:.3g}, the pull factor exp(-alpha / mean) was {factor:.3g} in epoch {epoch + 1}, "
            f"so that {effect}. {advice}."
        )
