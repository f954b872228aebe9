"""A low-rank model in other runtimes: ONNX Runtime, OpenVINO and ExecuTorch, against the dense model there.

    pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 openvino==2026.4.1 executorch==1.5.1
    python recipes/runtimes.py [--runtimes onnxruntime openvino executorch] [--width 256] [--rank_ratio 0.25]

What it shows: a small Llama with random weights, its linear layers in factors, is saved in linear pairs and, merged, as
a dense model. Each runtime gets both: size of the files, largest difference of the logits from those of the native
model in PyTorch, and time of a forward pass, a median of passes of both models in turns. One thread. Random weights are
enough: neither size nor time depends on their values. Seconds on a shared machine are noisy; the ratio less so.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from missing_extra import wanted
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_drt import Factored, convert, declare, find_targets, save_linear_pairs
from hf_drt.export import save_export
from hf_drt.targets import Swap, replace

Run = Callable[[Tensor], Tensor]


class Logits(nn.Module):
    """What is exported: token ids ``(batch, length)`` to logits, without a cache."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@dataclass(frozen=True)
class Exported:
    """A model in a runtime: how it is run, and the bytes of its files."""

    run: Run
    size: int


def in_onnxruntime(module: Logits, ids: Tensor, folder: Path) -> Exported:
    """By ``torch.export`` to ONNX. The weights lie in a data file beside the graph: keep the two together, and with a
    saved optimized model too, which refers to the first export's data file."""
    ort = wanted("onnxruntime", "recipes", INSTALL)
    wanted("onnxscript", "recipes", INSTALL)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=LONGEST)}
    path = folder / "model.onnx"
    torch.onnx.export(
        module, (ids, torch.ones_like(ids)), path, dynamo=True, external_data=True, verbose=False,
        input_names=["ids", "mask"], output_names=["logits"], dynamic_shapes={"ids": sizes, "mask": sizes},
    )  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(ids: Tensor) -> Tensor:
        inputs = {"ids": ids.numpy(), "mask": torch.ones_like(ids).numpy()}
        return torch.from_numpy(session.run(["logits"], inputs)[0])

    return Exported(run, weights_in(folder))


def in_openvino(module: Logits, ids: Tensor, folder: Path) -> Exported:
    """By tracing. The example has a mask, of ones: without one transformers looks for packed sequences in the
    positions, by ``aten::diff``, which OpenVINO cannot convert. Weights are saved in 16 bits unless told otherwise."""
    ov = wanted("openvino", "recipes", INSTALL)
    traced = ov.convert_model(module, example_input=(ids, torch.ones_like(ids)))
    path = folder / "model.xml"
    ov.save_model(traced, path, compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(path, "CPU", settings)
    return Exported(
        lambda ids: torch.from_numpy(compiled([ids.numpy(), torch.ones_like(ids).numpy()])[0]), weights_in(folder)
    )


def in_executorch(module: Logits, ids: Tensor, folder: Path) -> Exported:
    """By ``torch.export``, its linear layers lowered to XNNPACK; a program of these very sizes of batch and length."""
    exir = wanted("executorch.exir", "recipes", INSTALL)
    partitioner = wanted("executorch.backends.xnnpack.partition.xnnpack_partitioner", "recipes", INSTALL)
    program = torch.export.export(module, (ids, torch.ones_like(ids)))
    edge = exir.to_edge_transform_and_lower(program, partitioner=[partitioner.XnnpackPartitioner()])
    (folder / "model.pte").write_bytes(edge.to_executorch().buffer)
    runtime = wanted("executorch.runtime", "recipes", INSTALL).Runtime.get()
    method = runtime.load_program(folder / "model.pte").load_method("forward")
    return Exported(lambda ids: method.execute([ids, torch.ones_like(ids)])[0].clone(), weights_in(folder))


def in_pytorch(module: Logits, ids: Tensor, folder: Path) -> Exported:
    """The model itself, to compare with."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())
    return Exported(lambda ids: module(ids, torch.ones_like(ids)), size)


RUNTIMES = {
    "pytorch": in_pytorch,
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
    "executorch": in_executorch,
}
INSTALL = "pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 openvino==2026.4.1 executorch==1.5.1"
LONGEST = 256  # tokens


def weights_in(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def save_both(folder: Path, width: int, rank_ratio: float) -> dict[str, Path]:
    """A Llama of two blocks in factors of that share of each layer's smaller side: in linear pairs, and merged."""
    torch.manual_seed(0)
    size = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, num_attention_heads=width // 64, max_position_embeddings=LONGEST, **size)
    )
    swaps = []
    for name, layer in find_targets(model).targets.items():
        rank = max(1, round(rank_ratio * min(layer.weight.shape)))
        swaps.append(Swap(name, layer, convert(layer, Factored(rank)).module))
    replace(model, swaps)
    declare(model)
    save_linear_pairs(model, folder / "pairs")
    save_export(model, str(folder / "dense"), "dense", lambda where, state: model.save_pretrained(where))
    model.save_pretrained(folder / "native")
    return {form: folder / form for form in ("pairs", "dense", "native")}


