"""What an average of the weights is worth through changes of form, and what it costs.

    python recipes/ema.py compare
    python recipes/ema.py cost

``compare``: the averages of torch's ``AveragedModel``, diffusers' ``EMAModel`` (where it is installed) and
``hf_drt.EMA`` after a switch, a restart of factors and a restart of an adapter, each against the average of the dense
effective weights in float64, relative to the distance that the weights have gone. ``cost``: an update of the average as
a share of a training step, for a Llama of 30 million parameters in each form.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_drt import EMA, DRTConfig, DynamicRank, EMADecay, dense_state_dict
from hf_drt.tables import plain_table

DECAY = 0.9
PLANS = {
    "dense, no switch": "dense@0",
    "dense to factored": "dense@0 factored:16@20",
    "factored to dense": "factored:16@0 dense@20",
    "dense to adapter": "dense@0 adapter:16@20",
    "restarts of factors": "factored:16@0 factored:16@20 factored:16@30",
    "restarts of adapters": "adapter:16@0 adapter:16@20 adapter:16@30",
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 128,
}
LARGE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
FORMS = {"dense": "dense@0", "factored": "factored:128@0", "adapter": "adapter:32@0"}
Weights = dict[str, torch.Tensor]


def llama(**size: int) -> LlamaForCausalLM:
    """A Llama, the same every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**size))


# ---- compare


class Torch:
    """``AveragedModel``: a copy of the model, whose parameters are averaged one by one, in their order."""

    def __init__(self, model: nn.Module):
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def update(self, model: nn.Module) -> None:
        self._average.update_parameters(model)

    def weights(self) -> Weights:
        return dense_state_dict(self._average.module)


class Diffusers:
    """``EMAModel``: a list of the parameters' averages, in their order."""

    def __init__(self, model: nn.Module):
        from diffusers.training_utils import EMAModel

        self._model = model
        self._average = EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY)

    def update(self, model: nn.Module) -> None:
        self._average.step(model.parameters())

    def weights(self) -> Weights:
        self._average.store(self._model.parameters())
        self._average.copy_to(self._model.parameters())
        weights = {key: value.clone() for key, value in dense_state_dict(self._model).items()}
        self._average.restore(self._model.parameters())
        return weights


class Own:
    """``hf_drt.EMA``."""

    def __init__(self, model: nn.Module):
        self._average = EMA(model, EMADecay(DECAY, warmup=False))

    def update(self, model: nn.Module) -> None:
        self._average.update()

    def weights(self) -> Weights:
        with self._average.averaged() as dense:
            return {key: value.clone() for key, value in dense.state_dict().items()}


AVERAGES = {"AveragedModel": Torch, "EMAModel": Diffusers, "hf_drt.EMA": Own}


def distance(weights: Weights, expected: Weights, scale: float) -> float:
    """``||W - expected|| / scale``, over all weights."""
    return sum((weights[key].double() - value).square().sum().item() for key, value in expected.items()) ** 0.5 / scale


def compared(plan: str, make: Callable[[nn.Module], Torch | Diffusers | Own], steps: int = 40) -> str:
    """The distance of an average from the right one after a run, or what it raised."""
    model = llama(**SMALL)
    drt = DynamicRank(model, DRTConfig(schedule=plan), steps)
    drt.apply(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    average, expected, start = make(model), {}, {}
    batches = torch.randint(128, (steps, 8, 32), generator=torch.Generator().manual_seed(1))
    for step, batch in enumerate(batches):
        drt.begin_step(step, optimizer)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        now = {key: value.double() for key, value in dense_state_dict(model).items()}
        expected = {key: DECAY * expected.get(key, value) + (1 - DECAY) * value for key, value in now.items()}
        start = start or now
        try:
            average.update(model)
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__} at update {step}"
    gone = distance(now, start, 1.0)
    return f"{distance(average.weights(), expected, gone):.1g}"


def compare() -> list[list[str]]:
    """A row for each plan."""
    rows = []
    for name, plan in PLANS.items():
        row = [name]
        for make in AVERAGES.values():
            try:
                row.append(compared(plan, make))
            except ImportError:
                row.append("not installed")
        rows.append(row)
    return rows


# ---- cost


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def cost_of(schedule: str, rounds: int, tokens: tuple[int, int]) -> list[str]:
    """Seconds of a step and of an update, medians in alternation, their ratio, and the average's memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = llama(**LARGE, vocab_size=8192).to(device)
    DynamicRank(model, DRTConfig(schedule=schedule), 10).apply(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ema, batch = EMA(model, 0.999), torch.randint(8192, tokens, device=device)

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    pairs = [(timed(step), timed(ema.update)) for _ in range(rounds + 1)][1:]
    steps, updates = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [
        f"{trained / 1e6:.1f} M", f"{1e3 * steps:.1f}", f"{1e3 * updates:.1f}", f"{100 * updates / steps:.1f} %",
        f"{ema.nbytes / 2**20:.0f} MiB",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "cost"])
    parser.add_argument("--rounds", type=int, default=5, help="steps and updates that are timed, of cost")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step, of cost")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence, of cost")
    args = parser.parse_args()
    if args.what == "compare":
        print(plain_table(["run", *AVERAGES], compare()))
        return
    rows = [[form, *cost_of(plan, args.rounds, (args.batch, args.length))] for form, plan in FORMS.items()]
    print(plain_table(["form", "trained", "step, ms", "update, ms", "share", "average"], rows))


if __name__ == "__main__":
    main()
