"""lightly: a loss with tests, documentation, examples, notebooks and a benchmark."""

import datetime
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass
from importlib.util import find_spec
from string import Template

from dystress_plugin import recipes
from upstream import benchmark
from upstream.clone import Plan, run, template

VARIANTS = ("pytorch", "pytorch_lightning", "pytorch_lightning_distributed")
BENCHMARK = "benchmarks/imagenet/resnet50"
TOOLS = ("ruff", "jupytext", "nbformat")


@dataclass(frozen=True)
class Method:
    """What a pull request is about, beyond its recipe.

    Attributes:
        recipe: name in the table of methods.
        name: of the files of examples, documentation and benchmark.
        title: of the documentation page.
        model: class of the examples.
        loss: class of the criterion.
        module: of the criterion.
        arguments: of the criterion, in the benchmark; a template of the recipe's parameters.
        published: year and month of the paper.
        about: first paragraph of the documentation.
        change: heading of commit and pull request, in the host's form.
        what: the pull request's first paragraph.
        why: its second.
        equivalence: what is equal to what.
        comments: what a maintainer should know.
        closes: the issue that it answers.
    """

    recipe: str
    name: str
    title: str
    model: str
    loss: str
    module: str
    arguments: str
    published: tuple[int, int]
    about: str
    change: str
    what: str
    why: str
    equivalence: str
    comments: str
    closes: str = ""

    @property
    def paper(self):
        """The recipe, which has the paper."""
        return recipes.recipe(self.recipe)


_EQUAL = (
    "`tests/test_export_upstream.py` there compares loss and gradient of the generated file with its own `{}` on "
    "random batches, with and without a memory bank, to 1e-6."
)
METHODS = {
    "dystress": Method(
        recipe="dystress",
        name="dystress",
        title="DySTreSS",
        model="DySTreSS",
        loss="DySTreSSLoss",
        module="dystress_loss",
        arguments="tau_min=$tau_min, tau_max=$tau_max",
        published=(2023, 8),
        about="Example implementation of DySTreSS, dynamically scaled temperature in self-supervised contrastive "
        "learning. DySTreSS is based on the :ref:`simclr` architecture and only introduces a new loss function, in "
        "which every pair of embeddings has a temperature of its own: a cosine function of the pair's cosine "
        "similarity, lowest for pairs without similarity and highest for pairs that are very similar or opposite.",
        change="feat: add DySTreSS loss",
        what="Adds `DySTreSSLoss`, NT-Xent with a temperature for every pair that follows from the pair's cosine "
        "similarity, with memory bank and gather as `NTXentLoss` has them; export, tests, documentation page, examples "
        "in all three variants with notebooks, and a ResNet-50 benchmark.",
        why="Contrastive losses are sensitive to their temperature, and one temperature treats all pairs alike. "
        "DySTreSS keeps SimCLR's architecture and replaces the temperature by a range. For `tau_min = tau_max` the "
        "loss is `NTXentLoss`, which a test checks.",
        equivalence=_EQUAL.format("DySTreSSLoss"),
        comments="The temperature counts as a constant in the backward pass, as in the authors' ImageNet code; their "
        "paper's analysis differentiates it. Under mixed precision the similarities have the precision that they have "
        "in `NTXentLoss`.",
    ),
    "macl": Method(
        recipe="macl",
        name="macl",
        title="MACL",
        model="MACL",
        loss="MACLLoss",
        module="macl_loss",
        arguments="temperature=$tau, alpha=$alpha",
        published=(2022, 7),
        about="Example implementation of model-aware contrastive learning (MACL). MACL is based on the :ref:`simclr` "
        "architecture and only introduces a new loss function. Its temperature follows the alignment of the positive "
        "pairs, and its gradient is reweighted so that it does not vanish for easy batches.",
        change="feat: add gather, memory bank, docs, examples and benchmark for MACLLoss",
        what="Gives `MACLLoss` a memory bank and `gather_distributed`, as `NTXentLoss` has them, and adds what it "
        "came without: an entry in the documentation of the losses, a documentation page, examples in all three "
        "variants with notebooks, and a ResNet-50 benchmark.",
        why="Without gather the alignment and the negatives of a distributed run are those of one GPU. Two things are "
        "fixed on the way: where P rounds to 1 the loss was what `eps` made of it and is now its limit, and "
        "the temperature, which `alpha = A_0 = 1` and opposite positives made negative, is held above a tenth of "
        "its base.",
        equivalence=_EQUAL.format("MACLLoss"),
        comments="Existing arguments keep their names, order, ranges and defaults. Values differ from before by the "
        "1e-8 that was added to the divisor. With gather the alignment is the mean over all ranks.",
    ),
    "ts": Method(
        recipe="ts",
        name="simclr_temperature_schedule",
        title="SimCLR with temperature schedule",
        model="SimCLRTemperatureSchedule",
        loss="NTXentLoss",
        module="ntx_ent_loss",
        arguments="temperature=$tau_max",
        published=(2023, 3),
        about="Example implementation of :ref:`simclr` with a temperature that oscillates during training. A high "
        "temperature favours group-wise discrimination, a low one instance-wise discrimination; a cosine schedule "
        "moves between the two, which helps on data with a long-tailed distribution of classes.",
        change="feat: add SimCLR with temperature schedule",
        what="Adds what is open in the issue: a ResNet-50 benchmark of SimCLR with a cosine schedule of the "
        "temperature, and beside it examples in all three variants with notebooks, a documentation page, and tests. "
        "No new class: `cosine_schedule` has got its `period` since the issue was opened, and `NTXentLoss` reads "
        "`temperature` at every step.",
        why="The paper reports gains on long-tailed data; the issue asks whether ImageNet gains too.",
        equivalence="The test that this adds pins the schedule's values; the generating repository compares "
        "`NTXentLoss` under this schedule with its own `TemperatureScheduleLoss` on random batches, to 1e-6.",
        comments="The benchmark's period is a fifth of the epochs: the paper's 2000 epochs hold five periods of 400. "
        "The benchmark itself still has to be run.",
        closes="part of #1319 (the benchmark still has to be run)",
    ),
}


