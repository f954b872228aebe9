"""What the benchmarks keep in a cache folder is there complete or not at all."""

import pytest
from kept import kept


def test_a_file_is_there_at_the_end_and_not_before(tmp_path):
    path = tmp_path / "new folder" / "text.npz"
    with kept(path) as part:
        part.write_text("half")
        assert part.suffix == ".npz" and not path.exists()
    assert path.read_text() == "half" and list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_nothing(tmp_path):
    for make in (lambda part: part.write_text("half"), lambda part: part.mkdir(), lambda part: None):
        with pytest.raises(OSError, match="disk full"), kept(tmp_path / "data") as part:
            make(part)
            raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_of_two_processes_that_make_the_same_both_succeed(tmp_path, monkeypatch):
    """The second one writes as the first one is not ready yet, and is ready after it."""
    monkeypatch.setattr("os.getpid", iter((1, 2, 3, 4)).__next__)
    for name, put in (("file", lambda part: part.write_text("x")), ("folder", lambda part: part.mkdir())):
        with kept(tmp_path / name) as slow:
            put(slow)
            with kept(tmp_path / name) as fast:
                assert fast != slow
                put(fast)
        assert (tmp_path / name).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
