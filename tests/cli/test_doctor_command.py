"""``hf-drt doctor``: tables in a terminal and in a pipe, JSON, exit codes, and names that are refused."""

import getpass
import json
import platform
from pathlib import Path

import pytest

from hf_drt.doctor import CHECKS, Check, found, not_tried


@pytest.fixture
def toys():
    """Checks of which one fails."""
    CHECKS.add("fine", Check("a toy that holds", lambda bench: [found("a", True, "1.0"), not_tried("b", "none here")]))
    CHECKS.add(
        "broken", Check("a toy that fails", lambda bench: [found("c", False, "2.0, and may be 1.0", {"x": 2.0})])
    )
    yield
    CHECKS.remove("fine")
    CHECKS.remove("broken")


@pytest.mark.usefixtures("toys")
def test_a_pipe_gets_plain_columns_and_the_exit_code_says_whether_all_held(hf_drt):
    done = hf_drt("doctor", "--only", "fine", "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    assert "what  result     seen\na     held       1.0\nb     not tried  none here\n" in done.out
    assert "1 held, 0 failed, 1 not tried; 0 s" in done.out
    done = hf_drt("doctor", "--only", "fine", "--only", "broken")
    assert done.code == 1
    assert done.out.splitlines()[-1] == "failed: broken: c: 2.0, and may be 1.0"
    assert done.out.isascii()


@pytest.mark.usefixtures("toys")
def test_json_holds_the_numbers(hf_drt):
    done = hf_drt("doctor", "--only", "broken", "--only", "fine", "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert report["counts"] == {"held": 1, "failed": 1, "not tried": 1}
    assert [check["check"] for check in report["checks"]] == ["fine", "broken"]
    assert report["checks"][1]["findings"] == [
        {"what": "c", "result": "failed", "seen": "2.0, and may be 1.0", "values": {"x": 2.0}}
    ]


def test_a_quick_look_tells_nobody_who_and_where(hf_drt):
    done = hf_drt("doctor", "--quick", "--only", "versions", "--only", "devices", "--json", "--device", "cpu")
    assert done.code == 0
    private = {getpass.getuser(), platform.node(), str(Path.home()), str(Path.cwd())} - {"root", "localhost"}
    assert not [word for word in private if word in done.out]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "form"), "Invalid value for --only / --except: check must be one of versions, devices, deco"),
        (("--except", "all"), "got 'all'"),
        (("--only", "forms", "--except", "forms"), "no check is left: forms without forms."),
        (("--device", "abacus"), "Invalid value for --device: there is no device 'abacus' here; there are"),
    ],
)
def test_wrong_names_are_refused(hf_drt, words, message):
    done = hf_drt("doctor", *words)
    assert done.code == 2
    assert message in " ".join(done.err.split())


@pytest.mark.usefixtures("toys")
def test_a_terminal_gets_a_table_with_colours(hf_drt, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = hf_drt("doctor", "--only", "broken").out
    assert "\x1b[1;31m" in out
    assert "failed: broken: c" in out
