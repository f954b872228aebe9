"""Processes of a trial: what fails, hangs or dies in one is told, and nothing is left running."""

import json
import sys
import textwrap
import time
from importlib import import_module

import pytest
import torch

from hf_drt.doctor import Bench, Result, examine
from hf_drt.doctor.launch import each_engine, run
from hf_drt.doctor.trial_loop import SAVED, TrialLoop
from hf_drt.engines import Engine, Single

CPU = torch.device("cpu")


def scripted(tmp_path, text: str, processes: int = 2, seconds: float = 60.0) -> str | None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    return run([str(script)], processes, tmp_path, seconds)


def test_processes_that_end_well_have_nothing_to_tell(tmp_path):
    assert scripted(tmp_path, "import os; assert os.environ['RANK'] in '01'") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise ValueError('no gloo here')", "process 1 ended with 1: ValueError: no gloo here"),
        ("print('bye'); sys.exit(3)", "process 1 ended with 3: bye"),
        ("os.kill(os.getpid(), 9)", "process 1 was ended by SIGKILL"),
    ],
)
def test_the_error_of_one_is_told_while_the_other_waits(tmp_path, text, told):
    began = time.monotonic()
    code = f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {text}\ntime.sleep(100)"
    assert scripted(tmp_path, code) == told
    assert time.monotonic() - began < 30


def test_a_process_that_hangs_is_ended(tmp_path):
    told = scripted(tmp_path, "import time; print('waiting', flush=True); time.sleep(100)", seconds=1.5)
    assert told == "process 0, 1 had not ended after 1.5 s: waiting"


def test_after_an_engine_that_fails_the_others_are_tried(tmp_path):
    """A stand-in for the worker, of three engines of which the second ends the process."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent("""
        import json, os, pathlib, sys
        folder = pathlib.Path(sys.argv[1])
        spec = json.loads((folder / "spec.json").read_text())
        with (folder / f"seen-{os.environ['RANK']}.jsonl").open("w") as file:
            for name in ("one", "two", "three"):
                if name not in spec["skip"]:
                    file.write(json.dumps({"engine": name}) + "\\n")
                    file.flush()
                    if name == "two":
                        raise RuntimeError("two is broken")
                    file.write(json.dumps({"engine": name, "fine": spec["task"]}) + "\\n")
        """)
    )
    seen = each_engine("start", "cpu", 1, tmp_path, [str(script)])
    assert {name: row["fine"] for name, row in seen.rows.items()} == {"one": "start", "three": "start"}
    assert seen.errors == {"two": "process 0 ended with 1: RuntimeError: two is broken"}


def test_what_ends_processes_before_an_engine_is_told_once(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("raise OSError('no network')")
    seen = each_engine("start", "cpu", 1, tmp_path, [str(script)])
    assert (seen.rows, seen.errors) == ({}, {"": "process 0 ended with 1: OSError: no network"})


# ---- the loop that they run


def test_a_loop_resumes_to_the_bit_from_what_it_saved(tmp_path):
    loop = TrialLoop(Single, CPU)
    loop.run(0, SAVED)
    torch.save(loop.saved(), tmp_path / "saved.pt")
    loop.run(SAVED)
    other = TrialLoop(Single, CPU, state=torch.load(tmp_path / "saved.pt", weights_only=True))
    other.run(SAVED)
    assert other.digest() == loop.digest()
    changed = torch.load(tmp_path / "saved.pt", weights_only=True)
    moments = next(m for m in changed["moments"].values() if m)
    moments["exp_avg"] = moments["exp_avg"] * 1.001
    third = TrialLoop(Single, CPU, state=changed)
    third.run(SAVED)
    assert third.digest() != loop.digest()


class OfLibrary(Single):
    help = "an engine that inherits how another is begun"


class Bare(Single):
    help = "an engine that says nothing of how it is begun"
    begun = Engine.begun


def test_an_engine_that_a_loop_cannot_begin_is_left_out_with_the_reason():
    worker = import_module("hf_drt.doctor.worker")
    assert worker.not_begun(Single, CPU) is None
    assert worker.not_begun(OfLibrary, CPU).startswith("OfLibrary is not begun by what it inherits")
    assert "is begun by its own library" in worker.not_begun(Bare, CPU)


def test_what_the_processes_saw_is_judged(monkeypatch, tmp_path):
    """Rows of processes that drift, differ from one process and resume with other bits."""
    processes = sys.modules["hf_drt.doctor.processes"]
    launch = import_module("hf_drt.doctor.launch")
    dense = {name: W * 1.01 for name, W in processes._alone(CPU).items()}

    def seen(task, device, count, folder):
        if task == "resume":
            return launch.Seen({"ddp": {"engine": "ddp", "digests": ["b", "b"]}})
        torch.save(dense, folder / "ddp-dense.pt")
        rows = {
            "ddp": {"engine": "ddp", "equal": [True, True, False, True], "digest": "a"},
            "toy": {"engine": "toy", "left_out": "not installed"},
        }
        return launch.Seen(rows, {"fsdp2": "process 1 ended with 1: RuntimeError: no"})

    monkeypatch.setattr(processes, "each_engine", seen)
    found = {f.what: (f.result, f.seen) for f in examine("processes", Bench(CPU)).findings}
    assert found["ddp: equal bits"] == (Result.FAILED, "the processes differ from update step 2 on")
    assert found["ddp: as one process"][0] is Result.FAILED
    assert found["ddp: resumed"] == (Result.FAILED, "saved after 5 steps, new processes end with other bits")
    assert found["toy"] == (Result.NOT_TRIED, "not installed")
    assert found["fsdp2"] == (Result.FAILED, "process 1 ended with 1: RuntimeError: no")


def test_engines_start_in_a_process_of_their_own():
    found = {f.what: f.result for f in examine("engines", Bench(CPU, True)).findings}
    assert {found[name] for name in ("single", "ddp", "fsdp2")} == {Result.HELD}


@pytest.mark.slow
def test_a_wrapper_that_is_not_renewed_makes_processes_differ(tmp_path):
    """The worker with DDP's own part of a switch taken out."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent("""
        import contextlib, os, pathlib, sys
        from hf_drt.doctor.worker import main
        from hf_drt.engines import ENGINES
        ENGINES["ddp"].around_switch = lambda engine, options: contextlib.nullcontext()
        main(pathlib.Path(sys.argv[1]), int(os.environ["RANK"]))
        sys.stdout.flush()
        os._exit(0)
        """)
    )
    seen = each_engine("train", "cpu", 2, tmp_path, [str(script)])
    assert "ddp" in seen.errors or not all(seen.rows["ddp"]["equal"])


def test_a_spec_is_what_the_worker_reads(tmp_path):
    launch = import_module("hf_drt.doctor.launch")
    each_engine("start", "cpu", 1, tmp_path, ["-c", "pass"])
    assert launch.Spec(**json.loads((tmp_path / "spec.json").read_text())) == launch.Spec("start", "cpu", 1, [])
