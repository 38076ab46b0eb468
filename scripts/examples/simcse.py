"""Unsupervised SimCSE with any method of the package, and its evaluation on semantic textual similarity.

python scripts/examples/simcse.py method=dystress model=bert-base-uncased sentences=wiki1m_for_simcse.txt \
    dev=stsb-en-dev.csv sts=[stsb-en-test.csv,STS12-en-test,SICK_test_annotated.txt] seed=0 out=runs/x
python scripts/examples/simcse.py ... model=tiny          # a small BERT from random weights: nothing is downloaded
python scripts/examples/simcse.py table=[runs/a,runs/b]   # mean and standard deviation over seeds of finished runs
python scripts/examples/simcse.py --help                  # every key with its default

Defaults are those of the DySTreSS paper's code, except for model=tiny: one epoch, batches of 64, learning rate 3e-5, 32
tokens, the first token's embedding under an MLP that only training has, and the best model by the Spearman correlation
on `dev` every 125 steps. It needs the extra `sentences`.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dystress_plugin import recipes
from dystress_plugin.experiment.keys import describe, option, parse
from dystress_plugin.experiment.settings import SEED
from dystress_plugin.objectives import OBJECTIVES

TINY = "tiny"


@dataclass
class Settings:
    method: str = option("dystress", "a method of `dystress methods` without a queue")
    method_kwargs: dict[str, Any] = option({}, "parameters of its temperature, beside the paper's for sentences")
    objective: str | None = option(None, "what a row is trained for; null: the method's own", words=tuple(OBJECTIVES))
    layout: str = option("one_way", "what is compared with what", words=("one_way", "both_ways", "views"))
    model: str = option(TINY, "tiny, or name or path of a released encoder, of which the transformer is read")
    sentences: str | None = option(None, "text file, a sentence a line; must be given")
    max_sentences: int | None = option(None, "read only the first ones", "[2, 1_000_000_000]")
    dev: str | None = option(None, "STS file that picks the best model; null: the last one")
    sts: list[str] = option([], "STS files, or folders of a year's files, to evaluate on before and after")
    out: str | None = option(None, "folder of the results; null: runs/simcse-METHOD-SEED")
    seed: int = option(0, "number that weights, order and dropout are drawn from", SEED)

    epochs: float = option(1.0, "passes over the sentences", "(0, 1_000_000]")
    batch_size: int = option(64, "sentences per step and device", "[2, 1_000_000]")
    mini_batch_size: int | None = option(
        None, "sentences embedded at a time, with cached gradients; null: all", "[1, 1_000_000]"
    )
    lr: float | None = option(None, "learning rate; null: 3e-5, 5e-4 for tiny", "(0, 1_000_000]")
    warmup: float = option(
        0.0, "share of the steps in which the learning rate rises; it falls linearly to 0 then", "[0, 1)"
    )
    max_length: int = option(32, "tokens that are read of a sentence", "[3, 65_536]")
    pooling: str = option(
        "cls", "from tokens to a sentence, whatever the released encoder has", words=("cls", "mean", "max", "lasttoken")
    )
    head: bool = option(True, "train under an MLP that is thrown away")
    eval_steps: int = option(125, "steps between two evaluations on dev", "[1, 1_000_000_000]")
    precision: str = option("fp32", "numbers that are computed with", words=("fp32", "fp16", "bf16"))
    cpu: bool = option(False, "leave a GPU alone")
    diagnostics_every_n_steps: int = option(
        50, "steps between two samples of similarities and temperatures; 0: none", "[0, 1_000_000_000]"
    )
    progress: bool = option(True, "show progress bars")

    vocabulary: int = option(8000, "word pieces of tiny", "[10, 1_000_000]")
    dim: int = option(128, "numbers per token of tiny", "[1, 65_536]")
    layers: int = option(2, "layers of tiny", "[1, 1000]")
    heads: int = option(4, "heads of tiny", "[1, 1000]")
    dropout: float = option(0.1, "dropout of tiny", "[0, 1)")

    table: list[str] = option([], "train nothing: print the table of these runs, and of runs inside of these folders")

    def check_names(self):
        if recipes.recipe(self.method).queue:
            raise ValueError(f"method={self.method} has a queue, which is not for sentences here. Choose one without.")


def read_sentences(settings):
    if settings.sentences is None:
        raise ValueError("sentences=FILE must be given: a text file with a sentence a line.")
    found = [line.strip() for line in Path(settings.sentences).read_text(encoding="utf-8").splitlines()]
    found = [line for line in found if line][: settings.max_sentences]
    if len(found) < 2:
        raise ValueError(f"{settings.sentences} has {len(found)} sentences; training needs at least 2.")
    return found


def build_model(settings, sentences, out):
    from dystress_plugin.frameworks.sentence_transformers.encoders import encoder, random_bert

    name = settings.model
    if name == TINY:
        sizes = ("vocabulary", "dim", "layers", "heads", "dropout")
        name = random_bert(sentences, out / "untrained", **{size: getattr(settings, size) for size in sizes})
    model = encoder(name, pooling=settings.pooling, max_length=settings.max_length, head=settings.head)
    return model.to("cpu") if settings.cpu else model


def build_loss(settings, model, samples):
    from dystress_plugin.frameworks.sentence_transformers import (
        SETTINGS,
        CachedContrastiveSentenceLoss,
        ContrastiveSentenceLoss,
    )

    table = {"num_samples": samples} if settings.method == "isogclr" else {}
    kwargs = table | SETTINGS.get(settings.method, {}) | settings.method_kwargs
    kwargs |= {"objective": settings.objective, "layout": settings.layout, "gather_across_devices": True}
    if settings.mini_batch_size:
        return CachedContrastiveSentenceLoss(model, settings.method, mini_batch_size=settings.mini_batch_size, **kwargs)
    return ContrastiveSentenceLoss(model, settings.method, **kwargs)


def build_trainer(settings, model, sentences, out):
    import transformers
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    from dystress_plugin.frameworks.sentence_transformers import ContrastiveCallback
    from dystress_plugin.frameworks.sentence_transformers.sts import evaluator

    dev = evaluator(settings.dev) if settings.dev else None
    steps = {"save_strategy": "no"}
    if dev is not None:
        steps = {
            **{"eval_strategy": "steps", "eval_steps": settings.eval_steps},
            **{"save_strategy": "steps", "save_steps": settings.eval_steps, "save_total_limit": 1},
            **{"load_best_model_at_end": True, "metric_for_best_model": f"eval_{dev.name}_spearman_cosine"},
        }
    # A share of the steps has a name of its own in transformers 4, where warmup_steps is a whole number.
    share = "warmup_ratio" if int(transformers.__version__.split(".")[0]) < 5 else "warmup_steps"
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr or (5e-4 if settings.model == TINY else 3e-5),
        seed=settings.seed,
        fp16=settings.precision == "fp16",
        bf16=settings.precision == "bf16",
        use_cpu=settings.cpu,
        logging_steps=settings.eval_steps,
        disable_tqdm=not settings.progress,
        report_to="none",
        dataloader_pin_memory=False,
        **{share: settings.warmup},
        **steps,
    )
    # One column, which the loss embeds twice; the label is the number of the sentence, for tables of samples.
    data = Dataset.from_dict({"sentence": sentences, "label": list(range(len(sentences)))})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        loss=build_loss(settings, model, len(sentences)),
        evaluator=dev,
    )
    trainer.add_callback(ContrastiveCallback(trainer, settings.diagnostics_every_n_steps))
    return trainer


def evaluate(model, evaluators):
    """Spearman correlations in percent, by task."""
    return {e.name: round(100 * float(e(model)[f"{e.name}_spearman_cosine"]), 2) for e in evaluators}


def best_step(state):
    """The step whose model was the best on dev; from the name of its checkpoint, as older states have nothing else."""
    return int(state.best_model_checkpoint.rpartition("-")[2]) if state.best_model_checkpoint else None


def train(settings):
    import transformers

    from dystress_plugin.frameworks.sentence_transformers.encoders import without_head
    from dystress_plugin.frameworks.sentence_transformers.sts import evaluator

    out = Path(settings.out or f"runs/simcse-{settings.method}-{settings.seed}")
    out.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(settings), out / "config.yaml")
    evaluators = [evaluator(path) for path in [*settings.sts, *([settings.dev] if settings.dev else [])]]
    sentences = read_sentences(settings)
    transformers.set_seed(settings.seed)
    model = build_model(settings, sentences, out)
    trainer = build_trainer(settings, model, sentences, out)
    before = evaluate(model, evaluators)
    start = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - start, 1)
    summary = {
        **{"method": settings.method, "seed": settings.seed, "sentences": len(sentences)},
        **{"steps": trainer.state.global_step, "seconds": seconds, "best": best_step(trainer.state)},
        **{"before": before, "after": evaluate(model, evaluators), "settings": asdict(settings)},
    }
    if trainer.is_world_process_zero():
        without_head(model).save(str(out / "model"))
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        (out / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    return summary


def table(folders):
    """Markdown: a row a method, mean and standard deviation over its runs before and after, a column a task."""
    files = sorted({f for folder in folders for f in Path(folder).rglob("summary.json")})
    if not files:
        raise ValueError(f"table={list(folders)}: there is no summary.json inside.")
    runs = [json.loads(file.read_text()) for file in files]
    tasks = list(dict.fromkeys(task for run in runs for task in run["before"]))
    lines = ["| method | seeds | " + " | ".join(f"{task} before | after | gain" for task in tasks) + " |"]
    lines.append("|" + "---|" * (2 + 3 * len(tasks)))
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        cells = [method, ", ".join(str(run["seed"]) for run in own)]
        for task in tasks:
            pairs = [(run["before"][task], run["after"][task]) for run in own if task in run["before"]]
            cells += [spread(values) for values in (*zip(*pairs, strict=True), [b - a for a, b in pairs])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values):
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main(arguments=None):
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    if not tokens or {"-h", "--help"} & set(tokens):
        print(f"{__doc__}\nkeys and their defaults:\n{describe(Settings)}")
        return 0
    try:
        settings = parse(Settings, tokens)
        if settings.table:
            print(table(settings.table))
            return 0
        summary = train(settings)
    except (ValueError, TypeError, OSError) as error:
        print(f"simcse.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps({name: value for name, value in summary.items() if name != "settings"}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
