"""A user's program for test_open_clip.py: open_clip's own, on CPUs, with a model of this size and a method of ours.

python open_clip_program.py FOLDER WORDS... [+ WORDS...]
"""

import os
import sys
from pathlib import Path

import open_clip
import torch

from dystress_plugin.frameworks.open_clip.__main__ import main


class OnCPU(torch.nn.parallel.DistributedDataParallel):
    """Without the devices that open_clip names, which torch takes on a GPU only."""

    def __init__(self, module, device_ids=None, **settings):
        super().__init__(module, **settings)


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    open_clip.add_model_config(Path(folder) / "models")
    torch.nn.parallel.DistributedDataParallel = OnCPU
    while "+" in words:
        first, words = words[: words.index("+")], words[words.index("+") + 1 :]
        if main(first):
            raise SystemExit(1)
    status = main(words)
    sys.stdout.flush()
    os._exit(status)  # gloo's threads may still free what they hold, and abort an interpreter that ends before them
