"""Sampling at length: many images into a folder, by any number of processes, going on where it stopped."""

from madformer.bulk.drawing import Drawing, draw_missing
from madformer.bulk.folder import OutputFolder
from madformer.bulk.settings import Settings
from madformer.conditioning.reader import Prompts

__all__ = ["Drawing", "OutputFolder", "Prompts", "Settings", "draw_missing"]
