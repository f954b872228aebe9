"""Forked programs are what they stand for: programs of their own, and processes as torchrun starts them."""

import os
import subprocess
import sys

import forked
import pytest

GROUP = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
ranks = [None] * dist.get_world_size()
dist.all_gather_object(ranks, (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]))
print(ranks)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "import sys; print(sys.argv, __name__); print('no', file=sys.stderr); sys.exit(3)", "a", "b"],
        ["-c", "print('before'); raise SystemExit('words')"],
        ["-m", "json.tool", "--nothing"],
    ],
    ids=["code", "a message", "module"],
)
def test_status_and_output_are_those_of_a_program(words):
    real = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    done = forked.python(*words)
    assert (done.returncode, done.stdout, done.stderr) == (real.returncode, real.stdout, real.stderr)


def test_a_script_has_its_folder_on_the_path_and_nothing_of_hf_drt(tmp_path):
    (tmp_path / "beside.py").write_text("name = 'beside'")
    script = tmp_path / "script.py"
    script.write_text(
        "import beside, os, sys, torch\n"
        "print(beside.name, sys.argv[1:], os.environ['OWN'], torch.get_num_threads())\n"
        "print([name for name in sys.modules if name.startswith('hf_drt')])\n"
    )
    assert forked.python(script, 1, OWN="set").stdout == "beside ['1'] set 1\n[]\n"


def test_the_processes_of_a_group_find_each_other():
    done = forked.distributed("-c", GROUP, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == 2 * "[('0', '0', '2'), ('1', '1', '2')]\n"


def test_if_one_process_fails_the_others_are_ended(tmp_path):
    code = (
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "sys.exit('of the second') if os.environ['RANK'] == '1' else time.sleep(600)"
    )
    done = forked.distributed("-c", code, processes=2)
    assert (done.returncode, done.stderr) == (1, "of the second\n")
    assert not (tmp_path / "0").exists() or not os.path.exists(f"/proc/{(tmp_path / '0').read_text()}")


def test_a_program_that_does_not_end_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        forked.python("-c", "import time; time.sleep(600)", timeout=0.5)
