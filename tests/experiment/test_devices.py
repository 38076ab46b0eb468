from pathlib import Path

import pytest
import torch
from conftest import dystress  # beside this file

from dystress_plugin.experiment.compare import command as compare
from dystress_plugin.experiment.data import scan
from dystress_plugin.experiment.devices import build_trainer, torch_device
from dystress_plugin.experiment.pretrain import command as pretrain
from dystress_plugin.experiment.settings import PretrainSettings
from dystress_plugin.experiment.spec import HardwareSpec, part

WITHOUT_GPU = [
    ({"accelerator": "gpu"}, "accelerator=gpu is not there: PyTorch finds no such device. Choose from: auto, cpu."),
    ({"accelerator": "cuda"}, "accelerator=cuda is not there"),
    ({"accelerator": "mps"}, "accelerator=mps is not there"),
]
ON_THE_CPU = [
    *(({"devices": text}, f"devices={text} must be auto, or 1 to") for text in ("0", "-1", "-2", "9999", "9" * 5000)),
    *(
        ({"devices": text}, f"devices={text} must be auto, or 1 to")
        for text in ("0,1", "0,", "abc", "1.5", "2x", "[1]")
    ),
    ({"strategy": "nonsense"}, "Unknown strategy 'nonsense'."),
    ({"strategy": "dpp"}, "Unknown strategy 'dpp'. Did you mean 'ddp'?"),
    ({"strategy": "xla"}, "Unknown strategy 'xla'."),
    ({"strategy": "fsdp"}, "strategy=fsdp precision=32-true: The strategy `fsdp` requires a GPU"),
    ({"strategy": "single_device", "devices": "2"}, "this strategy trains in 1 process, not in 2."),
    ({"precision": "16-mixed"}, "precision=16-mixed needs a GPU; on the CPU it is bf16-mixed or bf16-true."),
    ({"precision": "16"}, "precision=16 needs a GPU"),
    ({"num_nodes": 2}, "num_nodes=2 needs a launcher on every machine, srun or torchrun"),
]


@pytest.fixture
def nothing_read(monkeypatch):
    """Fails where images are looked at."""
    monkeypatch.setattr(scan, "scan_layout", lambda *args, **kwargs: pytest.fail("scanned the images before"))
    monkeypatch.setattr(pretrain.data_module, "load_for", lambda *args, **kwargs: pytest.fail("loaded data before"))
    monkeypatch.setattr(compare, "load_for", lambda *args, **kwargs: pytest.fail("loaded data before"))


@pytest.mark.parametrize("command", ["pretrain", "compare"])
@pytest.mark.parametrize(("setting", "message"), WITHOUT_GPU + ON_THE_CPU)
def test_devices_that_cannot_be_had_stop_before_anything(command, setting, message, tiny, capsys, nothing_read):
    if "accelerator" in setting and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    methods = {"methods": "[simclr]"} if command == "compare" else {}
    assert dystress(command, tiny | methods | setting) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("dystress: ")
    assert message in line
    assert not Path(tiny["out"]).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("setting", "message"), WITHOUT_GPU)
def test_evaluate_takes_no_other_device_than_the_one_named(setting, message, tmp_path, capsys):
    (tmp_path / "config.yaml").touch()  # it is asked for before the device
    assert dystress("evaluate", {"checkpoint": tmp_path} | setting) == 2
    assert capsys.readouterr().err.startswith(f"dystress: {message}")
    assert torch_device("auto") == torch_device("cpu") == "cpu"


@pytest.mark.parametrize(("node", "missing"), [(0, ["MASTER_PORT"]), (1, ["MASTER_PORT", "MASTER_ADDR"])])
def test_several_machines_need_to_know_where_to_meet(node, missing, monkeypatch):
    settings = PretrainSettings(accelerator="cpu", num_nodes=2)
    monkeypatch.setenv("NODE_RANK", str(node))
    with pytest.raises(ValueError, match=f"; {', '.join(missing)} is not set"):
        build_trainer(part(HardwareSpec, settings), logger=False)
    for name in missing:
        monkeypatch.setenv(name, "12345" if name == "MASTER_PORT" else "example.org")
    trainer = build_trainer(part(HardwareSpec, settings), logger=False)
    assert (trainer.world_size, trainer.global_rank) == (2, node)


@pytest.mark.parametrize(
    ("setting", "processes"), [({"devices": "auto"}, 1), ({"devices": " 2"}, 2), ({"strategy": "ddp"}, 1)]
)
def test_devices_that_are_there_are_taken(setting, processes):
    trainer = build_trainer(part(HardwareSpec, PretrainSettings(**{"accelerator": "cpu"} | setting)), logger=False)
    assert trainer.world_size == processes
