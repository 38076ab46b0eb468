from dystress_plugin.experiment import style
from dystress_plugin.experiment.style import styles
from dystress_plugin.recipes import METHODS


def test_a_method_has_one_colour_in_every_figure_and_pairs_have_others():
    bases = [name for name in METHODS if "_" not in name]
    colors = {name: style.method_color(name) for name in bases}
    assert not set(colors.values()) & {style.POSITIVE, style.NEGATIVE}
    assert [name for name in bases if colors[name] == style.GREY] == ["simclr"]
    assert len(set(colors.values())) == min(len(bases), 1 + len(style.COLORS))
    arms = styles(
        {name: name for name in METHODS} | {"constant-0.1": "simclr"}, dict.fromkeys([*METHODS, "constant-0.1"])
    )
    for name in METHODS:
        assert style.method_color(name) == arms[name].color == colors[name.partition("_")[0]]
    assert arms["constant-0.1"].color == style.GREY


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
