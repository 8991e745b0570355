"""What both trainings share: the loop, its trouble, checkpoints, the order of the data, the average and the log."""

from .average import Ema
from .folder import RunFolder
from .guard import GuardSettings, NotFiniteError, require_finite
from .loop import Schedule, Trainable, Watcher, held_interrupt, train
from .meter import describe
from .order import BatchOrder, share_of
from .rate import learning_rate
from .scaler import LossScaler

__all__ = [
    "BatchOrder",
    "Ema",
    "GuardSettings",
    "LossScaler",
    "NotFiniteError",
    "RunFolder",
    "Schedule",
    "Trainable",
    "Watcher",
    "describe",
    "held_interrupt",
    "learning_rate",
    "require_finite",
    "share_of",
    "train",
]
