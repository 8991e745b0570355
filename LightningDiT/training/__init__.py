"""What both trainings share: the loop, its trouble, checkpoints, the order of the data, the average and the log."""

from LightningDiT.training.batch_order import BatchOrder, share_of
from LightningDiT.training.ema import Ema
from LightningDiT.training.log_rows import describe
from LightningDiT.training.lr_schedule import learning_rate
from LightningDiT.training.run_dir import RunFolder

from .guard import GuardSettings, NotFiniteError, require_finite
from .loop import Schedule, Trainable, Watcher, held_interrupt, train
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
