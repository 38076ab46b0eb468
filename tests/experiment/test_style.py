from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dystress_plugin import ContrastiveLoss
from dystress_plugin.experiment import style
from dystress_plugin.experiment.inspect import effects
from dystress_plugin.experiment.inspect.figures import draw
from dystress_plugin.experiment.pretrain.figures import curves
from dystress_plugin.experiment.pretrain.trainer import COLUMNS
from dystress_plugin.experiment.style import styles
from dystress_plugin.recipes import METHODS, Recipe
from dystress_plugin.temperature import Constant, Learnable


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, by the name of their file."""
    figures = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.update({Path(path).stem: figure}))
    return figures


def colors_of(axes):
    """Of its lines and areas."""
    return {to_hex(line.get_color()) for line in axes.lines} | {to_hex(each.get_facecolor()) for each in axes.patches}


def test_a_run_s_curves_are_of_the_colours_of_pairs_without_a_band_and_begin_with_epoch_0(tmp_path, drawn):
    rows = [[epoch, 4.0, 50.0, 9.0, 0.15, 0.1, 0.2, 0.12, 0.1, 0.2, 0.5, -3.0] for epoch in range(3)]
    (tmp_path / "metrics.csv").write_text(pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))
    curves(tmp_path / "metrics.csv", tmp_path / "curves.png", "X", "#000000")
    loss, _, tau, _ = drawn["curves"].axes
    assert colors_of(loss) == {"#000000"}
    assert colors_of(tau) == {style.POSITIVE, style.NEGATIVE}
    assert len(tau.lines) == 6
    assert not tau.collections
    assert all(list(line.get_xdata()) == [0, 1, 2] for axes in drawn["curves"].axes for line in axes.lines)
    assert "the first is 0" in tau.get_xlabel()


@pytest.mark.filterwarnings("ignore:tau_max/tau_min")
def test_colours_of_an_inspection_are_those_of_methods_and_of_negatives(tmp_path, drawn):
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    seen = effects.similarities(z, z + 0.1, index=torch.arange(12), epoch=0.0)
    methods = {"steep": "dystress", "macl": "macl", "isogclr": "isogclr", "tau": "simclr"}
    settings = {"steep": {"tau_max": 1.0}, "isogclr": {"num_samples": 12}}
    losses = {name: ContrastiveLoss(method, **settings.get(name, {})) for name, method in methods.items()}
    found = {name: effects.effect(loss, seen) for name, loss in losses.items()}
    assert found["steep"].measures["falling"]
    arms = styles(methods, {name: name for name in methods})
    draw(found, arms, seen, tmp_path, "title")
    own = {arm.color for arm in arms.values()}
    left, right = drawn["temperatures"].axes
    assert colors_of(left) == colors_of(right) == own
    thick = {to_hex(line.get_color()) for line in right.lines if line.get_linewidth() > 2}
    assert thick == {arms["steep"].color}
    for name in ("weights", "gradients"):
        assert set().union(*map(colors_of, drawn[name].axes)) - {"#000000"} == own | {style.NEGATIVE}, name
    for axes in drawn["measures"].axes:
        assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [arm.color for arm in arms.values()]
        assert [bar.get_hatch() or "" for bar in axes.patches] == [arm.hatch for arm in arms.values()]
    (axes,) = drawn["similarities"].axes
    assert [patch.get_fill() for patch in axes.patches] == [True, False]


def test_a_method_has_one_colour_in_every_figure_and_pairs_have_others():
    bases = [name for name in METHODS if "_" not in name]
    colors = {name: style.method_color(name) for name in bases}
    assert not set(colors.values()) & {style.POSITIVE, style.NEGATIVE}
    assert [name for name in bases if colors[name] == style.GREY] == ["simclr"]
    kinds = {METHODS[name].temperature for name in bases} | {"SimCo's"}
    assert len(set(colors.values())) == len(kinds)
    assert colors["temo"] == colors["dystress"]
    arms = styles(
        {name: name for name in METHODS} | {"constant-0.1": "simclr"}, dict.fromkeys([*METHODS, "constant-0.1"])
    )
    for name in METHODS:
        assert style.method_color(name) == arms[name].color == colors[name.partition("_")[0]]
    assert arms["constant-0.1"].color == style.GREY


def test_a_method_of_another_package_is_grey_only_where_it_is_a_constant_and_told_apart_from_all_others(monkeypatch):
    class Theirs(Learnable):
        pass

    more = [type(f"Theirs{number}", (Theirs,), {}) for number in range(5)]
    theirs = {
        f"theirs{number}": Recipe(f"theirs{number}", "", kind, "ntxent", "", "") for number, kind in enumerate(more)
    }
    theirs |= {
        "fixed": Recipe("fixed", "", Constant, "dclw", "", ""),
        "simco2": replace(METHODS["simco"], name="simco2"),
    }
    before = {name: style.method_color(name) for name in METHODS}
    for name, recipe in theirs.items():
        monkeypatch.setitem(METHODS, name, recipe)
    constants = {f"constant-{number}": "simclr" for number in range(5)}
    arms = styles({name: name for name in METHODS} | constants, dict.fromkeys([*METHODS, *constants]))
    assert {name: arms[name].color for name in before} == before
    grey = {name for name, arm in arms.items() if arm.color == style.GREY}
    assert grey == {"simclr", "simclr_dcl", "simclr_dclw", "simclr_moco", *constants}
    for how in ("line", "marker", "hatch"):
        assert len({(arm.color, str(getattr(arm, how))) for arm in arms.values()}) == len(arms), how


def test_arms_of_one_method_are_told_apart_by_lines():
    methods = {"dystress": "dystress", "dystress-shifted": "dystress", "macl": "macl"}
    methods |= {f"constant-{number}": "simclr" for number in range(4)}
    arms = styles(methods, {name: name.upper() for name in methods})
    assert [arm.title for arm in arms.values()] == [name.upper() for name in methods]
    assert arms["dystress"].color == arms["dystress-shifted"].color != arms["macl"].color
    assert arms["dystress"].of_line != arms["dystress-shifted"].of_line
    assert arms["dystress"].line == arms["macl"].line == "-"
    grey = [arm for name, arm in arms.items() if name.startswith("constant")]
    assert len({str(arm.line) for arm in grey} - {"-"}) == len({arm.marker for arm in grey}) == 4
