"""solo-learn: a method with its loss, tests, configs and documentation; and fixes of what is wrong for everybody."""

import re
import textwrap
from dataclasses import dataclass, field
from string import Template

from dystress_plugin import recipes
from upstream import benchmark
from upstream.clone import Plan, template

# Settings in which a run that is resumed must be as before, beside those that solo-learn compares.
COMPARED = ("method_kwargs", "seed", "augmentations", "data.train_path", "data.fraction", "scheduler", "momentum")
# Pixels to which the shorter side of an image is resized before its centre is cropped.
SHORTER = "crop_size if crop_size <= 64 else round(crop_size * 256 / 224)"


@dataclass(frozen=True)
class Parameter:
    """A setting of a method.

    Attributes:
        name: in `method_kwargs` and in the loss function.
        value: the default.
        about: for the docstrings.
    """

    name: str
    value: float
    about: str


@dataclass(frozen=True)
class Change:
    """What a pull request is about.

    Attributes:
        heading: of commit and pull request.
        what: the pull request's first paragraph.
        why: its second.
        tests: what checks it.
        comments: what a maintainer should know.
        not_run: what was not tried.
        recipe: name in the table of methods; None for a fix.
        title: class of the method.
        parameters: of the method.
    """

    heading: str
    what: str
    why: str
    tests: str
    comments: str = ""
    not_run: str = "No GPU and no DALI was at hand."
    recipe: str | None = None
    title: str = ""
    parameters: tuple[Parameter, ...] = field(default=())


def _of(recipe, name, about, called=None):
    return Parameter(called or name, recipes.recipe(recipe).parameters[name], about)


_METHOD = {
    "tests": "`pytest tests/methods tests/losses` on the branch, with the new files among them.",
    "not_run": "No training to the end: the configs hold SimCLR's optimizer settings and no result was entered in the "
    "README's tables. No GPU, no DALI, no multi-node run.",
}
METHODS = {
    "dystress": Change(
        "Add DySTreSS",
        "Adds DySTreSS: SimCLR with a temperature for every pair, which follows from the pair's cosine similarity. "
        "Loss, method, registration, configs for CIFAR and ImageNet-100, tests, documentation.",
        "Contrastive losses are sensitive to their temperature, and one temperature treats all pairs alike; DySTreSS "
        "replaces it by a range. For `tau_min = tau_max` the loss is `simclr_loss_func`, which a test checks.",
        comments="The temperature counts as a constant in the backward pass, as in the authors' code.",
        recipe="dystress",
        title="DySTreSS",
        parameters=(
            _of("dystress", "tau_min", "lowest temperature, of pairs without similarity."),
            _of("dystress", "tau_max", "highest temperature, of very similar or opposite pairs."),
        ),
        **_METHOD,
    ),
    "macl": Change(
        "Add MACL",
        "Adds MACL: SimCLR with a temperature that follows the alignment of the positives, and a reweighted gradient. "
        "Loss, method, registration, configs for CIFAR and ImageNet-100, tests, documentation.",
        "A temperature that rises with the alignment of the model eases the uniformity-tolerance dilemma; the weight "
        "keeps the gradient of easy batches from vanishing.",
        comments="The paper's formula can make the temperature negative; it is held above a tenth of its base. Where "
        "the positive's probability rounds to 1 the loss is its limit 1, not 0/0.",
        recipe="macl",
        title="MACL",
        parameters=(
            _of("macl", "tau", "base temperature.", "temperature"),
            _of("macl", "alpha", "how strongly the alignment acts on the temperature."),
            _of("macl", "threshold", "alignment at which the temperature is the base temperature."),
        ),
        **_METHOD,
    ),
    "fix-knn": Change(
        "Let the kNN metric work with current torchmetrics",
        "`WeightedKNNClassifier` no longer asks torchmetrics for `compute_on_step=False`, which 0.12 removed, and does "
        "what that meant: calling it only collects.",
        "With torchmetrics 0.12 or newer every run with `knn_eval.enabled=True` fails at the start.",
        tests="`pytest tests/utils/test_knn.py`, with a new test that calls the metric as `BaseMethod` does.",
        comments="The upper bound in requirements.txt goes with it.",
    ),
    "fix-auto-resume": Change(
        "Compare the method's settings before resuming",
        "auto_resume also compares `method_kwargs`, the seed and what else decides what is trained.",
        "Two runs that differ in the temperature alone had the same name for auto_resume: the second silently went on "
        "with the first one's weights.",
        tests="`pytest tests/utils/test_auto_resumer.py`, with a new test.",
        comments="Checkpoints of older runs are resumed as before as long as these settings are the same.",
    ),
    "fix-setup": Change(
        "Install without pkg_resources",
        "setup.py reads requirements.txt by itself.",
        "setuptools 81 has no `pkg_resources`: in an isolated build `pip install .` ends with ModuleNotFoundError.",
        tests="`python setup.py --requires` before and after; `pip install --no-deps .`.",
    ),
    "fix-custom-size": Change(
        "Evaluate custom datasets at the size of their crops",
        "The pipelines of `data.dataset=custom` take a crop size: pretraining validates at that of its augmentations, "
        "linear evaluation at `data.augmentations.crop_size`.",
        "A folder of 32-pixel images was trained at 32 and validated at 224 pixels, whatever the config said.",
        tests="`pytest tests/data/test_classification_dataloader.py`, with a new test; the default is 224 as before.",
        comments="A `build_custom_pipeline` that a user has rewritten without arguments has to take the size now. "
        "main_knn.py and main_umap.py keep 224: their `--crop_size` is a list that nothing reads.",
    ),
}


