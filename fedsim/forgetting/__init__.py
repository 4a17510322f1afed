"""Forgetting: what is to be remembered instead, and which parameters the rest of the memory hangs on."""

from fedsim.forgetting.fisher import Evidence, empirical_fisher, importance, pulled, true_fisher
from fedsim.forgetting.memory import debiased, fresh, masked, new_memories

__all__ = [
    "Evidence",
    "debiased",
    "empirical_fisher",
    "fresh",
    "importance",
    "masked",
    "new_memories",
    "pulled",
    "true_fisher",
]
