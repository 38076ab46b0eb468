# This example requires the following dependencies to be installed:
# pip install -e '.[open-clip]' scikit-learn

# A small model of CLIP's kind on scikit-learn's digits with captions made by template, trained by open_clip's own
# program with one method after another. It shows that training works, and nothing else: 1,397 images of 16 pixels.
#
#     python scripts/examples/open_clip_digits.py --methods simclr dystress isogclr --seeds 0 1 2 --epochs 8

import argparse
import csv
import json
import logging
import statistics
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dystress_plugin.frameworks.open_clip.__main__ import main

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 64, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1},
}
# Temperatures of the papers' image-text experiments; rho below log(n), above which iSogCLR's only sink.
SETTINGS = {
    "simclr": ["method_kwargs.tau=0.07"],
    "dystress": ["method_kwargs.tau_min=0.01", "method_kwargs.tau_max=0.04"],
    "isogclr": ["method_kwargs.rho=2", "method_kwargs.tau_init=0.03"],
    "fastclip": ["method_kwargs.rho=2"],
    "tempnet": ["method_kwargs.rho=2", "temperature_lr=1e-3"],
}

parser = argparse.ArgumentParser()
parser.add_argument("--methods", nargs="+", default=["clip", "simclr", "dystress", "isogclr", "fastclip", "tempnet"])
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--out", type=Path, default=Path("open_clip_digits"))
args = parser.parse_args()

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.images))
train, test = order[:1397], order[1397:]


def caption(number, template):
    """One of three captions; ink and place are the picture's own."""
    image, word = digits.images[number], WORDS[digits.target[number]]
    ink = "bold" if image.mean() > 5 else "thin"
    place = "left" if image[:, :4].sum() > image[:, 4:].sum() else "right"
    return [f"a photo of the digit {word}", f"a {ink} {word}", f"{word}, {ink}, leaning {place}"][template]


def write_data(folder):
    """Images, a model's description, and the table that open_clip reads: two captions an image."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(digits.images):
        Image.fromarray((image * 15.9).astype(np.uint8)).resize((16, 16)).save(folder / "images" / f"{number}.png")
    (folder / "digits_vit.json").write_text(json.dumps(MODEL))
    with (folder / "train.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["filepath", "title"])
        for number in train:
            rows.writerows([(folder / "images" / f"{number}.png", caption(number, k)) for k in (0, 1 + number % 2)])
    open_clip.add_model_config(folder / "digits_vit.json")


@torch.no_grad()
def scores(checkpoint):
    """Zero-shot accuracy and text-to-image recall at 1, in per cent; of an untrained model without a checkpoint."""
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("digits_vit")
    if checkpoint is not None:
        model.load_state_dict(torch.load(checkpoint, weights_only=False)["state_dict"])
    model.eval()
    tokenizer = open_clip.get_tokenizer("digits_vit")
    images = torch.stack([transform(Image.open(args.out / "images" / f"{number}.png")) for number in test])
    image = model.encode_image(images, normalize=True)
    prompts = model.encode_text(tokenizer([f"a photo of the digit {word}" for word in WORDS]), normalize=True)
    found = (image @ prompts.T).argmax(1).numpy()
    texts = [caption(number, 2) for number in test]
    text = model.encode_text(tokenizer(texts), normalize=True)
    nearest = (text @ image.T).argmax(1).tolist()
    # Several images have the same caption, and any of them is right.
    recalled = [texts[index] == own for own, index in zip(texts, nearest, strict=True)]
    return 100 * float((found == digits.target[test]).mean()), 100 * statistics.mean(recalled)


write_data(args.out)
logging.getLogger().setLevel(logging.WARNING)
rows = [("untrained", "", *scores(None))]
for method in args.methods:
    for seed in args.seeds:
        name = f"{method}-{seed}"
        checkpoint = args.out / name / "checkpoints" / f"epoch_{args.epochs}.pt"
        if not checkpoint.exists():
            options = {"model": "digits_vit", "train-data": args.out / "train.csv", "batch-size": args.batch_size}
            options |= {"epochs": args.epochs, "seed": seed, "lr": 1e-3, "warmup": 20, "workers": 0, "device": "cpu"}
            options |= {"logs": args.out, "name": name, "save-frequency": args.epochs}
            words = [f"method={method}", *SETTINGS.get(method, []), "--"]
            for key, value in options.items():
                words += [f"--{key}", str(value)]
            logging.getLogger().handlers.clear()  # of the run before
            if main(words):
                raise SystemExit(f"{name} could not be trained.")
        rows.append((method, seed, *scores(checkpoint)))
        print("{:12} seed {:>2}: zero-shot {:.1f} %, recall@1 {:.1f} %".format(*rows[-1]), flush=True)

with (args.out / "results.csv").open("w", newline="") as file:
    csv.writer(file).writerows([("method", "seed", "zero_shot", "recall_at_1"), *rows])
print(f"\n{'method':12} zero-shot     recall@1")
for method in ("untrained", *args.methods):
    columns = zip(*(row[2:] for row in rows if row[0] == method), strict=True)
    spread = [(statistics.mean(column), statistics.stdev(column) if len(column) > 1 else 0.0) for column in columns]
    print(f"{method:12} " + "  ".join(f"{mean:5.1f} ± {deviation:.1f}" for mean, deviation in spread))
