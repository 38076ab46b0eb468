#!/usr/bin/env bash
# Five methods and a fixed temperature of 0.1 on CIFAR-10 and CIFAR-100 in solo-learn, with solo-learn's own SimCLR
# settings (1000 epochs, batch 256, LARS): no paper's setting, but the same strong one for everybody. The only vision
# setting here that has the temperature-free loss (https://arxiv.org/abs/2501.17683), whose settings and numbers could
# not be recovered.
#
# Cost: 8 GPU hours a run (lightly's CIFAR-10 benchmark: 97.7 minutes for 200 epochs at batch 128), 6 runs a data set.
#
# Needs solo-learn (python -m dystress_plugin.frameworks.solo install). The schedule's period is that of the training.
# Try it small: DATA=custom bash scripts/reproduce/solo_learn_cifar.sh data.train_path=FOLDER/train \
#     data.val_path=FOLDER/val image_size=32 max_epochs=1 optimizer.batch_size=32 dystress_hardware=cpu
set -euo pipefail
solo=$(python -m dystress_plugin.frameworks.solo where)
for data in ${DATA:-cifar10 cifar100}; do
    for method in constant dystress macl ts isogclr tempfree; do
        own=()
        [ "$method" = ts ] && own=(+method_kwargs.period=1000)
        # The loss of SimCLR; solo-learn's own simclr has no kNN with torchmetrics 0.12 or newer.
        [ "$method" = constant ] && method=dystress own=(+method_kwargs.tau_min=0.1 +method_kwargs.tau_max=0.1)
        python "$solo/main_pretrain.py" --config-name "dystress_$data" method="$method" "${own[@]}" "$@"
    done
done