def load(folder: Path) -> Logits:
    """A model as any user of the runtime loads it."""
    return Logits(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).eval()


def seconds(runs: list[Run], ids: Tensor, passes: int) -> list[float]:
    """Median time of a forward pass of each, in turns, after two that are not counted."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(passes + 2):
        for run, taken in zip(runs, times, strict=True):
            started = time.perf_counter()
            run(ids)
            if turn >= 2:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def measure(runtime: str, forms: dict[str, Path], folder: Path, passes: int) -> dict[str, float]:
    """One row: sizes in MB, largest difference from the native model, milliseconds of 4 x 64 tokens."""
    ids = torch.randint(0, 1024, (4, 64), generator=torch.Generator().manual_seed(0))
    expected = load(forms["native"])(ids, torch.ones_like(ids))
    exported = {}
    for form in ("pairs", "dense"):
        place = folder / f"{runtime}-{form}"
        place.mkdir()
        exported[form] = RUNTIMES[runtime](load(forms[form]), ids, place)
    pairs, dense = exported["pairs"], exported["dense"]
    times = seconds([pairs.run, dense.run], ids, passes)
    return {
        "pairs MB": pairs.size / 1e6,
        "dense MB": dense.size / 1e6,
        "size": pairs.size / dense.size,
        "difference": (pairs.run(ids) - expected).abs().max().item(),
        "pairs ms": 1e3 * times[0],
        "dense ms": 1e3 * times[1],
        "time": times[0] / times[1],
    }


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--width", type=int, default=256, help="hidden size, a multiple of 64")
    parser.add_argument("--rank_ratio", type=float, default=0.25, help="rank of each layer / its smaller side")
    parser.add_argument("--passes", type=int, default=11, help="timed forward passes")
    chosen = parser.parse_args()
    if chosen.width < 64 or chosen.width % 64:
        parser.error(f"--width must be a multiple of 64, got {chosen.width}.")
    if not 0 < chosen.rank_ratio <= 1:
        parser.error(f"--rank_ratio must be in (0, 1], got {chosen.rank_ratio}.")
    if chosen.passes < 1:
        parser.error(f"--passes must be at least 1, got {chosen.passes}.")
    torch.set_num_threads(1)
    print("| runtime | pairs, MB | dense, MB | size | largest difference | pairs, ms | dense, ms | time |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forms = save_both(folder, chosen.width, chosen.rank_ratio)
        for runtime in chosen.runtimes:
            row = measure(runtime, forms, folder, chosen.passes)
            cells = (
                f"{row['pairs MB']:.1f}", f"{row['dense MB']:.1f}", f"{row['size']:.2f}", f"{row['difference']:.1e}",
                f"{row['pairs ms']:.1f}", f"{row['dense ms']:.1f}", f"{row['time']:.2f}",
            )  # fmt: skip
            print(f"| {runtime} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
