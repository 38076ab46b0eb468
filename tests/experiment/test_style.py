from dystress_plugin.experiment import style
from dystress_plugin.experiment.inspect.figures import _styles
from dystress_plugin.experiment.report.figures import styles
from dystress_plugin.recipes import METHODS


def test_a_method_has_one_colour_in_every_figure_and_pairs_have_others():
    bases = [name for name in METHODS if "_" not in name]
    colors = {name: style.method_color(name) for name in bases}
    assert not set(colors.values()) & {style.POSITIVE, style.NEGATIVE}
    assert [name for name in bases if colors[name] == style.GREY] == ["simclr"]
    assert len(set(colors.values())) == min(len(bases), 1 + len(style.COLORS))
    arms = styles({name: name for name in METHODS}, ["constant-0.1"])
    shown = {METHODS[name].title: name for name in METHODS}
    inspected = dict(zip(shown, _styles(dict.fromkeys(shown)), strict=True))
    for title, name in shown.items():
        own = colors[name.partition("_")[0]]
        assert style.method_color(name) == arms[name].color == inspected[title]["color"] == own
    assert arms["constant-0.1"].color == arms["untrained"].color == style.GREY


def test_arms_of_one_method_are_told_apart_by_lines():
    arms = styles({"dystress": "dystress", "dystress-shifted": "dystress", "macl": "macl"}, [])
    assert arms["dystress"].color == arms["dystress-shifted"].color != arms["macl"].color
    assert arms["dystress"].line != arms["dystress-shifted"].line
    assert arms["dystress"].line == arms["macl"].line == "-"
    first, second, other = _styles(dict.fromkeys(["DySTreSS", "DySTreSS (shifted)", "MACL"]))
    assert (first["color"], first["linestyle"]) == (second["color"], "-") != (other["color"], other["linestyle"])
    assert second["linestyle"] != "-"
