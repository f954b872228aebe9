"""Processes of a trial: what fails, hangs or dies in one is told, and nothing is left running."""

import json
import os
import sys
import textwrap
import time
from importlib import import_module

import pytest
import torch

from hf_drt.doctor import Bench, Result, examine, extensions
from hf_drt.doctor.launch import each_engine, run
from hf_drt.doctor.trial_loop import SAVED, STEPS, TrialLoop
from hf_drt.doctor.trials import ByHand, ByTrainer
from hf_drt.engines import ENGINES, Engine, Single

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
        (
            "print('[rank1]: KeyError: 7\\n[rank1]:W1130 a warning'); sys.exit(1)",
            "process 1 ended with 1: KeyError: 7",
        ),
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
    loop, made = TrialLoop(Single, CPU, folder=tmp_path), []
    losses = loop.run(after=lambda: made.append(loop.digest()))
    assert len(set(made)) == STEPS
    other = TrialLoop(Single, CPU, folder=tmp_path, resumes=True)
    assert other.run() == losses[SAVED:]
    assert other.digest() == loop.digest()
    changed = torch.load(tmp_path / "saved-0.pt", weights_only=True)
    moments = next(m for m in changed["moments"].values() if m)
    moments["exp_avg"] = moments["exp_avg"] * 1.001
    torch.save(changed, tmp_path / "saved-0.pt")
    third = TrialLoop(Single, CPU, folder=tmp_path, resumes=True)
    third.run()
    assert third.digest() != loop.digest()


def test_a_trainers_loop_is_the_hand_written_one_and_resumes_to_the_bit(tmp_path):
    """Without an engine, so that it needs no DeepSpeed: batches, schedule and optimizer are the same."""
    by_trainer = import_module("hf_drt.doctor.trainer_loop")
    loop, made = by_trainer.TrainerLoop({}, CPU, 1, tmp_path), []
    losses = loop.run(after=lambda: made.append(loop.digest()))
    assert len(set(made)) == STEPS
    by_hand = TrialLoop(Single, CPU)
    assert by_hand.run() == pytest.approx(losses, abs=1e-6)
    dense, expected = loop.dense(), by_hand.dense()
    assert dense.keys() == expected.keys()
    assert all(torch.allclose(dense[name], W, atol=1e-6) for name, W in expected.items())
    other = by_trainer.TrainerLoop({}, CPU, 1, tmp_path, resumes=True)
    other.run()
    assert other.digest() == loop.digest()
    assert len(by_trainer.TrainerLoop({}, CPU, 1, tmp_path / "short").run(3)) == 3


class OfLibrary(Single):
    help = "an engine that inherits how another is begun"


class Bare(Single):
    help = "an engine that says nothing of how it is begun"
    begun = Engine.begun


def test_an_engine_that_a_loop_cannot_begin_is_left_out_with_the_reason():
    assert ByHand(Single).left_out(CPU, quick=True) is None
    assert ByHand(OfLibrary).left_out(CPU, quick=False).startswith("OfLibrary is not begun by what it inherits")
    assert "is begun by its own library" in ByHand(Bare).left_out(CPU, quick=False)


# ---- engines that a Trainer begins


class ByLibrary(Single):
    help = "an engine of two ways, that a Trainer begins"

    @classmethod
    def trainer_settings(cls):
        return {"way-1": {"seed": 1}, "way-2": {"seed": 2}}


def test_each_way_of_an_engine_that_a_trainer_begins_is_tried(monkeypatch):
    module = import_module("hf_drt.doctor.trials")
    monkeypatch.setattr(module, "import_engines", lambda: {"toy": ImportError("No module named 'toy'")})
    ENGINES.add("library", ByLibrary)
    try:
        found = dict(module.trials())
    finally:
        ENGINES.remove("library")
    assert found["single"] == ByHand(Single)
    assert (found["way-1"], found["way-2"]) == (ByTrainer({"seed": 1}), ByTrainer({"seed": 2}))
    assert "library" not in found
    assert found["toy"].left_out(CPU, quick=False) == "not installed (ImportError: No module named 'toy')"


def test_a_quick_look_leaves_out_what_may_compile():
    why = ByTrainer({}).left_out(CPU, quick=True)
    assert why == "its library may compile at its first use, which takes minutes: leave --quick out"


