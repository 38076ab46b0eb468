#!/usr/bin/env bash
# Temperature Schedules on ImageNet-100-LT (https://arxiv.org/abs/2303.13664): ResNet-50, 800 epochs, batch 256, SGD
# at 0.5, the temperature between 1.0 and 0.1 with a period of 400 epochs.
#
# Reported for TS, percent: kNN@1 38.38, kNN@10 38.98, linear on the few-shot subset 45.18, linear on the tail 47.26.
# DATA is ImageNet-100-LT as folders (12,205 images in train/CLASS, SDCLR's list, and the 5,000 of val/CLASS). Its
# classes do not shrink exponentially (1,280 down to 5), so `dystress long-tail` does not draw it.
# Cost: 9 GPU hours a run (lightly's ImageNet benchmark: 35 minutes an epoch of 1.28 million images on two RTX 4090,
# not counting evaluations), 4 runs: TS and three fixed temperatures.
#
# Try it small: DATA=FOLDER bash scripts/reproduce/temperature_schedules_imagenet100_lt.sh \
#     image_size=32 epochs=1 warmup_epochs=0 batch_size=32 backbone=test_resnet num_workers=0 precision=32-true
set -euo pipefail
: "${DATA:?DATA=FOLDER of ImageNet-100-LT, with train/CLASS and val/CLASS}"
dystress compare methods=[simclr,ts] seeds=[42] data="$DATA" out=runs/reproduce/ts-imagenet100-lt \
    epochs=800 batch_size=256 backbone=resnet50 image_size=224 hidden_dim=2048 projection_dim=128 \
    optimizer=sgd lr=0.5 momentum=0.9 weight_decay=1e-4 warmup_epochs=10 \
    min_scale=0.08 jitter=0.5 grayscale=0.2 blur=0.5 precision=16-mixed num_workers=16 "$@"