def plan(clone, name, command, version):
    """The pull request for a method.

    Args:
        clone: of lightly.
        name: in `METHODS`.
        command: that is being run, for the text.
        version: (version, commit) of the package.

    Raises:
        ValueError: where a file of the clone is not as expected, or a tool is missing.
    """
    if missing := [tool for tool in TOOLS if find_spec(tool) is None]:
        raise ValueError(f"lightly's format and notebooks need {', '.join(missing)}: pip install {' '.join(missing)}.")
    method = METHODS[name]
    files = [*LOSSES[name](clone, method), *_examples(clone, method), *_docs(clone, method), *_benchmark(clone, method)]
    files = {source.path: source.text for source in files}
    message = f"{method.change}\n\n" + "\n".join(textwrap.wrap(method.what, 72))
    text = _pull_request(clone, method, command, version, _program(clone, method))
    return Plan(f"dystress-plugin/{name}", files, message, text, _Finish(method))


def loss_module(clone, method):
    """The file of the loss; that of MACL takes the place of lightly's own."""
    parts = ("bank_attributes", "bank_init", "similarities")
    return clone.new(
        f"lightly/loss/{method.module}.py",
        f"lightly/{method.module}.py",
        replaces=method.recipe == "macl",
        url=method.paper.url,
        year=method.paper.paper.rpartition(" ")[2],
        **method.paper.parameters,
        **{name: template(f"lightly/{name}").rstrip("\n") for name in parts},
    )


def _loss_of_dystress(clone, method):
    clone.source("tests/ddp_helpers.py")  # which the tests import
    tests = clone.new("tests/loss/test_dystress_loss.py", "lightly/test_dystress_loss.py")
    exports = clone.source("lightly/loss/__init__.py").among(
        r"^from lightly\.loss\.(\S+) import .*\n", "from lightly.loss.dystress_loss import DySTreSSLoss\n"
    )
    return [loss_module(clone, method), tests, exports, _autoclass(clone, method)]


def _loss_of_macl(clone, method):
    # The file is replaced as a whole: only one with this signature, which has neither bank nor gather.
    signature = "def __init__(self, temperature: float = 0.1, alpha: float = 0.5, A_0: float = 0.0):\n"
    clone.source("lightly/loss/macl_loss.py").part(signature)
    clone.source("tests/ddp_helpers.py")
    tests = (
        clone.source("tests/loss/test_macl_loss.py")
        .first("import numpy as np\n", "from typing import Tuple\n\nimport numpy as np\n")
        .first(
            "from torch import Tensor\n",
            "from pytest_mock import MockerFixture\nfrom torch import Tensor\nfrom torch import distributed as dist\n",
        )
        .after("from lightly.loss import MACLLoss\n", "from tests.ddp_helpers import NUM_PROCESSES, USE_PYTEST_POOL\n")
        .first("class TestMACLLoss:\n", template("lightly/macl_gather_worker") + "class TestMACLLoss:\n")
        .append(template("lightly/extra_macl_tests"))
    )
    return [loss_module(clone, method), tests, _autoclass(clone, method)]


