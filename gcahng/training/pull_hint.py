"""A word about an alpha or a beta that does not suit its loss: each belongs to the scale of one."""

import logging
import math

from gcahng.generation.interpolation import FIRST_EPOCH_MEAN_LOSS, SMALLEST_MEAN_LOSS, Interpolation
from gcahng.training.averages import EpochAverages
from gcahng.training.config_schema import Config

# A factor beyond these says the same for any coefficients; our choice.
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-6, 0.999
# The papers' alpha is 5 for NP+, whose loss is about 3: their ratio, rounded.
ALPHA_PER_LOSS = 1.7
# With less weight the synthetic loss teaches next to nothing; our choice. In the papers' settings it is above 0.05.
SMALLEST_TRUST = 0.01

log = logging.getLogger(__name__)


class PullHint:
    """Closes the epochs of a run; warns of a pull factor that says nothing, and of a trust weight that is next to none.

    Once each. The factor is exp(-alpha / mean metric loss), the weight 1 - exp(-beta / mean generation loss).
    """

    def __init__(self, config: Config) -> None:
        self._metric = config.loss.metric
        self._alpha = config.generation.alpha
        # An alpha of 0 is meant to leave the coefficients as they are.
        self._silent = not config.generation.enabled or self._alpha == 0
        self._beta = config.generation.beta
        self._by_generator = config.generation.method == "generator"
        # A beta of 0 is meant to leave the synthetic loss out.
        self._trust_silent = not config.generation.enabled or self._beta == 0

    def end_epoch(self, averages: EpochAverages, epoch: int) -> None:
        """Close an epoch's averages.

        Args:
            averages: With the mean that was in force in the epoch.
            epoch: Its number, from 0; in the first one every alpha has a factor of about 1.
        """
        if epoch > 0:
            self._check_trust(averages.generation_loss, epoch)
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

    def _check_trust(self, mean: float, epoch: int) -> None:
        """Warn if the mean generation loss that was in force makes the synthetic loss weigh next to nothing."""
        weight = -math.expm1(-self._beta / max(mean, SMALLEST_MEAN_LOSS))
        if self._trust_silent or mean == FIRST_EPOCH_MEAN_LOSS or weight >= SMALLEST_TRUST:
            return
        self._trust_silent = True
        usual = "; HDML's generator has 5000 to 10000" if self._by_generator else ""
        log.warning(
            f"generation.beta={self._beta:g} does not suit the generation loss: with its mean of the epoch before, "
            f"{mean:.3g}, the weight 1 - exp(-beta / mean) of the synthetic loss was {weight:.3g} in epoch "
            f"{epoch + 1}, so that synthetic negatives teach the metric model next to nothing. A beta is of the order "
            f"of that mean{usual}."
        )
