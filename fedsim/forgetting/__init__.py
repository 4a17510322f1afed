"""Forgetting: what is to be remembered instead, and which parameters the rest of the memory hangs on."""

from fedsim.forgetting.fisher import Evidence, empirical_fisher, importance, pull, pulled, together, true_fisher
from fedsim.forgetting.memory import (
    NEED_BEFORE,
    Memory,
    debiased,
    forgetting_losses,
    fresh,
    masked,
    memories,
    new_memories,
)
from fedsim.forgetting.requests import at_hand, kept, remaining

__all__ = [
    "NEED_BEFORE",
    "Evidence",
    "Memory",
    "at_hand",
    "debiased",
    "empirical_fisher",
    "forgetting_losses",
    "fresh",
    "importance",
    "kept",
    "masked",
    "memories",
    "new_memories",
    "pull",
    "pulled",
    "remaining",
    "together",
    "true_fisher",
]
