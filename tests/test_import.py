import subprocess
import sys

import pytest

import dystress_plugin
from dystress_plugin import diagnostics

HEAVY = (
    "hydra hydra_plugins lightly lightning matplotlib omegaconf pandas PIL pytorch_lightning scipy sklearn solo "
    "tensorboard timm torchmetrics torchvision umap wandb dystress_plugin.diagnostics"
)
PROGRAM = f"""
import sys, time
import torch
start = time.process_time()
import dystress_plugin
seconds = time.process_time() - start
print(seconds, *[name for name in "{HEAVY}".split() if name in sys.modules])
"""


@pytest.fixture(scope="module")
def imports():
    runs = [subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True) for _ in range(3)]
    assert [run.stderr for run in runs] == [""] * 3
    return [run.stdout.split() for run in runs]


def test_import_needs_no_framework_and_no_diagnostics(imports):
    assert [loaded for _, *loaded in imports] == [[], [], []]


def test_import_takes_no_longer_than_torch_and_a_tenth_of_a_second(imports):
    assert min(float(seconds) for seconds, *_ in imports) < 0.1


def test_metrics_hands_on_the_summaries_of_diagnostics():
    assert dystress_plugin.metrics.temperature_summary is diagnostics.temperature_summary
    assert dystress_plugin.metrics.some_pairs is diagnostics.some_pairs


def test_an_unknown_measure_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'alinment'"):
        dystress_plugin.metrics.alinment  # noqa: B018


def test_public_names_are_those_of_the_contract():
    assert sorted(dystress_plugin.__all__) == [
        "ContrastiveLoss",
        "RowStats",
        "__version__",
        "embed_in_chunks",
        "metrics",
        "objectives",
        "recipes",
        "temperature",
    ]
    assert dystress_plugin.temperature.__all__ == [
        "Batch",
        "Constant",
        "CosineSchedule",
        "DySTreSS",
        "Hardness",
        "Individual",
        "Learnable",
        "LogitMap",
        "LogitMaps",
        "MixedMap",
        "ModelAware",
        "ProfiledMap",
        "RobustGlobal",
        "Scaled",
        "StepSchedule",
        "TempNet",
        "Temperature",
        "TemperatureFree",
        "WarmUp",
        "WeightedMap",
    ]
