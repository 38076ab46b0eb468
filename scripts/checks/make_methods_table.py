"""Writes METHODS.md from the recipe table and from what the adapters register.

python scripts/checks/make_methods_table.py            # writes it
python scripts/checks/make_methods_table.py --check    # exits with 1 if it is stale
"""

import argparse
import ast
import inspect
import sys
from pathlib import Path

import dystress_plugin
from dystress_plugin.frameworks import lightly
from dystress_plugin.frameworks.lightly.modules import BENCHMARK_METHODS
from dystress_plugin.recipes import METHODS

PACKAGE = Path(dystress_plugin.__file__).parent
TARGET = Path(__file__).parents[2] / "METHODS.md"
LAYOUTS = {False: "views of a batch", True: "queue of keys"}  # by whether a recipe has a queue
# solo-learn and LightlyTrain have a method of this name, which the registration leaves in place.
HOSTS_OWN = {"simclr"}

HEAD = """# Methods

Generated from `dystress_plugin/recipes.py` by `python scripts/checks/make_methods_table.py`; a test fails when it is
stale.

A method is a point of the grid temperature × objective × layout. Every row works in one's own loop as
`dystress_plugin.ContrastiveLoss("name")`; a queue of keys needs `queue_size=(keys, dim)` there, and a table of samples
`num_samples=`. *command* is `dystress pretrain method=name`, *solo-learn* its own `main_pretrain.py ... method=name`.
*lightly: criterion* is a class in `dystress_plugin.frameworks.lightly`, which with `memory_bank_size` compares with a
queue; *lightly: module* is a LightningModule in `dystress_plugin.frameworks.lightly.modules`. *sentences* is
`ContrastiveSentenceLoss(model, "name")` in `dystress_plugin.frameworks.sentence_transformers`, *open_clip* its own
training after `python -m dystress_plugin.frameworks.open_clip method=name --`, *LightlyTrain*
`lightly_train.pretrain(method="name")` after `import dystress_plugin.frameworks.lightly_train`. *paper* is the
temperature's; the objectives `dcl` and `dclw` are from [DCL, 2021](https://arxiv.org/abs/2110.06848), `dual` from
[SimCo, 2022](https://arxiv.org/abs/2203.17248), the queue from [MoCo, 2020](https://arxiv.org/abs/1911.05722). Other
combinations are made from their parts:
`ContrastiveLoss(dp.temperature.DySTreSS(), objective="macl", queue_size=(4096, 128))`. Around any temperature,
`dp.temperature.Hardness(temperature)` weighs negatives by their hardness
([LLaVE, 2025](https://arxiv.org/abs/2503.04812)), and `dp.temperature.WarmUp(temperature)` starts from a constant. With
`ts`, `offset=counts` gives every sample a schedule of its own ([MM-TS, 2026](https://arxiv.org/abs/2603.08202)). All of
them but those with a queue take classes too, `loss(z0, z1, labels=y)`
([SupCon, 2020](https://arxiv.org/abs/2004.11362)). With images and texts,
`layout="both_ways"`, iSogCLR and TempNet have a state of their own for each side, and iSogCLR the defaults of its
bimodal recipe; `dim` is the length of embeddings, which hosts fill in.

A method of your own is `method=yours` in all of them: write its temperature in a package of yours, let a test call
`dystress_plugin.testing.check_temperature`, and name its recipe as an entry point in the group
`dystress_plugin.methods`, or call `dystress_plugin.recipes.register`, whose documentation has the steps one by one.
`tests/third_party` is such a package.
"""


def table():
    """The whole file."""
    solo, criteria = _served_by("solo"), _lightly_criteria()
    lightly_train = _served_by("lightly_train")
    columns = (
        *("method", "temperature", "objective", "layout", "paper", "defaults"),
        *("command", "solo-learn", "lightly: criterion", "lightly: module", "sentences", "open_clip", "LightlyTrain"),
        "implemented in",
    )
    rows = [columns, ["---"] * len(columns)]
    for recipe in METHODS.values():
        if not recipe.temperature.__module__.startswith("dystress_plugin."):
            continue  # of a package that happens to be installed
        module = BENCHMARK_METHODS.get(recipe.name)
        rows.append(
            [
                f"`{recipe.name}`",
                f"`{recipe.temperature.__name__}`",
                f"`{recipe.objective}`",
                LAYOUTS[recipe.queue],
                f"[{recipe.paper}]({recipe.url})",
                _defaults(recipe),
                _mark(True),
                "its own" if recipe.name in HOSTS_OWN else _mark(recipe.queue in solo),
                criteria.get((recipe.temperature, recipe.objective), "–"),
                f"`{module['model'].__name__}`" if module else "–",
                *[_mark(not recipe.queue)] * 2,
                "its own" if recipe.name in HOSTS_OWN else _mark(recipe.queue in lightly_train),
                ", ".join(_link(file) for file in _files(recipe)),
            ]
        )
    return HEAD + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _served_by(framework):
    """With a queue or without: the keys of an adapter's `BASES`, read, as importing it needs the host."""
    file = PACKAGE / "frameworks" / framework / "methods.py"
    tree = ast.parse(file.read_text())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "BASES":
            return {ast.literal_eval(key) for key in node.value.keys}
    raise ValueError(f"{file} has no annotated dict BASES: say here what it serves.")


def _lightly_criteria():
    """From (class of the temperature, objective) to the drop-in criterion."""
    names = {}
    for name in lightly.__all__:
        cls = getattr(lightly, name)
        loss = cls(**{"num_samples": 1} if "num_samples" in inspect.signature(cls).parameters else {}).loss
        names[type(loss.temperature), loss.objective] = f"`{name}`"
    return names


def _defaults(recipe):
    return ", ".join(
        name if default is inspect.Parameter.empty else f"{name}={default}"
        for name, default in recipe.parameters.items()
    )


def _files(recipe):
    files = [Path(inspect.getfile(recipe.temperature)), PACKAGE / "objectives.py"]
    return [*files, PACKAGE / "key_queue.py"] if recipe.queue else files


def _link(file):
    inside = file.relative_to(PACKAGE).as_posix()
    return f"[{inside}](dystress_plugin/{inside})"


def _mark(there):
    return "✓" if there else "–"


def main(arguments=None, target=TARGET):
    parser = argparse.ArgumentParser(description="Writes METHODS.md from the recipe table.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if METHODS.md is stale")
    if not parser.parse_args(arguments).check:
        target.write_text(table(), encoding="utf-8")
        return 0
    if target.exists() and target.read_text(encoding="utf-8") == table():
        return 0
    print(f"{target.name} is stale: run python scripts/checks/make_methods_table.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