def plan(clone, name, command, version):
    """The pull request for a method or a fix.

    Args:
        clone: of solo-learn.
        name: in `METHODS`.
        command: that is being run, for the text.
        version: (version, commit) of the package.

    Raises:
        ValueError: where a file of the clone is not as expected.
    """
    change = METHODS[name]
    sources = FIXES[name](clone) if name in FIXES else _method(clone, change)
    message = f"{change.heading}\n\n" + "\n".join(textwrap.wrap(change.what, 72))
    program = _program(change) if change.recipe else ""
    text = _pull_request(change, command, version, program)
    return Plan(f"dystress-plugin/{name}", {source.path: source.text for source in sources}, message, text)


def _method(clone, change):
    return [
        *_loss(clone, change),
        *_registration(clone, change),
        *_siblings(clone, change),
        *_lists(clone, change),
    ]


def _loss(clone, change):
    licence = _licence(clone)
    name = change.recipe
    loss = clone.new(
        f"solo/losses/{name}.py",
        "solo/loss.py",
        license=licence,
        imports="import math\n\nimport torch\nimport torch.nn.functional as F\n"
        "from solo.utils.misc import gather, get_rank\n",
        name=name,
        title=change.title,
        arguments="\n".join(f"    {p.name}: float = {p.value}," for p in change.parameters),
        documented="\n".join(f"        {p.name} (float): {p.about} Defaults to {p.value}." for p in change.parameters),
        logits=template(f"solo/logits_{name}").rstrip("\n"),
        objective=template(f"solo/objective_{name}").rstrip("\n"),
    )
    functions = [f"{name}_loss_func", *(["simclr_loss_func"] if name == "dystress" else [])]
    tests = clone.new(
        f"tests/losses/test_{name}.py",
        "solo/test_loss.py",
        license=licence,
        imports=f"import math\n\nimport torch\nfrom solo.losses import {', '.join(functions)}",
        name=name,
        more=template(f"solo/more_tests_{name}").rstrip("\n"),
    )
    return [loss, tests]


def _licence(clone):
    """The comment that every file of solo-learn begins with."""
    text = clone.source("solo/losses/simclr.py").text
    return text[: re.search(r"^(?!#|$)", text, re.MULTILINE).start()].rstrip("\n")


def _registration(clone, change):
    name, title = change.recipe, change.title
    losses = (
        clone.source("solo/losses/__init__.py")
        .among(r"^from solo\.losses\.(\w+) import \w+\n", f"from solo.losses.{name} import {name}_loss_func\n")
        .among(r'^    "(\w+)",\n', f'    "{name}_loss_func",\n')
    )
    methods = (
        clone.source("solo/methods/__init__.py")
        .among(r"^from solo\.methods\.(?!all4one)(\w+) import \w+\n", f"from solo.methods.{name} import {title}\n")
        .among(r'^    "(?!base|linear|all4one)(\w+)": \w+,\n', f'    "{name}": {title},\n')
        .among(r'^    "(?!All4One)(\w+)",\n', f'    "{title}",\n')
    )
    return [losses, methods]


