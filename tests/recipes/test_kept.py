"""What the benchmarks keep in a cache folder is there complete or not at all."""

import pytest
from kept import kept


def test_a_file_is_there_at_the_end_and_not_before(tmp_path):
    path = tmp_path / "new folder" / "text.npz"
    with kept(path) as part:
        part.write_text("half")
        assert part.suffix == ".npz"
        assert not path.exists()
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("make", [lambda part: part.write_text("half"), lambda part: part.mkdir(), lambda part: None])
def test_a_failure_leaves_nothing(make, tmp_path):
    def fail():
        with kept(tmp_path / "data") as part:
            make(part)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
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
