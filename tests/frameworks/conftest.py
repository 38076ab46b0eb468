import os

import pytest

from dystress_plugin.recipes import METHODS, Recipe
from dystress_plugin.temperature import Individual, ModelAware, WarmUp


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Twelve images of noise in two classes."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(12):
        path = root / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    return str(root)


class WarmMACL(WarmUp):
    def __init__(self, epochs: float = 1.0, alpha: float = 0.5):
        super().__init__(ModelAware(alpha=alpha), epochs=epochs)


class WarmISogCLR(WarmUp):
    """Its table's length is neither the first parameter nor in a buffer at the top."""

    def __init__(self, epochs: float = 1.0, rho: float = 0.1, *, num_samples: int):
        super().__init__(Individual(num_samples, rho=rho), epochs=epochs)


@pytest.fixture
def warm(monkeypatch):
    """Two methods of a third party, a schedule around a batch's temperature and one around a table of samples."""
    paper = ("A paper, 2030", "https://arxiv.org/abs/2030.00000")
    recipes = (
        Recipe("warm_macl", "Warm MACL", WarmMACL, "macl", *paper),
        Recipe("warm_isogclr", "Warm iSogCLR", WarmISogCLR, "sogclr", *paper),
        Recipe("warm_isogclr_moco", "Warm iSogCLR MoCo", WarmISogCLR, "sogclr", *paper, queue=True),
    )
    for recipe in recipes:
        monkeypatch.setitem(METHODS, recipe.name, recipe)
    return {recipe.name: recipe for recipe in recipes}


@pytest.fixture(scope="session")
def solo_home():
    """Where the real solo-learn is."""
    home = os.environ.get("SOLO_LEARN_HOME")
    if not home:
        pytest.skip(
            "SOLO-LEARN IS NOT TESTED: set SOLO_LEARN_HOME to a clone of github.com/vturrisi/solo-learn (9187ea3)"
        )
    return home