def _schedule(clone, _):
    clone.source("lightly/utils/scheduler.py").part("period: Optional[int] = None")
    criterion = clone.source("lightly/loss/ntx_ent_loss.py")
    if "temperature=self.temperature" not in criterion.text:  # as it hands it to lightly.functional, or divides by it
        criterion.part("/ self.temperature")
    manual = "\n\ndef _calc_ntxent_loss_manual("
    tests = (
        clone.source("tests/loss/test_ntx_ent_loss.py")
        .after("from lightly.loss import NTXentLoss\n", "from lightly.utils.scheduler import cosine_schedule\n")
        .replace(manual, template("lightly/schedule_test") + manual)
    )
    return [tests]


LOSSES = {"dystress": _loss_of_dystress, "macl": _loss_of_macl, "ts": _schedule}


def _autoclass(clone, method):
    return clone.source("docs/source/lightly.loss.rst").among(
        r"^\.\. autoclass:: lightly\.loss\.(\S+)\n   :members:\n\n",
        f".. autoclass:: lightly.loss.{method.module}.{method.loss}\n   :members:\n\n",
    )


def _examples(clone, method):
    """lightly's own SimCLR examples, with this method's loss."""
    examples = []
    for variant in VARIANTS:
        source = clone.source(f"examples/{variant}/simclr.py").word("SimCLR", method.model)
        source = _scheduled_example(source) if method.recipe == "ts" else source.word("NTXentLoss", method.loss)
        examples.append(clone.derived(source, f"examples/{variant}/{method.name}.py"))
    return examples


def _scheduled_example(source):
    source.after("from lightly.transforms.simclr_transform import SimCLRTransform\n", _SCHEDULE_IMPORT)
    if "/pytorch/" in source.path:
        call = _schedule_call("criterion", "epoch", "max_epochs", "5", 4)
        source.replace("for epoch in range(10):\n", f"max_epochs = 10\nfor epoch in range(max_epochs):\n{call}")
    else:
        call = _schedule_call("self.criterion", "self.current_epoch", "self.trainer.max_epochs", "5", 8)
        source.replace(
            "    def training_step(self, ", f"    def on_train_epoch_start(self):\n{call}\n    def training_step(self, "
        )
    return source


_SCHEDULE_IMPORT = "from lightly.utils.scheduler import cosine_schedule\n"


def _schedule_call(criterion, step, steps, period, indent):
    """The formula of `CosineSchedule` as lightly has it already."""
    parameters = recipes.recipe("ts").parameters
    call = f"""{criterion}.temperature = cosine_schedule(
    step={step},
    max_steps={steps},
    start_value={parameters["tau_max"]},
    end_value={parameters["tau_min"]},
    period={period},
)
"""
    return textwrap.indent(call, " " * indent)


def _docs(clone, method):
    page = clone.source("docs/source/examples/simclr.rst")
    tabs = page.part(".. tabs::").replace("simclr", method.name)
    head = template(f"lightly/docs_{'schedule' if method.recipe == 'ts' else 'loss'}.rst")
    schedule = recipes.recipe("ts").parameters
    page.text = (
        Template(head).substitute(
            name=method.name,
            title=method.title,
            underline="=" * len(method.title),
            about=textwrap.fill(method.about, 79, break_on_hyphens=False),
            loss=method.loss,
            module=method.module,
            paper=method.paper.paper,
            url=method.paper.url,
            **{name: _number(schedule[name]) for name in ("tau_min", "tau_max", "period")},
        )
        + tabs
    )
    toctree = clone.source("docs/source/examples/models.rst").among(r"^    (\S+)\.rst\n", f"    {method.name}.rst\n")
    return [clone.derived(page, f"docs/source/examples/{method.name}.rst"), toctree, _readme_row(clone, method)]


def _number(value):
    return f"{value:g}" if value > 10 else str(value)


def _readme_row(clone, method):
    """SimCLR's row of the supported models, for this method."""
    readme = clone.source("README.md")
    pattern = r"^\| \S.*\| <!-- (\S+) -->\n"
    row = next((m[0] for m in re.finditer(pattern, readme.text, re.MULTILINE) if m[0].startswith("| SimCLR ")), "")
    if not row:
        readme.part("| SimCLR ")  # raises
        raise ValueError("README.md: SimCLR's row among the supported models no longer ends in a date.")
    year, month = method.published
    row = re.sub(r"^\| SimCLR +\| \d+", f"| {method.title:<14} | {year}", row)
    row = re.sub(r"https://arxiv\.org/abs/[\d.]+", method.paper.url, row)
    row = re.sub(r"/simclr\.", f"/{method.name}.", row)
    row = re.sub(r"<!-- \S+ -->", f"<!-- {month:02}/{year} -->", row)
    return readme.among(pattern, row, key=_date)


def _date(written):
    day, month, year = [0, *map(int, written.split("/"))][-3:]
    return datetime.date(year, month, max(day, 1))


