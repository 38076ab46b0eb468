"""The exporter: what it generates stands alone and equals our losses; against real clones it makes whole branches."""

import ast
import importlib
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import dystress_plugin as dp
from dystress_plugin.frameworks.lightly import DySTreSSLoss, MACLLoss, TemperatureScheduleLoss
from dystress_plugin.frameworks.solo import fixes

SCRIPTS = Path(__file__).parents[1] / "scripts"
# As in lightly's pyproject.toml; solo-learn's black has a width and no rules.
LIGHTLY_RULES = "I,D202,D209,D212,D214,D410,D411,D412"
LIGHTLY_ISORT = 'lint.isort.known-first-party = ["lightly"]'
IDENTITY = {f"GIT_{who}_{what}": "x@x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A small clone with files by path, as a function of them."""
    for name, value in IDENTITY.items():
        monkeypatch.setenv(name, value)

    def make(files):
        root = tmp_path / "host"
        for path, text in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        git(root, "init", "-q")
        git(root, "add", ".")
        git(root, "commit", "-qm", "first")
        return root

    return make


def git(folder, *arguments):
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def module_of(text, name, *known):
    """What a generated file defines, with stand-ins for the host's modules that it imports."""
    module = ModuleType(name)
    replaced = {k.__name__: sys.modules.get(k.__name__) for k in known}
    sys.modules.update({k.__name__: k for k in known})
    try:
        exec(compile(text, name, "exec"), module.__dict__)
    finally:
        for key, before in replaced.items():
            if before is None:
                del sys.modules[key]
            else:
                sys.modules[key] = before
    return module


def solo_misc():
    """solo.utils.misc on a single process."""
    misc = ModuleType("solo.utils.misc")
    misc.gather, misc.get_rank = lambda x: x, lambda: 0
    return misc


def lightly_parts():
    """What lightly's losses take from it, without a memory bank and on a single process."""
    bank, utils = ModuleType("lightly.models.modules.memory_bank"), ModuleType("lightly.utils")
    bank.MemoryBankModule = lambda size, gather_distributed: lambda z, update: (z, None)
    utils.dist = SimpleNamespace(world_size=lambda: 1)
    return bank, utils


def agree(ours, theirs, *views, tolerance=1e-6):
    """Both values and gradients on the same views."""
    results = []
    for loss in (ours, theirs):
        leaves = [view.clone().requires_grad_() for view in views]
        value = loss(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=tolerance, atol=tolerance)


def views(number=2, batch=7, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(batch, dim, generator=generator, dtype=dtype) for _ in range(number)]


def batches(number=2):
    """Random views, nearly equal ones, and such as point away from the first."""
    first, *others = views(number)
    return [first, *others], [first, *(first + 0.01 * view for view in others)], [first, *(-first for _ in others)]


class Fake:
    """Stands for a clone in which every file exists that is not to be written."""

    def __init__(self, licence="# licence\n\nimport torch\n"):
        self.licence = licence

    def source(self, path):
        from upstream.edits import Source

        return Source(path, self.licence)


@pytest.fixture
def rendered(tmp_path):
    """(host, method) to the text of the loss."""

    def render(which, name):
        from upstream import lightly, solo_learn
        from upstream.clone import Clone

        clone = Clone.__new__(Clone)
        clone.folder, clone._text = tmp_path, lambda _: None
        clone.source = Fake().source
        if which == "solo-learn":
            return solo_learn._loss(clone, solo_learn.METHODS[name])[0].text
        return lightly.loss_module(clone, lightly.METHODS[name]).text

    return render


# Temperatures at which losses of a row grow long and probabilities round to 1, and one that MACL has to hold.
SOLO_LEARN = [
    ("dystress", {}),
    ("dystress", {"tau_min": 0.07, "tau_max": 0.25}),
    ("dystress", {"tau_min": 0.01, "tau_max": 0.02}),
    ("macl", {}),
    ("macl", {"temperature": 0.01}),
    ("macl", {"temperature": 0.2, "alpha": 2.0, "threshold": 0.8}),
]
LIGHTLY = [*SOLO_LEARN[:-1], ("macl", {"temperature": 0.2, "alpha": 1.0, "A_0": 0.8})]
held = pytest.mark.filterwarnings("ignore:MACL's temperature:UserWarning")


def function_of(rendered, name):
    """solo-learn's loss, as a function of views."""
    function = getattr(module_of(rendered("solo-learn", name), f"{name}_module", solo_misc()), f"{name}_loss_func")
    return lambda *z, **settings: function(torch.cat(z), torch.arange(len(z[0])).repeat(len(z)), **settings)


@held
@pytest.mark.parametrize(("name", "settings"), SOLO_LEARN)
@pytest.mark.parametrize("number", [2, 3])
def test_solo_learn_s_loss_is_ours(rendered, name, settings, number):
    theirs = partial(function_of(rendered, name), **settings)
    ours = dp.ContrastiveLoss(name, **{{"temperature": "tau"}.get(k, k): v for k, v in settings.items()})
    for batch in batches(number):
        agree(ours, theirs, *batch)


@held
@pytest.mark.parametrize(("name", "settings"), LIGHTLY)
def test_lightly_s_loss_is_ours(rendered, name, settings):
    ours = {"dystress": DySTreSSLoss, "macl": MACLLoss}[name]
    theirs = getattr(module_of(rendered("lightly", name), f"{name}_module", *lightly_parts()), ours.__name__)
    for batch in batches():
        agree(ours(**settings), theirs(**settings), *batch)


@pytest.mark.parametrize(
    "changed", [{"profile": "linear"}, {"detach": False}, {"tau_max": 0.2001}, {"objective": "dcl"}]
)
def test_a_formula_that_is_no_longer_ours_is_noticed(rendered, changed):
    with pytest.raises(AssertionError, match="not close"):
        agree(dp.ContrastiveLoss("dystress", **changed), function_of(rendered, "dystress"), *views())


def test_lightly_s_own_test_of_dystress_expects_our_loss():
    """The double loop of the file that goes to lightly beside the loss."""
    text = importlib.import_module("upstream.clone").template("lightly/test_dystress_loss.py")
    loop = text[text.index("def _temperature") : text.index("def _gather_worker")]
    namespace = {"math": math, "torch": torch, "F": torch.nn.functional, "Tensor": torch.Tensor}
    exec(loop, namespace)
    for low, high in ((0.1, 0.2), (0.07, 0.25)):
        ours = dp.ContrastiveLoss("dystress", tau_min=low, tau_max=high)
        assert namespace["_loss_manual"](*views(), low, high) == pytest.approx(ours(*views()).item(), rel=1e-12)


@pytest.mark.parametrize("reads", ["logits / self.temperature", "ntxent(z0, z1, temperature=self.temperature)"])
def test_the_schedule_fits_a_criterion_that_reads_its_temperature_at_every_step(reads):
    """By itself, as in lightly 1.6, or in `lightly.functional`, as its pull request 2035 proposes."""
    lightly, edits = (importlib.import_module(f"upstream.{name}") for name in ("lightly", "edits"))
    files = {
        "lightly/utils/scheduler.py": "period: Optional[int] = None",
        "lightly/loss/ntx_ent_loss.py": reads,
        "tests/loss/test_ntx_ent_loss.py": "from lightly.loss import NTXentLoss\n\n\ndef _calc_ntxent_loss_manual(",
    }
    clone = SimpleNamespace(source=lambda path: edits.Source(path, files[path]))
    (tests,) = lightly._schedule(clone, None)
    assert "cosine_schedule" in tests.text
    files["lightly/loss/ntx_ent_loss.py"] = "self.inverse"
    with pytest.raises(ValueError, match="ntx_ent_loss"):
        lightly._schedule(clone, None)


def test_what_a_resumed_run_must_have_in_common_is_ours():
    resumer = SimpleNamespace(SHOULD_MATCH=[])
    fixes.auto_resume(resumer)
    assert list(importlib.import_module("upstream.solo_learn").COMPARED) == resumer.SHOULD_MATCH


@pytest.mark.parametrize("crop_size", [16, 64, 65, 96, 223, 384])
def test_how_a_custom_image_is_shown_is_ours(crop_size):
    transforms = pytest.importorskip("torchvision.transforms")
    normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    stock = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalize])
    dataloaders = SimpleNamespace(build_custom_pipeline=lambda: {"T_val": stock})
    fixes.custom_pipeline(dataloaders, crop_size)
    ours = dataloaders.build_custom_pipeline()["T_val"].transforms[0].size
    assert eval(importlib.import_module("upstream.solo_learn").SHORTER) == ours


