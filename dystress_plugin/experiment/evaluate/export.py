"""`dystress export`: a trained backbone for those who have not this package, and how they load it."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from dystress_plugin.experiment.backbone import build, code, library
from dystress_plugin.experiment.data.datasets import normalize_of
from dystress_plugin.experiment.evaluate.scores import trained_backbone
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.io.config import read_config
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.settings import ExportSettings
from dystress_plugin.experiment.spec import RunSpec

BESIDE = "Path(__file__).with_name({!r})"  # wherever the two files are moved together


def export(settings: ExportSettings) -> list[str]:
    """Writes the backbone's tensors to `out` and the lines that load them beside it; returns what there is to say.

    Raises:
        ValueError: for a folder without a finished run, a library that has no such network, or files that are there.
    """
    settings = checked(settings)
    out, spec, backbone = Path(settings.out), *trained_backbone(Path(settings.checkpoint))
    own = library(spec.model.backbone)
    to = own if settings.to in (None, "safetensors") else settings.to
    if to != own:
        _check_fits(spec, backbone, to)
    script = out.with_name(f"load_{out.stem}.py")  # torchvision.py would be what `import torchvision` finds
    for place in (out, script):
        files.check_new(place)
    state = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    as_safetensors = settings.to == "safetensors"
    files.write(out, safetensors.torch.save(state)) if as_safetensors else files.save(out, state)
    beside = ["from pathlib import Path", *_code(spec, to, BESIDE.format(out.name), as_safetensors=as_safetensors)]
    files.write_text(script, "\n".join(beside) + "\n")
    lines = _code(spec, to, repr(str(out)), as_safetensors=as_safetensors)
    return [f"wrote {out}, and {script}, which loads it without dystress_plugin:", *lines]


def loading_lines(run: Path) -> list[str]:
    """How the `backbone.pt` of a run is loaded without this package."""
    spec = read_config(run / "config.yaml")
    lines = _code(spec, library(spec.model.backbone), repr(str(run / "backbone.pt")), as_safetensors=False)
    return ["the backbone without dystress_plugin:", *(f"  {line}" for line in lines)]


def _code(spec: RunSpec, to: str, file: str, *, as_safetensors: bool) -> list[str]:
    """Lines that load what an expression of Python names."""
    name, size = spec.model.backbone, spec.model.image_size
    colours = normalize_of(spec.data.name)
    lines = [f"# {name} for images of {size} pixels, normalised by mean {colours['mean']} and std {colours['std']}"]
    load = f"torch.load({file}, weights_only=True)"
    if as_safetensors:
        lines, load = [*lines, "from safetensors.torch import load_file"], f"load_file({file})"
    return [*lines, *code(name, size, to, load)]


@torch.no_grad()
def _check_fits(spec: RunSpec, backbone: nn.Module, to: str) -> None:
    """Raises a ValueError unless the other library has the same network, by name, tensors and what it computes."""
    name, size = spec.model.backbone, spec.model.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        other = build(name, size, to)
        other.load_state_dict(backbone.state_dict())
        features, expected = (network.eval()(images).flatten(1) for network in (other, backbone))
        torch.testing.assert_close(features, expected)
    except Exception:  # a name that it has not, other tensors, or others' features
        own = library(name)
        raise ValueError(f"to={to} has no network that backbone={name} fits, which is {own}'s: to={own}.") from None