def _siblings(clone, change):
    """solo-learn's own files for SimCLR, for this method."""
    name, title = change.recipe, change.title
    parameters = change.parameters

    def named(m):
        return [m[0].replace("temperature", p.name) for p in parameters]

    def documented(m):
        return [f"{m[1]}{p.name} (float): {p.about}" for p in parameters]

    def valued(m):
        return [f"{m[1]}{p.name}{m[2]}{p.value}{m[3]}" for p in parameters]

    method = (
        clone.source("solo/methods/simclr.py")
        .each_line(
            r"( +)temperature \(float\): .*", lambda m: [f"{m[1]}{p.name} (float): {p.about}" for p in parameters]
        )
        .each_line(r" +self\.temperature: float = cfg\.method_kwargs\.temperature", named)
        .each_line(r' +assert not .*"method_kwargs\.temperature"\)', named)
        .each_line(r" +temperature=self\.temperature,", named)
        .replace("https://arxiv.org/abs/2002.05709", recipes.recipe(name).url)
        .word("SimCLR", title)
        .replace("solo.losses.simclr", f"solo.losses.{name}")
        .word("simclr_loss_func", f"{name}_loss_func")
    )
    tests = (
        clone.source("tests/methods/test_simclr.py")
        .each_line(r'( +")temperature(": )[\d.]+(,)', valued)
        .word("SimCLR", title)
        .replace("simclr", name)
    )
    siblings = [
        clone.derived(method, f"solo/methods/{name}.py"),
        clone.derived(tests, f"tests/methods/test_{name}.py"),
    ]
    for folder in ("cifar", "imagenet-100"):
        config = clone.source(f"scripts/pretrain/{folder}/simclr.yaml").each_line(
            r"( +)temperature(: )[\d.]+()", valued
        )
        siblings.append(clone.derived(config.replace("simclr", name), f"scripts/pretrain/{folder}/{name}.yaml"))
    linear = clone.source("scripts/linear/imagenet-100/simclr.yaml").replace("simclr", name)
    siblings.append(clone.derived(linear, f"scripts/linear/imagenet-100/{name}.yaml"))
    for folder in ("methods", "losses"):
        page = clone.source(f"docs/source/solo/{folder}/simclr.rst").word("SimCLR", title).replace("simclr", name)
        siblings.append(clone.derived(_underlined(page), f"docs/source/solo/{folder}/{name}.rst"))
    return siblings


def _underlined(page):
    """The same page, its first line underlined to its end."""
    title = page.text.splitlines()[0]
    page.text = re.sub(
        r"\A.*\n([=-])+\n", lambda m: f"{title}\n{m[1] * max(len(title), len(m[0].splitlines()[1]))}\n", page.text
    )
    return page


def _lists(clone, change):
    """Where solo-learn lists its methods."""
    name, title, url = change.recipe, change.title, recipes.recipe(change.recipe).url
    shell = r'(METHODS=\(.*"dino(?:_vit)?")( .*\))'
    script = "tests/scripts/pretrain/test_{}_scripts.sh"
    return [
        clone.source("README.md").among(
            r"^\* \[([^\]*]+)\]\(https://.*\)\n", f"* [{title}]({url})\n", until="## Extra flavor"
        ),
        clone.source("docs/source/start/available.rst").among(
            r"^\* `([^<`]+) <https://.*>`_.*\n", f"* `{title} <{url}>`_\n", until="Extra flavor"
        ),
        clone.source("docs/source/index.rst")
        .among(r"^   solo/methods/(?!base|linear)(\w+)\n", f"   solo/methods/{name}\n")
        .among(r"^   solo/losses/(\w+)\n", f"   solo/losses/{name}\n"),
        *(
            clone.source(script.format(data)).each_line(shell, lambda m: [f'{m[1]} "{name}"{m[2]}'])
            for data in ("cifar", "imagenet100")
        ),
    ]


def _fix_knn(clone):
    compute = "\n    @torch.no_grad()\n    def compute("
    return [
        clone.source("solo/utils/knn.py")
        .replace(", compute_on_step=False)", ")")
        .first(compute, template("solo/knn_forward") + compute),
        clone.source("tests/utils/test_knn.py").append(template("solo/knn_test")),
        clone.source("requirements.txt").replace("torchmetrics>=0.6.0, <0.12.0", "torchmetrics>=0.6.0"),
    ]


def _fix_auto_resume(clone):
    resumer = clone.source("solo/utils/auto_resumer.py").after(
        '        "method",\n', "".join(f'        "{key}",\n' for key in COMPARED)
    )
    return [resumer, clone.source("tests/utils/test_auto_resumer.py").append(template("solo/resume_test"))]


