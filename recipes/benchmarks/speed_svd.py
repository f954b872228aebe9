"""Truncated SVD by each of its ways against torch.linalg.svd: seconds, and how far each is from the best truncation.

    python recipes/benchmarks/speed_svd.py [--shapes 768x768 2048x768 3072x768]

What it shows, in CPU seconds on one thread, medians of rounds in which all ways have their turn: for a random matrix
and for one whose singular values fall as 1 / sqrt(i), the time of subspace iteration, of the Gram matrix and of a full
SVD, and the relative excess of the Frobenius error over that of the full SVD. `hf_drt.linalg` chooses by these
timings; its choice is marked. A second table has the time of all singular values, as an effective rank needs them.
"""

import itertools

import speed_kit as kit
import torch
from torch import Tensor

from hf_drt.linalg import truncation
from hf_drt.linalg.spectral import gram_singular_values


def matrices(shape: tuple[int, int]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    W = torch.randn(shape)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return {"random": W, "1 / sqrt(i)": U * torch.arange(1, len(S) + 1).rsqrt() @ Vh}


def tall(W: Tensor) -> Tensor:
    return W if W.shape[0] >= W.shape[1] else W.mT


def compared(name: str, W: Tensor, rank: int, rounds: int) -> list[str]:
    """One row: time of each way, and the excess of the cheap ones."""
    ways = {"iteration": truncation._randomized, "Gram": truncation._gram}
    works = {way: lambda f=f: f(tall(W), rank) for way, f in ways.items()}
    seconds = kit.interleaved(works | {"full": lambda: torch.linalg.svd(W, full_matrices=False)}, rounds)
    values = torch.linalg.svdvals(W.double())
    best = (values[rank:].square().sum() / values.square().sum()).sqrt().item()
    chosen = next((f for f in truncation._cheap_ways(W, rank)), None)
    cells = []
    for way, f in ways.items():
        parts = f(tall(W), rank)
        excess = "refused" if parts is None else f"{parts.error.item() / best - 1:.0e}"
        cells += [f"{1e3 * seconds[way]:.0f}{' *' if f is chosen else ''}", excess]
    full = f"{1e3 * seconds['full']:.0f}{' *' if chosen is None else ''}"
    return [f"{W.shape[0]} x {W.shape[1]}", name, str(rank), f"{best:.3f}", *cells, full]


def main(arguments: list[str] | None = None) -> None:
    parser = kit.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["768x768", "2048x768", "3072x768"])
    parser.add_argument("--shares", type=int, nargs="+", default=[48, 16, 8, 4, 2], help="min(m, n) over the rank")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, spectra = [], []
    for shape in [tuple(map(int, text.split("x"))) for text in chosen.shapes]:
        for (name, W), share in itertools.product(matrices(shape).items(), chosen.shares):
            rows.append(compared(name, W, max(min(shape) // share, 1), chosen.rounds))
        for name, W in matrices(shape).items():
            works = {"svdvals": lambda W=W: torch.linalg.svdvals(W), "Gram": lambda W=W: gram_singular_values(W)}
            seconds = kit.interleaved(works, chosen.rounds)
            spectra.append([f"{shape[0]} x {shape[1]}", name, *(f"{1e3 * s:.0f}" for s in seconds.values())])
    header = ["shape", "singular values", "rank", "error", "iteration ms", "excess", "Gram ms", "excess", "full ms"]
    kit.show("Truncated SVD; * is what hf_drt takes", header, rows)
    kit.show("All singular values", ["shape", "singular values", "svdvals ms", "gram_singular_values ms"], spectra)


if __name__ == "__main__":
    main()