@pytest.mark.parametrize("below", ["", "py311_cpu"])
def test_a_lock_that_was_left_is_told_and_not_waited_for(monkeypatch, tmp_path, below):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert ByTrainer({}).left_out(CPU, quick=False) is None
    lock = tmp_path / below / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert extensions.compiling()
    assert ByTrainer({}).left_out(CPU, quick=False) is None
    old = time.time() - extensions.COMPILES - 60
    os.utime(lock, (old, old))
    assert not extensions.compiling()
    assert ByTrainer({}).left_out(CPU, quick=False) == (
        "a process that was killed has left a file, deepspeed_shm_comm/lock, where torch keeps extensions (21 minutes "
        "ago), and DeepSpeed waits until it is gone: delete it"
    )


def test_a_process_that_compiles_has_more_time(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    code = """
        import pathlib, time
        lock = pathlib.Path("EXTENSIONS/some/lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        time.sleep(2)
        lock.unlink()
        time.sleep(HANGS)
    """.replace("EXTENSIONS", str(tmp_path / "extensions"))
    assert scripted(tmp_path, code.replace("HANGS", "0"), 1, seconds=1) is None
    assert scripted(tmp_path, code.replace("HANGS", "100"), 1, seconds=1) == "process 0 had not ended after 1 s"


def test_the_time_begins_anew_with_each_row(tmp_path):
    code = f"""
        import pathlib, time
        for step in range(8):
            time.sleep(0.4)
            with pathlib.Path({str(tmp_path / "seen-0.jsonl")!r}).open("a") as file:
                file.write("row")
        time.sleep(HANGS)
    """
    assert scripted(tmp_path, code.replace("HANGS", "0"), 1, seconds=2) is None
    assert scripted(tmp_path, code.replace("HANGS", "100"), 1, seconds=2) == "process 0 had not ended after 2 s"


def test_a_process_that_is_ended_puts_things_in_order(tmp_path):
    lock = tmp_path / "lock"
    code = f"""
        import pathlib, signal, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as the worker does
        lock = pathlib.Path({str(lock)!r})
        try:
            lock.touch()
            pathlib.Path({str(tmp_path / "held")!r}).touch()
            time.sleep(100)
        finally:
            lock.unlink()
    """
    assert scripted(tmp_path, code, 1, seconds=2).startswith("process 0 had not ended after 2 s")
    assert (tmp_path / "held").exists()
    assert not lock.exists()


def test_what_the_processes_saw_is_judged(monkeypatch, tmp_path):
    """Rows of processes that drift, differ from one process and resume with other bits."""
    processes = sys.modules["hf_drt.doctor.processes"]
    launch = import_module("hf_drt.doctor.launch")
    dense = {name: W * 1.01 for name, W in processes._alone(CPU).items()}

    def seen(task, device, count, folder, skip, quick=False):
        if task == "resume":
            assert set(skip) == {"single", "toy", "fsdp2"}
            return launch.Seen({"ddp": {"engine": "ddp", "digests": ["b", "b"]}})
        (folder / "ddp").mkdir()
        torch.save(dense, folder / "ddp" / "dense.pt")
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
    found = {f.what: f for f in examine("engines", Bench(CPU, True)).findings}
    assert {found[name].result for name in ("single", "ddp", "fsdp2")} == {Result.HELD}
    if "deepspeed" not in found:  # it is installed
        assert {(found[f"zero{stage}"].result, found[f"zero{stage}"].seen) for stage in (1, 2, 3)} == {
            (Result.NOT_TRIED, ByTrainer({}).left_out(CPU, quick=True))
        }


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
    assert launch.Spec(**json.loads((tmp_path / "spec.json").read_text())) == launch.Spec("start", "cpu", 1, [], False)


@pytest.mark.slow
def test_an_engine_begun_by_its_library_that_gives_layers_other_weights_is_found(tmp_path):
    """ZeRO with new parameters that are a hundredth too large."""
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent("""
        import os, pathlib, sys
        import torch
        from hf_drt.doctor.worker import main
        from hf_drt.engines import parts_of_zero
        Zero = parts_of_zero().Zero
        made = Zero._made
        Zero._made = lambda engine, W, dtype: made(engine, torch.nn.Parameter(W * 1.01, W.requires_grad), dtype)
        main(pathlib.Path(sys.argv[1]), int(os.environ["RANK"]))
        sys.stdout.flush()
        os._exit(0)
        """)
    )
    processes = sys.modules["hf_drt.doctor.processes"]
    others = ["single", "ddp", "fsdp2", "zero1", "zero3"]
    seen = each_engine("train", "cpu", 2, tmp_path, [str(script)], skip=others)
    assert seen.errors == {}
    dense = torch.load(tmp_path / "zero2" / "dense.pt", weights_only=True)
    finding = processes._as_one("zero2", dense, processes._alone(CPU))
    assert (finding.what, finding.result) == ("zero2: as one process", Result.FAILED)
