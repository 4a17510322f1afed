"""Forgetting: what is to be remembered instead, which parameters the rest hangs on, and whether anything is left."""

from fedsim.forgetting.fisher import Evidence, empirical_fisher, importance, pull, pulled, together, true_fisher
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
from fedsim.forgetting.memory import (
    NEED_BEFORE,
    Memory,
    debiased,
    forbidden,
    forgetting_losses,
    fresh,
    masked,
    memories,
    new_memories,
)
from fedsim.forgetting.requests import at_hand, gone_with, kept, remaining

__all__ = [
    "NEED_BEFORE",
    "Apart",
    "Evidence",
    "Memory",
    "Shadows",
    "at_hand",
    "auc",
    "debiased",
    "empirical_fisher",
    "forbidden",
    "forgetting_losses",
    "fresh",
    "gone_with",
    "importance",
    "kept",
    "likelihood_ratio",
    "log_odds",
    "loss_threshold",
    "masked",
    "memories",
    "new_memories",
    "predictions_apart",
    "pull",
    "pulled",
    "remaining",
    "together",
    "train_shadows",
    "true_fisher",
]
