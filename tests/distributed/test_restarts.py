"""torchrun starts a job again after a death: it goes on by itself, and ends as the undisturbed one."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch
from elastic_worker import told
from processes import free_port

WORKER = Path(__file__).with_name("elastic_worker.py")
SECONDS = 300
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Processes that torch 2.13 starts again find in the store that they share with the launcher where those before them
# have listened, and wait for them: https://github.com/pytorch/pytorch/issues/135712. So each start has its own.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(*words: object) -> subprocess.CompletedProcess:
    """Two processes, which may be started again once."""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "--max-restarts", "1", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=os.environ | OWN_STORE)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_process_dies_and_the_job_goes_on(tmp_path, engine):
    settings = {"engine": engine, "dropout": 0.1, "save_steps": 3}
    straight = tmp_path / "straight"
    straight.mkdir()
    result = forked.distributed(WORKER, straight, json.dumps(settings), processes=2, timeout=SECONDS)
    assert result.returncode == 0, result.stderr[-5000:]
    again = tmp_path / "again"
    again.mkdir()
    result = torchrun(WORKER, again, json.dumps(settings | {"dies": {"process": 1, "step": 7}}))
    assert result.returncode == 0, result.stderr[-5000:]
    assert "exitcode: -9" in result.stderr
    assert [event["begins"] for event in told(again) if "begins" in event] == [0, 6]
    mine, theirs = (torch.load(folder / "final.pt", weights_only=True) for folder in (again, straight))
    assert all(torch.equal(mine[name], W) for name, W in theirs.items())


# A script that knows nothing of hf_drt, and dies in the first start of its job.
SCRIPT = """
import os, signal, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and args.process_index == 1 and state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index == 0:
            print("begins at", state.global_step, flush=True)

torch.set_num_threads(1)
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **size))
data = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(60)]
args = TrainingArguments(
    sys.argv[1], max_steps=8, save_steps=2, report_to="none", use_cpu=True, ddp_backend="gloo", disable_tqdm=True
)
Trainer(model, args, train_dataset=data, callbacks=[Dies()]).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_an_unchanged_script_goes_on_with_one_flag_or_says_that_it_does_not(tmp_path, resume):
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    flags = ["--drt_schedule", "factored@0 dense@4", "--drt_rank", "4", "--drt_resume", resume]
    result = torchrun("-m", "hf_drt.run", tmp_path / "train.py", *flags, tmp_path / "out")
    assert result.returncode == 0, result.stderr[-5000:]
    begins = [line for line in result.stdout.splitlines() if "begins at" in line]
    assert [int(line.split()[-1]) for line in begins] == [0, 4 if resume == "auto" else 0]
    warned = "torchrun has restarted this job (1 times so far), and training begins anew" in result.stderr
    assert warned == (resume == "never")


def node(folder: Path, port: int, name: str, settings: dict) -> subprocess.Popen:
    """A node with one process; a job has one or two of them."""
    command = [
        *TORCHRUN, "--nnodes", "1:2", "--nproc_per_node", "1", "--max-restarts", "3", "--rdzv_backend", "c10d",
        "--rdzv_id", "job", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_conf", "last_call_timeout=3",
        str(WORKER), str(folder), json.dumps(settings),
    ]  # fmt: skip
    with (folder / f"{name}.txt").open("w") as printed:
        return subprocess.Popen(command, stdout=printed, stderr=printed, env=os.environ | OWN_STORE)


def end(launcher: subprocess.Popen) -> None:
    """Kill it with all that it has started, as a node that loses its power."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    launcher.kill()
    launcher.wait(SECONDS)


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.slow
def test_a_node_dies_and_the_other_goes_on_with_the_same_rows(tmp_path):
    """One of two nodes of one process each: its launcher and its process are killed at once. The other, which holds
    the rendezvous, starts again alone, accumulates over twice as many batches, and has the losses of the undisturbed
    run."""
    settings = {"engine": "ddp", "max_steps": 40, "drt_schedule": "factored@0 dense@15 adapter@30"}
    straight, folder = tmp_path / "straight", tmp_path / "job"
    for place in (straight, folder):
        place.mkdir()
    result = forked.distributed(WORKER, straight, json.dumps(settings), processes=2, timeout=SECONDS)
    assert result.returncode == 0, result.stderr[-5000:]
    port = free_port()
    nodes = [node(folder, port, "first", settings)]
    try:
        time.sleep(1.0)  # the first one holds the rendezvous
        nodes.append(node(folder, port, "second", settings))
        wait_for(lambda: any(e.get("step") == 8 for e in told(folder)), "the job does not begin")
        end(nodes[1])
        assert nodes[0].wait(SECONDS) == 0, (folder / "first.txt").read_text()[-5000:]
    finally:
        for one in nodes:
            end(one)
    begins = [event for event in told(folder) if "begins" in event]
    assert [event["processes"] for event in begins] == [2, 1]
    assert begins[1]["begins"] >= 7
    assert begins[1]["rows"] == [4, 4, 1]
    mine, theirs = (json.loads((place / "losses.json").read_text()) for place in (folder, straight))
    assert mine == pytest.approx(theirs, abs=1e-5)