def _fix_setup(clone):
    setup = (
        clone.source("setup.py")
        .replace("from pkg_resources import parse_requirements\n", "")
        .replace(
            "    REQUIREMENTS = [str(req) for req in parse_requirements(fo.readlines())]\n",
            '    REQUIREMENTS = [line.strip() for line in fo if line.strip() and not line.startswith("#")]\n',
        )
    )
    # It shadowed the one from pkg_resources, was never called, and cut "a>=1, <2" down to "<2".
    dead = re.search(r"\ndef parse_requirements\(path\):\n(?:    .*\n)+\n", setup.text)
    return [setup.replace(dead[0] if dead else "def parse_requirements(path):", "")]


def _fix_custom_size(clone):
    loader = (
        clone.source("solo/data/classification_dataloader.py")
        .replace("def build_custom_pipeline():\n", "def build_custom_pipeline(crop_size: int = 224):\n")
        .first(
            '    Needs to return a dict with the same structure.\n    """\n',
            "    Needs to return a dict with the same structure.\n\n    Args:\n"
            '        crop_size (int): size of the images. Defaults to 224.\n    """\n\n'
            "    # large images keep a margin of an eighth around the crop, small ones are shown whole\n"
            f"    resize = {SHORTER}\n",
        )
        .first("RandomResizedCrop(size=224, ", "RandomResizedCrop(size=crop_size, ")
        .first("transforms.Resize(256),", "transforms.Resize(resize),")
        .first("transforms.CenterCrop(224),", "transforms.CenterCrop(crop_size),")
        .replace(
            "def prepare_transforms(dataset: str) -> Tuple[nn.Module, nn.Module]:",
            "def prepare_transforms(dataset: str, crop_size: int = 224) -> Tuple[nn.Module, nn.Module]:",
        )
        .first(
            "        dataset (str): dataset name.\n",
            "        dataset (str): dataset name.\n"
            "        crop_size (int): size of the images of custom data. Defaults to 224.\n",
        )
        .replace("= build_custom_pipeline()", "= build_custom_pipeline(crop_size)")
        .replace("    auto_augment: bool = False,\n)", "    auto_augment: bool = False,\n    crop_size: int = 224,\n)")
        .replace(
            "following timm.data.create_transform.\n            Defaults to False.\n",
            "following timm.data.create_transform.\n            Defaults to False.\n"
            "        crop_size (int, optional): size of the images of custom data. Defaults to 224.\n",
        )
        .replace("= prepare_transforms(dataset)", "= prepare_transforms(dataset, crop_size=crop_size)")
    )
    workers = "            num_workers=cfg.data.num_workers,\n        )\n\n    # pretrain dataloader"
    return [
        loader,
        clone.source("main_pretrain.py").replace(
            workers,
            workers.replace("        )\n", "            crop_size=cfg.augmentations[0].crop_size,\n        )\n"),
        ),
        clone.source("main_linear.py").replace(
            "        auto_augment=cfg.auto_augment,\n",
            "        auto_augment=cfg.auto_augment,\n        crop_size=cfg.data.augmentations.crop_size,\n",
        ),
        clone.source("tests/data/test_classification_dataloader.py").append(template("solo/crop_size_test")),
    ]


FIXES = {
    "fix-knn": _fix_knn,
    "fix-auto-resume": _fix_auto_resume,
    "fix-setup": _fix_setup,
    "fix-custom-size": _fix_custom_size,
}


def _program(change):
    """Ratios to `simclr_loss_func`, and agreement where the loss has it as a case."""
    own = f"{change.recipe}_loss_func"
    imports = (
        f"from solo.losses import {', '.join(sorted([own, 'simclr_loss_func']))}\n\n\n{template('solo/views').rstrip()}"
    )
    losses = {"simclr_loss_func": "of(simclr_loss_func)", own: f"of({own})"}
    same = {
        f"{own}(tau_min=0.1, tau_max=0.1)": f"of({own}, tau_min=0.1, tau_max=0.1)",
        "simclr_loss_func(temperature=0.1)": "of(simclr_loss_func, temperature=0.1)",
    }
    return benchmark.program(imports, losses, same if change.recipe == "dystress" else None)


def _pull_request(change, command, version, program):
    origin = ""
    if change.recipe:
        recipe = recipes.recipe(change.recipe)
        origin = Template(template("solo/origin.md")).substitute(
            paper=recipe.paper,
            url=recipe.url,
            version=version[0],
            commit=version[1],
            command=command,
            name=change.recipe,
            benchmark=benchmark.section(program),
        )
    return Template(template("solo/pull_request.md")).substitute(
        heading=change.heading,
        what=change.what,
        why=change.why,
        origin=origin,
        tests=change.tests,
        not_run=change.not_run,
        comments=change.comments,
    )
