"""The picture of loss over size: its marks and its words."""

import pytest

pytest.importorskip("matplotlib")

from hf_drt.report import write_size_curve


def test_it_has_the_line_the_model_as_it_was_and_the_marks(tmp_path):
    path = tmp_path / "curve.svg"
    write_size_curve([4_000_000, 3_000_000, 2_000_000], [1.0, 1.5, 3.0], {"recovered": (2_000_000, 1.8)}, path)
    text = path.read_text()
    for words in ("parameters of the target layers, millions", "loss", "as it was", "compressed", "recovered"):
        assert f"<!-- {words} -->" in text
    again = tmp_path / "again.svg"
    write_size_curve([4_000_000, 3_000_000, 2_000_000], [1.0, 1.5, 3.0], {"recovered": (2_000_000, 1.8)}, again)
    assert again.read_text() == text
    write_size_curve([2, 1], [1.0, 2.0], {}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