@pytest.mark.parametrize("host_name", ["lightly", "solo-learn"])
@pytest.mark.parametrize("name", ["dystress", "macl"])
def test_generated_losses_stand_alone_and_are_formatted(rendered, tmp_path, host_name, name):
    text = rendered(host_name, name)
    assert "dystress_plugin" not in text
    assert "$" not in text
    file = tmp_path / "generated.py"
    file.write_text(text)
    width, rules = (88, ["--select", LIGHTLY_RULES, "--config", LIGHTLY_ISORT]) if host_name == "lightly" else (100, [])
    settings = ["--isolated", "--line-length", str(width)]
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "format", "--check", *settings, str(file)], check=True)
    subprocess.run([*ruff, "check", *settings, *rules, str(file)], check=True)


@pytest.mark.parametrize("name", ["dystress", "macl"])
@pytest.mark.parametrize("host_name", ["lightly", "solo-learn"])
def test_generated_losses_are_python_3_7(rendered, host_name, name):
    """Which lightly's tests run on."""
    compile(ast.parse(rendered(host_name, name), feature_version=(3, 7)), name, "exec")


def test_the_program_in_the_text_prints_ratios(rendered, tmp_path):
    pytest.importorskip("lightly")
    benchmark, lightly = (importlib.import_module(f"upstream.{name}") for name in ("benchmark", "lightly"))
    code = lightly._program(None, lightly.METHODS["dystress"]).replace("(64, 256, 1024)", "(2, 3)")
    assert "dystress_plugin" not in code
    assert code in benchmark.section(code)
    # lightly has the loss only on the branch.
    (tmp_path / "generated_loss.py").write_text(rendered("lightly", "dystress"))
    patched = "import lightly.loss, generated_loss\nlightly.loss.DySTreSSLoss = generated_loss.DySTreSSLoss\n"
    command = [sys.executable, "-W", "ignore", "-c", patched + code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["| images | DySTreSSLoss / NTXentLoss |", "|---|---|"]
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| 2", "| 3"]
    assert all(0 < float(line.split(" | ")[1].rstrip(" |")) < 100 for line in lines[2:4])
    (difference,) = re.findall(r"differ by at most ([\de.+-]+)\.$", done.stdout, re.MULTILINE)
    assert float(difference) < 1e-6


def test_lightly_s_memory_bank_is_our_queue(rendered):
    pytest.importorskip("lightly")
    for name, ours in (("dystress", DySTreSSLoss), ("macl", MACLLoss)):
        module = module_of(rendered("lightly", name), f"{name}_module")
        theirs, own = (cls(memory_bank_size=(9, 5)) for cls in (getattr(module, ours.__name__), ours))
        theirs.memory_bank.bank = own.loss.queue.keys.clone()
        agree(own, theirs, *views())
        torch.testing.assert_close(theirs.memory_bank.bank, own.loss.queue.keys)


def test_an_edit_that_does_not_fit_names_file_and_anchor():
    source = importlib.import_module("upstream.edits").Source("some/file.py", "a\nc\n")
    assert source.among(r"^(\w)\n", "b\n").text == "a\nb\nc\n"
    assert source.among(r"^(\w)\n", "d\n").text == "a\nb\nc\nd\n"
    assert source.word("a", "e").each_line(r"([bc])", lambda m: [m[1], m[1]]).text == "e\nb\nb\nc\nc\nd\n"
    for edit in (
        lambda: source.replace("gone", ""),
        lambda: source.first("gone", ""),
        lambda: source.word("gon", ""),
        lambda: source.after("gone", ""),
        lambda: source.each_line("gone", list),
        lambda: source.among("^(gone)\n", "gone\n"),
        lambda: source.part("gone"),
    ):
        with pytest.raises(ValueError, match=r"some/file\.py no longer has 'g?\^?\(?gon"):
            edit()


@pytest.mark.parametrize("place", ["default", "branch", "detached"])
def test_a_branch_appears_as_a_whole_or_not_at_all(host, place):
    """From the default branch, and beside whatever is checked out and not committed."""
    from upstream.clone import Clone, Plan

    root = host({"file.txt": "old\n"})
    base, default = git(root, "rev-parse", "HEAD"), git(root, "branch", "--show-current")
    if place != "default":
        git(root, "switch", "-q", *(["-c", "own"] if place == "branch" else ["--detach"]))
        (root / "file.txt").write_text("own\n")
        git(root, "commit", "-qam", "own")
    (root / "file.txt").write_text("not committed\n")
    (root / "untracked").touch()
    text = root.parent / "text.md"

    def state():
        return [
            git(root, *command) for command in (["status", "--porcelain"], ["rev-parse", "HEAD"], ["worktree", "list"])
        ]

    def plan(branch, finish=lambda *_: []):
        return Plan(branch, {"file.txt": f"{branch}\n", "folder/other.txt": "other\n"}, "message", "text", finish)

    def fails(tree, paths):
        assert (tree / "file.txt").read_text() == "new\n"
        assert paths == ["file.txt", "folder/other.txt"]
        raise ValueError("a tool failed")

    before, branches = state(), git(root, "branch")
    assert Clone(root).source("file.txt").text == "old\n"
    with pytest.raises(ValueError, match="a tool failed"):
        Clone(root).commit(plan("new", fails), text)
    with pytest.raises(OSError, match="No such file"):
        Clone(root).commit(plan("new"), root / "nowhere" / "text.md")
    assert (state(), git(root, "branch"), text.exists()) == (before, branches, False)

    for branch in ("new", "newer", "newest"):
        commit = Clone(root).commit(plan(branch), text)
        assert git(root, "rev-parse", branch, f"{branch}~1").splitlines() == [commit, base]
        assert git(root, "show", f"{branch}:file.txt") == branch
        assert state() == before
    assert text.read_text() == "text"
    assert (root / "file.txt").read_text() == "not committed\n"
    with pytest.raises(ValueError, match="already has a branch new"):
        Clone(root).commit(plan("new"))
    with pytest.raises(ValueError, match="not a git clone"):
        Clone(root / "folder")
    git(root, "branch", "-m", default, "unusual")
    with pytest.raises(ValueError, match="does not say which branch is the host's default"):
        Clone(root)


def test_the_default_branch_is_the_remotes(host):
    from upstream.clone import Clone

    root = host({"file.txt": "old\n"})
    git(root, "branch", "-m", "trunk")
    git(root.parent, "clone", "-q", str(root), "fork")
    fork, base = root.parent / "fork", git(root, "rev-parse", "trunk")
    git(fork, "switch", "-q", "-c", "main")
    git(fork, "commit", "-qm", "own", "--allow-empty")
    assert Clone(fork).head == base


def test_the_command_says_what_is_missing(host, capsys):
    main = importlib.import_module("upstream.export").main
    root = host({"setup.py": "from setuptools import setup\n"})
    assert main(["solo-learn", "--repo", str(root), "--method", "fix-setup"]) == 1
    assert "setup.py no longer has 'from pkg_resources" in capsys.readouterr().err
    assert main(["solo-learn", "--repo", str(root), "--method", "ts"]) == 1
    assert "solo-learn has an export of dystress" in capsys.readouterr().err
    assert main(["solo-learn", "--repo", str(root), "--method", "dystress"]) == 1
    assert "solo/losses/simclr.py, which this export needs, is not in host" in capsys.readouterr().err
    assert git(root, "branch", "--format=%(refname:short)").count("\n") == 0
    assert not list(root.parent.glob("*.PR.md"))


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A temporary clone of a real host, named by its environment variable."""
    for name, value in IDENTITY.items():
        monkeypatch.setenv(name, value)

    def make(variable, place="."):
        if not os.environ.get(variable):
            pytest.skip(f"set {variable} to a clone of the host")
        (tmp_path / place).mkdir(exist_ok=True)
        git(tmp_path / place, "clone", "-q", "--no-hardlinks", os.environ[variable], "clone")
        return tmp_path / place / "clone"

    return make


def exported(clone, variable, host_name, method):
    """A clone on the branch that was exported, and its text; a second export is the same to the byte."""
    export = importlib.import_module("upstream.export").export
    texts, trees = [], []
    for place in ("first", "second"):
        root = clone(variable, place)
        git(root, "switch", "-q", "-c", "own")
        branch, commit, text = export(host_name, method, root)
        assert git(root, "branch", "--show-current") == "own"
        assert git(root, "rev-list", f"origin/HEAD..{branch}") == git(root, "rev-parse", branch) == commit
        assert text.parent == root.parent
        texts, trees = [*texts, text.read_bytes()], [*trees, git(root, "rev-parse", f"{branch}^{{tree}}")]
    assert texts[0] == texts[1]
    assert trees[0] == trees[1]
    assert not re.search(r"\d ms\b|\$", texts[0].decode())
    git(root, "switch", "-q", branch)
    assert git(root, "status", "--porcelain") == ""
    return root, texts[0].decode()


@pytest.mark.parametrize("method", ["dystress", "macl", "fix-knn", "fix-auto-resume", "fix-setup", "fix-custom-size"])
def test_solo_learn_takes_the_branch(clone, method):
    root, text = exported(clone, "SOLO_LEARN_HOME", "solo-learn", method)
    changed = git(root, "diff", "--name-only", "HEAD~1").splitlines()
    for path in changed:
        content = (root / path).read_text()
        assert "dystress_plugin" not in content
        if path.endswith(".py"):
            compile(content, path, "exec")
    if not method.startswith("fix"):
        assert {f"solo/losses/{method}.py", f"solo/methods/{method}.py", "README.md"} <= set(changed)
        assert f'"{method}_loss_func": of({method}_loss_func)' in text
        assert (root / f"scripts/pretrain/cifar/{method}.yaml").read_text().count(f'method: "{method}"') == 1
        # A second export starts from a host that has the method, and says so.
        git(root, "branch", "-m", "main", "-f")
        git(root, "remote", "remove", "origin")
        with pytest.raises(ValueError, match=f"solo/losses/{method}.py is in the host already"):
            importlib.import_module("upstream.export").export("solo-learn", method, root)


def train_without_us(root, folder):
    """Two steps with lightly's new loss, in a process that cannot import our package."""
    program = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "dystress_plugin":
            raise ImportError("refused")
sys.meta_path.insert(0, Refuse())
import torch
from lightly.loss import DySTreSSLoss
torch.manual_seed(0)
net = torch.nn.Linear(6, 4)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)  # short enough for any start
x0, x1 = torch.randn(8, 6), torch.randn(8, 6)
losses = []
for _ in range(2):
    loss = DySTreSSLoss()(net(x0), net(x1))
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
print(losses[1] < losses[0], "dystress_plugin" in sys.modules, sys.modules["lightly"].__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True", "False", str(root / "lightly/__init__.py")], done.stderr


@pytest.mark.parametrize("method", ["dystress", "macl", "ts"])
def test_lightly_takes_the_branch(clone, method):
    pytest.importorskip("jupytext")
    pytest.importorskip("nbformat")
    root, text = exported(clone, "LIGHTLY_HOME", "lightly", method)
    assert ("import NTXentLoss" in text or "NTXentLoss\n" in text) == (method != "ts")
    assert ("git show" in text.replace('", "', " ")) == (method == "macl")  # its own loss before
    changed = git(root, "diff", "--name-only", "HEAD~1").splitlines()
    python = [path for path in changed if path.endswith(".py")]
    assert sum(path.startswith("examples/notebooks/") for path in changed) == 3
    assert not any("dystress_plugin" in (root / path).read_text() for path in changed)
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--select", "I", *python], cwd=root, check=True)
    subprocess.run([*ruff, "format", "--check", *python], cwd=root, check=True)
    if method == "dystress":
        train_without_us(root, root.parent)


def test_lightly_s_schedule_is_ours():
    loss = pytest.importorskip("lightly.loss").NTXentLoss()
    schedule = importlib.import_module("lightly.utils.scheduler").cosine_schedule
    ours = TemperatureScheduleLoss()
    for epoch in (0, 57, 200, 399):
        loss.temperature = schedule(step=epoch, max_steps=2000, start_value=1.0, end_value=0.1, period=400)
        agree(lambda *z, epoch=epoch: ours(*z, epoch=epoch), loss, *views(dtype=torch.float64))
