"""Configs on Hydra's search path: `python main_pretrain.py --config-name dystress_cifar10 method=macl`."""
