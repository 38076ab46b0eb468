import os

import pytest


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


@pytest.fixture(scope="session")
def solo_home():
    """Where the real solo-learn is."""
    home = os.environ.get("SOLO_LEARN_HOME")
    if not home:
        pytest.skip(
            "SOLO-LEARN IS NOT TESTED: set SOLO_LEARN_HOME to a clone of github.com/vturrisi/solo-learn (9187ea3)"
        )
    return home
