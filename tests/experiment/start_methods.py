"""A program as a user's: it says how processes are started, then runs the command; for test_processes.py.

python start_methods.py DATA FOLDER
"""

import multiprocessing
import sys

from dystress_plugin.cli import main

if __name__ == "__main__":
    data, folder = sys.argv[1:]
    settings = ["image_size=12", "batch_size=6", "backbone=test_resnet", "epochs=2"]
    common = [f"data={data}", *settings, "accelerator=cpu", "progress=false"]
    inspect = ["inspect", "methods=[dystress]", "constants=[]"]
    spawned = ["devices=2", "strategy=ddp_spawn", "batch_size=3", "method=isogclr", "tensorboard=true"]
    # Starts processes as "spawn" does, from what is pickled, but imports torch once for all of them.
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["dystress_plugin.experiment.pretrain.command"])
    status = [
        main(["pretrain", *common, f"out={folder}/no_workers"]),
        main(["pretrain", *common, f"out={folder}/forkserver", "num_workers=1"]),
        main(["evaluate", f"checkpoint={folder}/forkserver", "accelerator=cpu", "num_workers=2"]),
        main([*inspect, f"checkpoint={folder}/no_workers"]),
    ]
    multiprocessing.set_start_method("spawn", force=True)
    status += [
        main([*inspect, f"checkpoint={folder}/forkserver", "num_workers=1"]),
        main(["pretrain", *common, *spawned, f"out={folder}/ddp_spawn"]),
    ]
    raise SystemExit(max(status))
