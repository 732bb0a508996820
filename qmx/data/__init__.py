"""Images: their sources, and the order in which they reach the device."""

from qmx.data.batches import batches, epoch_steps
from qmx.data.datasets import SOURCES, load
from qmx.data.named import named
from qmx.data.opened import open_photos
from qmx.data.sources import Dataset, Source

__all__ = ["SOURCES", "Dataset", "Source", "batches", "epoch_steps", "load", "named", "open_photos"]
