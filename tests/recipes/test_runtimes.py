"""Linear pairs in other runtimes, at low-rank size; and the traps that docs/runtimes.md names.

Slow, and of packages that are installed beside those of the tests; ``recipes/runtimes.py`` names them.
"""

import importlib.util

import pytest
import runtimes
import torch

pytestmark = pytest.mark.slow


def needs(*modules: str):
    """Skip a test where a runtime is not installed."""
    lost = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(lost), reason=f"{', '.join(lost)}: {runtimes.INSTALL}")


ONNX = needs("onnx", "onnxscript", "onnxruntime")


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return runtimes.save_both(tmp_path_factory.mktemp("models"), width=256, rank_ratio=0.25)


@pytest.mark.parametrize(
    "runtime",
    [
        "pytorch",
        pytest.param("onnxruntime", marks=ONNX),
        pytest.param("openvino", marks=needs("openvino")),
        pytest.param("executorch", marks=needs("executorch")),
    ],
)
@torch.no_grad()
def test_a_runtime_gives_the_same_logits_at_low_rank_size(forms, tmp_path, runtime):
    row = runtimes.measure(runtime, forms, tmp_path, passes=1)
    assert row["difference"] <= 8e-6
    saved = (runtimes.weights_in(forms["dense"]) - runtimes.weights_in(forms["pairs"])) / 1e6
    assert row["dense MB"] - row["pairs MB"] == pytest.approx(saved, rel=0.15)


@ONNX
@torch.no_grad()
def test_a_saved_optimized_model_wants_the_data_file_of_the_first_export(forms, tmp_path):
    import onnxruntime as ort

    (tmp_path / "first").mkdir()
    (tmp_path / "moved").mkdir()
    ids = torch.ones(2, 8, dtype=torch.long)
    runtimes.in_onnxruntime(runtimes.load(forms["pairs"]), ids, tmp_path / "first")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "first" / "optimized.onnx")
    ort.InferenceSession(tmp_path / "first" / "model.onnx", options, providers=["CPUExecutionProvider"])
    ort.InferenceSession(tmp_path / "first" / "optimized.onnx", providers=["CPUExecutionProvider"])
    moved = (tmp_path / "first" / "optimized.onnx").rename(tmp_path / "moved" / "optimized.onnx")
    with pytest.raises(Exception, match=r"model\.onnx\.data"):
        ort.InferenceSession(moved, providers=["CPUExecutionProvider"])


@needs("openvino")
@torch.no_grad()
def test_openvino_does_not_trace_a_llama_without_a_mask(forms):
    import openvino as ov

    class WithoutMask(runtimes.Logits):
        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    module = WithoutMask(runtimes.load(forms["pairs"]).model).eval()
    with pytest.raises(Exception, match=r"aten::diff"):
        ov.convert_model(module, example_input=(torch.ones(2, 8, dtype=torch.long),))


@needs("openvino")
@torch.no_grad()
def test_in_openvino_rows_are_padded_on_the_right(forms):
    import openvino as ov

    module = runtimes.load(forms["pairs"])
    ids, mask = torch.arange(16)[None], torch.ones(1, 16, dtype=torch.long)
    traced = ov.convert_model(module, example_input=(ids, mask))
    compiled = ov.Core().compile_model(traced, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    left, right = mask.clone(), mask.clone()
    left[0, :5] = right[0, 11:] = 0
    seen = torch.from_numpy(compiled([ids.numpy(), right.numpy()])[0])
    assert (seen - module(ids, right))[right.bool()].abs().max() <= 8e-6
    assert torch.from_numpy(compiled([ids.numpy(), left.numpy()])[0]).isnan().all()
    assert module(ids, left).isfinite().all()
