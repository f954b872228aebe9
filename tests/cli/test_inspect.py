"""``hf-drt inspect``."""

import json

import pytest
import tiny

from hf_drt.inspect.checkpoint import read_checkpoint


def test_a_training_checkpoint(hf_drt, checkpoint):
    folder = checkpoint() / "checkpoint-2"
    result = hf_drt("inspect", folder)
    assert result.code == 0
    lines = result.out.splitlines()
    assert "training checkpoint" in lines[0]
    assert lines[1] == "plan: factored@0 adapter@2 over 4 update steps; in phase 0 (factored@0)"
    row = next(line for line in lines if line.startswith("model.layers.0.mlp.up_proj")).split()
    spectrum = next(layer for layer in read_checkpoint(folder).layers if layer.name == row[0]).spectrum()
    assert row[1:6] == ["factored", "64", "x", "32", "8"]
    assert row[6:8] == [f"{spectrum.effective_rank:.1f}", f"{spectrum.stable_rank:.1f}"]
    assert row[-4:] == [f"{spectrum.error(share):.4f}" for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2)]
    assert result.out.isascii()


def test_curves_forms_and_selection(hf_drt, checkpoint):
    folder = checkpoint() / "checkpoint-4"
    curves = hf_drt("inspect", folder, "--curves", "--include", "mlp").out
    assert "energy at 1/4" in curves
    assert "self_attn" not in curves
    forms = hf_drt("inspect", folder, "--forms", "--exclude", "mlp").out
    assert "adapter" in forms
    assert "effective" not in forms
    assert "mlp" not in forms


def test_json_holds_all_singular_values(hf_drt, tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    data = json.loads(hf_drt("inspect", tmp_path, "--json").out)
    assert (data["kind"], data["plan"], len(data["layers"])) == ("dense model", None, 14)
    assert all(len(layer["singular_values"]) == 32 for layer in data["layers"])
    assert data["layers"][0]["truncations"][0] == {"error": 0.01, "form": "dense"}


def test_truncations_add_up(hf_drt, checkpoint):
    lines = hf_drt("inspect", checkpoint() / "checkpoint-2").out.splitlines()
    rows = [line.split() for line in lines[lines.index("") :] if line.strip().startswith("0.")]
    # factors of rank 8 hold all there is: 4 of 32 x 32 and 3 of 64 x 32 in each of two blocks
    factors, dense = 2 * 8 * (4 * 64 + 3 * 96), 2 * (4 * 32 * 32 + 3 * 64 * 32)
    assert rows[0] == ["0.01", "14", "of", "14", f"{factors:,}", f"{factors / dense:.3f}"]


def test_a_picture(hf_drt, tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    assert hf_drt("inspect", tmp_path, "--picture", tmp_path / "curves.png").code == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("/no/such",), 1, "there is no such path: /no/such"),
        (("nobody/no-model",), 1, "it could not be fetched from the Hub"),
        (("{folder}", "--include", "("), 2, "is not a regular expression"),
        (("{folder}", "--include", "nothing"), 1, "none of the 14 layers is left by --include and --exclude"),
    ],
)
def test_errors(hf_drt, tmp_path, arguments, code, message):
    tiny.llama().save_pretrained(tmp_path)
    result = hf_drt("inspect", *(argument.format(folder=tmp_path) for argument in arguments))
    assert result.code == code
    assert message in " ".join(result.err.split())


def test_not_a_checkpoint_and_a_newer_one(hf_drt, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    result = hf_drt("inspect", tmp_path / "empty")
    assert (result.code, "is not a checkpoint" in result.err) == (1, True)
    folder = checkpoint() / "checkpoint-2"
    state = json.loads((folder / "drt_state.json").read_text())
    (folder / "drt_state.json").write_text(json.dumps(state | {"format_version": 2}))
    for command in (("inspect", folder), ("export", folder, tmp_path / "out"), ("compare", folder, folder)):
        result = hf_drt(*command)
        assert (result.code, result.out) == (1, "")
        assert "has format version 2; this hf_drt reads 1 to 1. Upgrade hf_drt." in result.err
    (folder / "drt_state.json").write_text(json.dumps(state | {"plan": "dnse@0"}))
    assert "its plan 'dnse@0' cannot be read" in hf_drt("inspect", folder).err