def _benchmark(clone, method):
    """lightly's own SimCLR benchmark, with this method's loss."""
    arguments = Template(method.arguments).substitute(method.paper.parameters)
    module = (
        clone.source(f"{BENCHMARK}/simclr.py")
        .word("SimCLR", method.model)
        .replace("NTXentLoss(temperature=0.1, gather", f"NTXentLoss({arguments}, gather")
        .replace("lightly.loss.ntx_ent_loss", f"lightly.loss.{method.module}")
        .word("NTXentLoss", method.loss)
        .replace('"simclr', f'"{method.name}')
    )
    module.text = re.sub(
        rf"\b{method.model}( paper )", r"SimCLR\1", module.text
    )  # which is cited for the learning rate
    if method.recipe == "ts":
        module.replace("import CosineWarmupScheduler\n", "import CosineWarmupScheduler, cosine_schedule\n")
        call = _schedule_call(
            "self.criterion", "self.current_epoch", "self.trainer.max_epochs", "max(1, self.trainer.max_epochs // 5)", 8
        )
        why = "        # The paper trains for 2000 epochs with a period of 400 epochs.\n"
        module.replace(
            "    def training_step(\n",
            f"    def on_train_epoch_start(self) -> None:\n{why}{call}\n    def training_step(\n",
        )
    main = (
        clone.source(f"{BENCHMARK}/main.py")
        .after("import simclr\n", f"import {method.name}\n")
        .among(
            r'^    "(\w+)": \{(?:"model"[^}]*|\n[^}]*)\},\n',
            f'    "{method.name}": {{\n        "model": {method.name}.{method.model},\n'
            f'        "transform": {method.name}.transform,\n    }},\n',
        )
    )
    listing = clone.source("benchmarks/imagenet/README.md").each_line(
        r"(\| \[`resnet50/`\].*\| )([^|]*?)( \|)",
        lambda m: [m[1] + ", ".join(sorted([*m[2].split(", "), method.title], key=str.lower)) + m[3]],
    )
    return [clone.derived(module, f"{BENCHMARK}/{method.name}.py"), main, listing]


@dataclass(frozen=True)
class _Finish:
    """lightly's own format, and its script for the notebooks."""

    method: Method

    def __call__(self, tree, paths):
        python = [path for path in paths if path.endswith(".py")]
        run([sys.executable, "-m", "ruff", "check", "--quiet", "--fix", "--select", "I", *python], tree)
        run([sys.executable, "-m", "ruff", "format", "--quiet", *python], tree)
        # The script converts whole folders; other examples' notebooks are not this pull request's.
        names = [f"{variant}/{self.method.name}" for variant in VARIANTS]
        for name in names:
            copy = tree / "examples" / "exported" / f"{name}.py"
            copy.parent.mkdir(parents=True)
            shutil.copy(tree / "examples" / f"{name}.py", copy)
        run([sys.executable, "examples/create_example_nbs.py", "examples/exported", "examples/notebooks"], tree)
        return [f"examples/notebooks/{name}.ipynb" for name in names]


_NOTHING_TO_TIME = (
    "**Benchmarks.** The loss is `NTXentLoss` as it is; the schedule is one call of a function per epoch."
)


def _program(clone, method):
    """Ratios to `NTXentLoss`, and agreement with what the loss has as a case or was before."""
    if method.recipe == "ts":
        return ""
    host = "NTXentLoss(temperature=0.1)"
    losses = {"NTXentLoss": host, method.loss: f"{method.loss}()"}
    imports = f"from lightly.loss import {', '.join(sorted(losses))}"
    if method.recipe == "dystress":
        case = f"{method.loss}(tau_min=0.1, tau_max=0.1)"
        return benchmark.program(imports, losses, {case: case, host: host})
    commit = clone.head[:8]
    losses[f"{method.loss} of {commit}"] = f'before["{method.loss}"]()'
    old = f'subprocess.check_output(["git", "show", "{commit}:lightly/loss/{method.module}.py"])'
    imports = f"import subprocess\n\n{imports}\n\nbefore = {{}}\nexec({old}, before)"
    return benchmark.program(imports, losses, dict(list(losses.items())[1:]))


def _pull_request(clone, method, command, version, program):
    return Template(template("lightly/pull_request.md")).substitute(
        heading=method.change,
        closes=method.closes,
        breaking=" (no)",
        what=method.what,
        why=method.why,
        paper=method.paper.paper,
        url=method.paper.url,
        equivalence=method.equivalence,
        comments=method.comments,
        benchmark=benchmark.section(program) if program else _NOTHING_TO_TIME,
        name=method.name,
        command=command,
        version=version[0],
        commit=version[1],
        head=clone.head[:8],
    )
