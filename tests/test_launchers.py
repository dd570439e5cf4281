"""The trainer in a script of one's own, started by python, by torchrun and by deepspeed, without the pipeline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sandbox import write_records

from medai_nb.hosts import free_port

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent

SCRIPT = """
import sys

from medai_nb.trainer import LoRATrainer

trainer = LoRATrainer(model_name=sys.argv[1], config_path=sys.argv[2], output_dir=sys.argv[3])
trainer.setup_model()
train_dataset, validation_dataset = trainer.load_data()
trainer.train()
trainer.save_model()
"""
COMMANDS = {
    "python": ([sys.executable], 1),
    "torchrun": ([str(BIN / "torchrun"), "--nproc_per_node=2", "--master_port={port}"], 2),
    "deepspeed": ([str(BIN / "deepspeed"), "--no_local_rank", "--num_gpus=2", "--master_port={port}"], 2),
}


@pytest.mark.parametrize("launcher", COMMANDS)
def test_script_with_the_trainer_runs_under_every_launcher(launcher, tmp_path, tiny_llama):
    (tmp_path / "train.py").write_text(SCRIPT)
    write_records(tmp_path / "records.csv")
    settings = {
        "data": {"train_file": str(tmp_path / "records.csv"), "max_length": 64},
        "lora": {"r": 4},
        "training": {"max_steps": 2, "per_device_train_batch_size": 1, "pack_length": 64, "logging_steps": 1},
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    command, ranks = COMMANDS[launcher]
    command = [part.format(port=free_port()) for part in command]
    arguments = ["train.py", str(tiny_llama), "settings.json", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    result = subprocess.run(
        command + arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=560
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    report = json.loads((tmp_path / "out" / "training_report.json").read_text())
    assert (report["steps"], report["world_size"]) == (2, ranks)
    assert (tmp_path / "out" / "lora_adapter" / "adapter_model.safetensors").stat().st_size > 0
