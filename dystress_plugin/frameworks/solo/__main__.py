"""`python -m dystress_plugin.frameworks.solo`: get solo-learn, and run those of its scripts that do not use Hydra."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dystress_plugin.errors import to_install
from dystress_plugin.frameworks.solo import locate


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command in ("install", "where"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        return int(options.run(options))
    except locate.SoloLearnError as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=locate.COMMAND,
        description="Gets solo-learn; runs its main_knn.py and main_umap.py on our checkpoints, on a CPU too.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    install = commands.add_parser(
        "install", help="find solo-learn or clone it at the tested commit", allow_abbrev=False
    )
    install.add_argument("--source", default=locate.SOURCE, help="git URL or path to clone from (default: %(default)s)")
    install.set_defaults(run=_install)

    where = commands.add_parser("where", help="print the folder of solo-learn's scripts", allow_abbrev=False)
    where.set_defaults(run=_where)

    rest = "everything else goes to the script as it is: --dataset, --train_data_path, --pretrained_checkpoint_dir, ..."
    knn = commands.add_parser("knn", help="solo-learn's main_knn.py", epilog=rest, allow_abbrev=False)
    knn.add_argument("--k", type=_count, nargs="+", default=[20], help="neighbours (default: 20)")
    knn.add_argument(
        "--temperature", type=_positive, nargs="+", default=[0.07], help="of cosine weights (default: 0.07)"
    )
    knn.add_argument("--distance_function", nargs="+", default=["cosine"], help="cosine, euclidean (default: cosine)")
    knn.add_argument("--feature_type", nargs="+", default=["backbone"], help="backbone, projector (default: backbone)")
    knn.set_defaults(run=_knn)

    umap = commands.add_parser("umap", help="solo-learn's main_umap.py", epilog=rest, allow_abbrev=False)
    umap.set_defaults(run=_umap)
    for command in (knn, umap):
        command.add_argument("--cpu", action="store_true", help="compute on the CPU although there is a GPU")
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and finite")
    return number


def _install(options: argparse.Namespace) -> int:
    home = locate.install(options.source)
    print(f"solo-learn is in {home}")
    commit = locate.commit_of(home)
    if commit != locate.COMMIT:
        print(f"Note: it is at {commit or 'an unknown commit'}, we test with {locate.COMMIT[:7]}.")
    problem = locate.missing_module(home)
    if problem is not None:
        print(f"It cannot be imported yet: {problem}\nInstall what it needs: {to_install('solo', problem)}")
        return 1
    print(f"Train:  python {home / 'main_pretrain.py'} --config-name dystress_cifar10 method=dystress")
    return 0


def _where(_: argparse.Namespace) -> int:
    print(locate.find())
    return 0


def _knn(options: argparse.Namespace) -> int:
    rest = options.rest
    for key in ("k", "temperature", "distance_function", "feature_type"):
        rest = [*rest, f"--{key}", *map(str, getattr(options, key))]
    return _run("main_knn", rest, cpu=options.cpu)


def _umap(options: argparse.Namespace) -> int:
    started = time.time()
    status = _run("main_umap", options.rest, cpu=options.cpu)
    # It names them itself, after ImageNet-100 whatever the data are, and says nothing of them.
    for path in sorted(Path.cwd().glob("*_umap.pdf")):
        if path.stat().st_mtime >= started - 1:
            print(f"figure: {path}")
    return status


def _run(script: str, arguments: list[str], *, cpu: bool) -> int:
    """Imports a script of solo-learn from its folder and calls its main()."""
    home = locate.find()
    sys.path.insert(0, str(home))
    try:
        import solo.methods
        import solo.utils.knn

        module: Any = importlib.import_module(script)
    except ImportError as error:
        raise locate.SoloLearnError(
            f"solo-learn in {home} cannot be imported: {error}.\n"
            f"Install what it needs: {to_install('umap' if script == 'main_umap' else 'solo', error)}"
        ) from error
    if Path(solo.methods.__file__).resolve().parents[2] != home:
        raise locate.SoloLearnError(
            f"{solo.methods.__file__} was imported instead of solo-learn in {home}.\n{locate.ADVICE}"
        )

    import torch

    from dystress_plugin.frameworks.solo import fixes
    from dystress_plugin.frameworks.solo.cpu import StayOnCPU
    from dystress_plugin.frameworks.solo.registration import register

    register()
    # Also for checkpoints of solo-learn's own methods, which are worth comparing with.
    fixes.knn_metric(solo.utils.knn.WeightedKNNClassifier)
    cpu = cpu or not torch.cuda.is_available()
    if hasattr(module, "extract_features"):
        module.extract_features = _moving_model(module.extract_features, "cpu" if cpu else "cuda")
    sys.argv[1:] = arguments
    with StayOnCPU() if cpu else nullcontext():
        module.main()
    return 0


def _moving_model(extract: Any, device: str) -> Any:
    # main_knn.py moves the images, but leaves the model where the checkpoint was written.
    return lambda loader, model: extract(loader, model.to(device))


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")  # main_umap.py only writes files
    sys.exit(main())
