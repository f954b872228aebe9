"""How fast chips compute and links send: rows for well-known machines, or a user's own file."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_drt.simulate.processes.ring import Ring

ORIGINS = ("assumed", "measured")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Link:
    """What one device sends, in one direction, while all do: bytes per second; and seconds until the first arrives."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """One kind of node, any number of which a network joins.

    Attributes:
        name: As a message or table has it.
        origin: 'measured', or 'assumed' where the figures are those of data sheets or guesses.
        source: Where they come from.
        devices: In a node.
        memory: Bytes of a device; None where they are not given.
        flops: Of a device per second, by dtype of the products, as its data sheet has them (dense, not sparse).
        utilisation: Share of them that training reaches, in (0, 1].
        decomposition: ``k^3`` per second in the eigenvalue decomposition of a ``k x k`` matrix, of float32.
        node: Link of a device to the others in its node.
        network: Link of a device to other nodes; the devices of a node send over theirs at once.
    """

    name: str
    origin: str
    source: str
    devices: int
    memory: int | None
    flops: Mapping[str, float]
    utilisation: float
    decomposition: float
    node: Link
    network: Link

    def ring(self, count: int, stride: int = 1) -> Ring:
        """A ring of so many processes, of which each is ``stride`` ranks from the next.

        Ranks fill one node after the other. Inside a node a device sends at the speed of its link there. A ring across
        nodes has ``k`` processes in each, and sends over the network links of ``k`` devices: as many rings as there are
        processes between two of its own run at once. So a device sends at most ``k`` times its network link's speed.
        """
        if (count - 1) * stride < self.devices:
            return Ring(count, self.node.bandwidth, self.node.latency)
        together = max(1, self.devices // stride)
        across = together * self.network.bandwidth
        speed = min(self.node.bandwidth, across) if together > 1 else across
        # On the way round, one step in k goes to another node.
        return Ring(count, speed, (self.network.latency + (together - 1) * self.node.latency) / together)

    def decompose(self, order: int, flops: float) -> float:
        """Seconds of the eigenvectors of a symmetric matrix of this order, and of so many FLOPs in products beside it.

        Raises:
            ValueError: The table has no speed of products in float32.
        """
        return order**3 / self.decomposition + self.compute(flops, "float32")

    def compute(self, flops: float, dtype: str) -> float:
        """Seconds of so many FLOPs in training.

        Raises:
            ValueError: The table has no speed of products in this dtype.
        """
        if dtype not in self.flops:
            raise ValueError(
                f"{self.name} has no FLOPs per second of {dtype}, only of {', '.join(self.flops)}. Add it to the "
                "table of --links."
            )
        return flops / (self.flops[dtype] * self.utilisation)


# FLOP/s are dense, and those of float32 without TF32, which PyTorch does not use unless it is told to. Bandwidths are
# one direction's: half of what data sheets give for both. The share of the FLOPs that training reaches is that of
# Llama 3 405B on up to 16,384 H100, 38 to 43 % in bfloat16 (arXiv 2407.21783, table 4). Latencies and the speed of
# decompositions are in no data sheet, and guesses: of the latter, that 8192 x 8192 takes some five seconds on an H100.
_UTILISATION = 0.4
_NOT_GIVEN = "latencies and decompositions guessed"


def _sheet(
    name: str, sheet: str, memory: int, bf16: float, fp32: float, decomposition: float, node: float, network: float
) -> Machine:
    """A node of eight, by data sheets: GB, TFLOP/s, GB/s."""
    return Machine(
        name, "assumed", f"{sheet}; {_NOT_GIVEN}", 8, memory * 10**9, {"bfloat16": bf16 * 1e12, "float32": fp32 * 1e12},
        _UTILISATION, decomposition, Link(node * 1e9, 3e-6), Link(network * 1e9, 1e-5),
    )  # fmt: skip


MACHINES = {
    machine.name: machine
    for machine in (
        _sheet("a100", "NVIDIA A100 80GB SXM and DGX A100 data sheets", 80, 312, 19.5, 5e10, 300, 25),
        _sheet("h100", "NVIDIA H100 SXM and DGX H100 data sheets", 80, 989, 67, 1e11, 450, 50),
        _sheet("h200", "NVIDIA H200 SXM and DGX H200 data sheets", 141, 989, 67, 1e11, 450, 50),
        _sheet("b200", "NVIDIA B200 and DGX B200 data sheets", 180, 2250, 75, 1e11, 900, 50),
        _sheet("mi300x", "AMD MI300X data sheet, 400 Gbit/s a device", 192, 1307, 163, 5e10, 448, 50),
    )
}
"""Built-in rows, all of them 'assumed'."""

_KEYS = {
    "name": str, "origin": str, "source": str, "devices": int, "memory_gb": float, "flops": dict, "utilisation": float,
    "decomposition": float, "node": dict, "network": dict,
}  # fmt: skip
_NEEDED = ("origin", "devices", "flops", "decomposition", "node", "network")


def machine_for(text: str) -> Machine:
    """A built-in row by its name, or the table in a TOML or JSON file.

    Raises:
        ValueError: It is neither, or the file lacks an entry, has one that is not known, or a value outside of what is
            allowed.
    """
    path = Path(text)
    if text in MACHINES:
        return MACHINES[text]
    if path.suffix not in (".toml", ".json"):
        raise ValueError(
            f"'{text}' is neither a machine that is known ({', '.join(MACHINES)}) nor a .toml or .json file. "
            "docs/scale.md shows a table."
        )
    try:
        content = path.read_text(encoding="utf-8")
        table = tomllib.loads(content) if path.suffix == ".toml" else json.loads(content)
    except (OSError, ValueError) as error:
        raise ValueError(f"{text} cannot be read ({error}). docs/scale.md shows a table.") from None
    return _from_table(table, path)


def _from_table(table: Any, path: Path) -> Machine:
    _check_keys(table, path, _KEYS, _NEEDED)
    if table["origin"] not in ORIGINS:
        raise ValueError(f"{path}: origin must be one of {', '.join(ORIGINS)}, got {table['origin']!r}.")
    _check_keys(table["flops"], path, dict.fromkeys(DTYPES, float), (), "flops")
    if not table["flops"]:
        raise ValueError(f"{path}: flops must have a speed of {' or '.join(DTYPES)}, and has none.")
    if not _number(table, "utilisation", path, _UTILISATION) <= 1:
        raise ValueError(f"{path}: utilisation must lie in (0, 1], got {table['utilisation']!r}.")
    memory = table.get("memory_gb")
    return Machine(
        name=table.get("name", path.stem),
        origin=table["origin"],
        source=table.get("source", path.name),
        devices=_whole(table["devices"], path),
        memory=None if memory is None else int(_number(table, "memory_gb", path) * 10**9),
        flops={dtype: _number(table["flops"], dtype, path) for dtype in table["flops"]},
        utilisation=_number(table, "utilisation", path, _UTILISATION),
        decomposition=_number(table, "decomposition", path),
        node=_link(table["node"], path, "node"),
        network=_link(table["network"], path, "network"),
    )


def _link(table: Any, path: Path, name: str) -> Link:
    keys = {"bandwidth": float, "latency": float}
    _check_keys(table, path, keys, tuple(keys), name)
    return Link(_number(table, "bandwidth", path), _number(table, "latency", path, zero=True))


def _check_keys(table: Any, path: Path, known: Mapping[str, type], needed: tuple[str, ...], inside: str = "") -> None:
    title = f"{path}: {inside}" if inside else f"{path}"
    if not isinstance(table, dict):
        raise ValueError(f"{title} must be a table with {', '.join(known)}, got {table!r}.")
    if odd := [key for key in table if key not in known]:
        raise ValueError(f"{title} has {', '.join(odd)}, which is not known; allowed are {', '.join(known)}.")
    if missing := [key for key in needed if key not in table]:
        raise ValueError(f"{title} lacks {', '.join(missing)}; needed are {', '.join(needed)}.")


def _number(table: dict[str, Any], key: str, path: Path, default: float | None = None, zero: bool = False) -> float:
    value = table.get(key, default)
    allowed = isinstance(value, int | float) and not isinstance(value, bool) and (value > 0 or (zero and value == 0))
    if not allowed or value == float("inf"):
        raise ValueError(f"{path}: {key} must be a number {'of at least' if zero else 'above'} 0, got {value!r}.")
    return float(value)


def _whole(value: Any, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path}: devices must be a whole number of at least 1, got {value!r}.")
    return value
