"""Forgetting: what is to be remembered instead, and which parameters the rest of the memory hangs on."""

from fedsim.forgetting.fisher import Evidence, empirical_fisher, importance, pulled, true_fisher
from fedsim.forgetting.membership import (
    Apart,
    Shadows,
    auc,
    likelihood_ratio,
    log_odds,
    loss_threshold,
    predictions_apart,
    train_shadows,
)
from fedsim.forgetting.memory import debiased, fresh, masked, new_memories

__all__ = [
    "Apart",
    "Evidence",
    "Shadows",
    "auc",
    "debiased",
    "empirical_fisher",
    "fresh",
    "importance",
    "likelihood_ratio",
    "log_odds",
    "loss_threshold",
    "masked",
    "new_memories",
    "predictions_apart",
    "pulled",
    "train_shadows",
    "true_fisher",
]
