"""A user's program for test_open_clip.py: open_clip's own, on CPUs, with a model of this size and a method of ours.

python open_clip_program.py FOLDER WORDS... [+ WORDS...]
"""

import os
import sys
from pathlib import Path

import open_clip
import torch
from open_clip_train import main as open_clip_program

from dystress_plugin.frameworks.open_clip.__main__ import main


class OnCPU(torch.nn.parallel.DistributedDataParallel):
    """Without the devices that open_clip names, which torch takes on a GPU only."""

    def __init__(self, module, device_ids=None, **settings):
        super().__init__(module, **settings)


def watch():
    """Prints the largest batch that an image tower has been given, once a training is over."""
    largest = []
    created = open_clip_program.create_model_and_transforms

    def create(*given, **named):
        model, *transforms = created(*given, **named)
        model.visual.register_forward_pre_hook(lambda _, inputs: largest.append(len(inputs[0])))
        return model, *transforms

    open_clip_program.create_model_and_transforms = create
    return largest


def trained(words, largest):
    """The status of one training."""
    largest.clear()
    status = main(words)
    print("images at once", max(largest, default=0))
    return status


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    open_clip.add_model_config(Path(folder) / "models")
    torch.nn.parallel.DistributedDataParallel = OnCPU
    largest = watch()
    while "+" in words:
        first, words = words[: words.index("+")], words[words.index("+") + 1 :]
        if trained(first, largest):
            raise SystemExit(1)
    status = trained(words, largest)
    sys.stdout.flush()
    os._exit(status)  # gloo's threads may still free what they hold, and abort an interpreter that ends before them
