"""A state file that cannot be read is refused, and one that cannot be written leaves the old one."""

import json

import pytest

from hf_drt import (
    CheckpointError,
)
from hf_drt.checkpoint.state_file import STATE_NAME, read_state, write_state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no drt_state\.json: it was not written by dynamic-rank training, or not completely\. Resume from"),
        ("", r"drt_state\.json is damaged \(.*\)\. Resume from another checkpoint"),
        ('{"format_version": 1,', r"drt_state\.json is damaged \(.*\)\. Resume from another checkpoint"),
        ("[]", r"drt_state\.json is damaged \(no JSON object\)\. Resume from another checkpoint"),
        ("1", r"drt_state\.json is damaged \(no JSON object\)"),
        ("{}", r"has format version None: it is damaged\. Resume from another checkpoint"),
        ('{"format_version": 2}', r"has format version 2; this hf_drt reads 1 to 1\. Upgrade hf_drt"),
        ('{"format_version": 0}', r"has format version 0: it is damaged\. Resume from another checkpoint"),
        ('{"format_version": 1.0}', r"has format version 1\.0: it is damaged\. Resume from another checkpoint"),
    ],
)
def test_a_state_file_that_cannot_be_read_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / STATE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path)


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_state(tmp_path, {"phase": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_state(tmp_path, {"phase": object()})
    assert read_state(tmp_path) == {"phase": 1}
    assert json.loads((tmp_path / STATE_NAME).read_text())["format_version"] == 1


def test_a_state_that_cannot_be_written_leaves_no_rest_behind(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_state(tmp_path, {"phase": object()})
    assert list(tmp_path.iterdir()) == []
