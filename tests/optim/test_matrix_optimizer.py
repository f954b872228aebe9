"""The matrix optimizer in models: against torch.optim.Muon, against the update written out, and through every form."""

import copy
from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hf_drt import Adapter, DRTConfig, DynamicRank, form_of
from hf_drt.compress import compress
from hf_drt.forms import effective_weight, layer_of, trainable_weights
from hf_drt.optim.matrices import MATRIX, MOMENTUM

STEPS = 12
Q = "model.layers.0.self_attn.q_proj"
SETTINGS = {"matrix_optimizer": "muon", "matrix_lr": 0.03, "matrix_momentum": 0.9}


def controller(model: nn.Module, schedule: str, steps: int = STEPS, **changes) -> DynamicRank:
    """In the first phase; settings of adapters where the schedule has one."""
    used = {key: value for key, value in changes.items() if "adapter" in schedule or not key.startswith("adapter_")}
    drt = DynamicRank(model, DRTConfig(schedule=schedule, **{"rank": 4} | SETTINGS | used), steps)
    drt.apply(0)
    return drt


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, **changes) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained(model), **{"lr": 1e-2, "weight_decay": 0.1} | changes)


def backward(model: nn.Module, kind: str = "llama") -> None:
    torch.manual_seed(0)  # of dropout
    model(**tiny.batch(kind)).loss.backward()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str = "llama") -> None:
    backward(model, kind)
    optimizer.step()
    optimizer.zero_grad()


def loop(drt: DynamicRank, optimizer: torch.optim.Optimizer, start: int = 0, end: int = STEPS) -> None:
    for k in range(start, end):
        drt.begin_step(k, optimizer)
        step(drt.model, optimizer)


def matrix_group(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> dict:
    return next(g for g in optimizer.param_groups if MATRIX in g and any(p is weight for p in g["params"]))


def assert_same(model: nn.Module, other: nn.Module) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_same_tree(found, expected) -> None:
    """Two state dicts, bit for bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_tree(one, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    """But for moments of 0, which a fused optimizer makes before it looks for inf."""
    state = [v for of in optimizer.state.values() for v in of.values() if v.any()]
    return [list(model.state_dict().values()), state, [group["lr"] for group in optimizer.param_groups]]


# ---- dense weights, against torch.optim.Muon

# The matrices of a dense weight, as views of it.
VIEWS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "llama": lambda W: [W],
    "gpt2": lambda W: [W.mT],
    "resnet": lambda W: [W.flatten(1)],
    "mixtral": lambda W: list(W) if W.ndim == 3 else [W],
}


class Muon:
    """torch.optim.Muon on the matrices of a model's target layers, AdamW on all other weights."""

    def __init__(self, model: nn.Module, weights: dict[str, nn.Parameter], kind: str, multiplier: Callable):
        self.views = VIEWS[kind]
        self.pairs = [(w, [nn.Parameter(v.detach().clone()) for v in self.views(w)]) for w in weights.values()]
        matrices = [matrix for _, matrices in self.pairs for matrix in matrices]
        targets = {id(w) for w in weights.values()}
        rest = [p for p in model.parameters() if id(p) not in targets]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=0.03, momentum=0.9, weight_decay=0.1),
            torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1),
        )
        self.schedulers = [LambdaLR(optimizer, multiplier) for optimizer in self.optimizers]

    @torch.no_grad()
    def step(self) -> None:
        for weight, matrices in self.pairs:
            for gradient, matrix in zip(self.views(weight.grad), matrices, strict=True):
                matrix.grad = gradient.clone()
        for optimizer in self.optimizers:
            optimizer.step()
        for weight, matrices in self.pairs:
            for view, matrix in zip(self.views(weight), matrices, strict=True):
                view.copy_(matrix)
        for scheduler in self.schedulers:
            scheduler.step()


def ramp(k: int) -> float:
    return min((k + 1) / 3, 1.0) * (1 - k / 20)


@pytest.mark.parametrize("kind", VIEWS)
def test_dense_weights_move_as_under_torch_muon_and_all_others_as_under_adamw(kind):
    """Bit for bit, with weight decay and a schedule; kernels, transposed weights and experts by their matrices."""
    model = getattr(tiny, kind)()
    twin = copy.deepcopy(model)
    drt = controller(model, "dense@0 factored@9")
    optimizer = adamw(model)
    drt.install(optimizer)
    scheduler = LambdaLR(optimizer, ramp)
    other = Muon(twin, {name: layer_of(twin, name).weight for name in drt.targets}, kind, ramp)
    data = kind if kind == "resnet" else "llama"
    before = copy.deepcopy(model.state_dict())
    for k in range(5):
        drt.begin_step(k, optimizer)
        step(model, optimizer, data)
        scheduler.step()
        backward(twin, data)
        other.step()
        twin.zero_grad()
        assert_same(model, twin)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.grad is None and p.any())


# ---- pairs of factors, against the update written out in float64


def written_out(M: Tensor) -> Tensor:
    Y = M / M.norm()
    for _ in range(5):
        gram = Y @ Y.mT
        Y = 3.4445 * Y + (-4.7750 * gram + 2.0315 * gram @ gram) @ Y
    return Y


def root_inverse(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.rsqrt() @ vectors.mT


def expected_pair(L: Tensor, R: Tensor, g_L: Tensor, g_R: Tensor, eta: float, keep: float) -> tuple[Tensor, Tensor]:
    root_L, root_R = root_inverse(L.mT @ L), root_inverse(R @ R.mT)
    dL = eta / 2 * written_out(g_L @ root_R) @ root_R
    dR = eta / 2 * root_L @ written_out(root_L @ g_R)
    return keep**0.5 * L - dL, keep**0.5 * R - dR


@pytest.mark.parametrize("kind", ["llama", "gpt2", "resnet"])
@pytest.mark.parametrize("schedule", ["factored@0 dense@9", "adapter@0 dense@9"], ids=["factored", "adapter"])
def test_a_step_of_factors_is_the_update_written_out(kind, schedule):
    """In float64, with gradients of W by autograd of a dense twin; out and in differ, and with them the rate."""
    model = getattr(tiny, kind)().double()
    drt = controller(model, schedule, adapter_init="principal", adapter_alpha=12.0)
    optimizer = adamw(model)
    data = kind if kind == "resnet" else "llama"
    inputs = {key: v.double() if v.is_floating_point() else v for key, v in tiny.batch(data).items()}
    drt.begin_step(0, optimizer)
    pairs = {name: [X.detach().clone() if isinstance(X, Tensor) else X for X in layer_of(model, name).pair()]
             for name in drt.targets}  # fmt: skip
    model(**inputs).loss.backward()
    gradients = {name: [X.grad.clone() for X in layer_of(model, name).pair()[:2]] for name in drt.targets}
    optimizer.step()
    for name, (out, into) in ((name, tuple(shape)[:2]) for name, shape in drt.targets.items()):
        L, R, s = pairs[name]
        # The first momentum is a tenth of the gradient, Nesterov's direction a multiple of it too.
        eta = 0.03 * max(1.0, out / into) ** 0.5 / s
        expected = expected_pair(L, R, *gradients[name], eta, 1 - 0.03 * 0.1)
        for found, value in zip(layer_of(model, name).pair()[:2], expected, strict=True):
            torch.testing.assert_close(found.detach(), value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("schedule", ["dense@0 factored@9", "factored@0 dense@9", "adapter@0 dense@9"])
def test_momentum_is_nesterovs_average_of_each_weights_gradients(schedule):
    model = tiny.llama()
    drt = controller(model, schedule, adapter_init="principal")
    optimizer = adamw(model)
    weights = trainable_weights(layer_of(model, Q))
    expected = [torch.zeros_like(w) for w in weights]
    for k in range(3):
        drt.begin_step(k, optimizer)
        backward(model)
        expected = [0.9 * B + 0.1 * w.grad for B, w in zip(expected, weights, strict=True)]
        optimizer.step()
        optimizer.zero_grad()
    for weight, B in zip(weights, expected, strict=True):
        torch.testing.assert_close(optimizer.state[weight][MOMENTUM], B)


@pytest.mark.parametrize("schedule", ["dense@0 factored@9", "factored@0 dense@9", "adapter@0 dense@9"])
def test_decay_shrinks_the_product_by_one_minus_rate_times_decay(schedule):
    """Without gradients but those that are zero; of an adapter its own product, not the frozen base."""
    model = tiny.llama().double()
    drt = controller(model, schedule, adapter_init="principal")
    optimizer = adamw(model, weight_decay=0.5)
    drt.begin_step(0, optimizer)
    layer = layer_of(model, Q)
    base = layer.base.detach().clone() if schedule.startswith("adapter") else 0.0
    before = effective_weight(layer).detach().clone() - base
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(effective_weight(layer).detach() - base, (1 - 0.03 * 0.5) * before, rtol=1e-12, atol=1e-14)


def test_decay_of_a_pair_with_a_frozen_factor_is_that_of_the_product_too():
    model = tiny.llama().double()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model, weight_decay=0.5)
    drt.begin_step(0, optimizer)
    layer = layer_of(model, Q)
    layer.U.requires_grad_(False)
    U, before = layer.U.detach().clone(), effective_weight(layer).detach().clone()
    layer.V.grad = torch.zeros_like(layer.V)
    optimizer.step()
    assert torch.equal(layer.U, U)
    torch.testing.assert_close(effective_weight(layer).detach(), (1 - 0.03 * 0.5) * before, rtol=1e-12, atol=1e-14)


def test_decay_beyond_the_whole_weight_ends_at_zero_in_factors():
    model = tiny.llama().double()
    drt = controller(model, "factored@0 dense@9", matrix_lr=2.0)
    optimizer = adamw(model, weight_decay=0.6)
    drt.begin_step(0, optimizer)
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not effective_weight(layer_of(model, Q)).any()


# ---- through the forms


@pytest.mark.parametrize("policy", ["project", "reset"])
def test_momentum_follows_the_change_of_form_by_the_chain_rule_or_is_dropped(policy):
    model = tiny.llama(hidden_size=48)
    drt = controller(model, "dense@0 factored@2 dense@4 adapter@6", moments=policy, adapter_init="principal")
    optimizer = adamw(model)
    loop(drt, optimizer, 0, 2)
    M = optimizer.state[layer_of(model, Q).weight][MOMENTUM].clone()
    drt.begin_step(2, optimizer)
    layer = layer_of(model, Q)
    if policy == "reset":
        assert not any(MOMENTUM in optimizer.state.get(w, {}) for w in trainable_weights(layer))
    else:
        torch.testing.assert_close(optimizer.state[layer.U][MOMENTUM], M @ layer.V.detach().mT)
        torch.testing.assert_close(optimizer.state[layer.V][MOMENTUM], layer.U.detach().mT @ M)
    loop(drt, optimizer, 2, 4)
    pair = [optimizer.state[w][MOMENTUM].clone() for w in trainable_weights(layer)]
    U, V = layer.U.detach().clone(), layer.V.detach().clone()
    drt.begin_step(4, optimizer)
    weight = layer_of(model, Q).weight
    if policy == "reset":
        assert MOMENTUM not in optimizer.state.get(weight, {})
    else:
        # The two know the momentum of W in the rows of V and in the columns of U, and agree nearly where both do.
        back = optimizer.state[weight][MOMENTUM]
        for found, expected in ((back @ V.mT, pair[0]), (U.mT @ back, pair[1])):
            assert (found - expected).norm() < 0.2 * expected.norm()
    loop(drt, optimizer, 4, 6)
    M = optimizer.state[weight][MOMENTUM].clone()
    drt.begin_step(6, optimizer)
    layer = layer_of(model, Q)
    L, R, s = layer.pair()
    if policy == "project":
        torch.testing.assert_close(optimizer.state[L][MOMENTUM], s * M @ R.detach().mT)
        torch.testing.assert_close(optimizer.state[R][MOMENTUM], s * L.detach().mT @ M)
    loop(drt, optimizer, 6, STEPS)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert set(optimizer.state) <= held


def assert_equal_runs(trainer, other) -> None:
    assert_same(trainer.model, other.model)
    state, expected = trainer.optimizer.state_dict(), other.optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for index, entries in expected["state"].items():
        assert entries.keys() == state["state"][index].keys()
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(state["state"][index][key]), torch.as_tensor(value)), (index, key)


RUNS = {
    "adamw_torch": {"drt_rewarmup_steps": 2, "drt_factored_lr_scale": 0.5, "max_grad_norm": 0.1},
    "adamw_torch_fused": {"drt_adapter_init": "principal", "drt_adapter_lr_scale": 2.0},
    "sgd": {"optim_args": "momentum=0.9", "drt_moments": "reset"},
    "adafactor": {},
    "rmsprop": {},
    "NAdam": {"weight_decay": 0.1},
    "RAdam": {},
    "Adam": {"drt_adapter_init": "principal"},
}


def run(folder, optim: str, changes: dict, resume: str | None = None):
    settings = {
        "max_steps": 12, "drt_schedule": "factored@0 dense@3 adapter@6 factored@9", "drt_matrix_optimizer": "muon",
        "weight_decay": 0.05, "drt_export": "native", "logging_steps": 4, **changes,
    }  # fmt: skip
    if cls := getattr(torch.optim, optim, None):
        model = tiny.llama()
        args = tiny.arguments(folder, **settings)
        trainer = tiny.DRTTrainer(
            model=model, args=args, train_dataset=tiny.dataset(), optimizers=(cls(model.parameters(), lr=1e-3), None)
        )
    else:
        trainer = tiny.trainer(folder, optim=optim, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("optim", "changes"), RUNS.items(), ids=RUNS)
def test_a_run_through_all_forms_is_resumed_bitwise(tmp_path, optim, changes):
    expected = run(tmp_path / "a", optim, changes | {"save_strategy": "steps", "save_steps": 4})
    momenta = [s[MOMENTUM] for s in expected.optimizer.state_dict()["state"].values() if MOMENTUM in s]
    assert len(momenta) == 28
    assert all(m.any() for m in momenta)
    for at in (4, 8):
        checkpoint = str(tmp_path / "a" / f"checkpoint-{at}")
        assert_equal_runs(run(tmp_path / "b", optim, changes, checkpoint), expected)


@pytest.mark.parametrize("changes", [{"kind": "resnet"}, {"kind": "mixtral"}], ids=lambda changes: changes["kind"])
def test_kernels_and_experts_go_through_all_forms_and_resume_bitwise(tmp_path, changes):
    kind = changes["kind"]

    def made(folder):
        settings = {"drt_schedule": "factored:2@0 dense@3 adapter:2@6", "drt_matrix_optimizer": "muon", "max_steps": 9}
        data = kind if kind == "resnet" else "llama"
        return tiny.trainer(folder, getattr(tiny, kind)(), kind=data, drt_export="native", **settings)

    expected = made(tmp_path / "a")
    expected.args.save_strategy, expected.args.save_steps = "steps", 4
    expected = tiny.trainer(
        tmp_path / "a", getattr(tiny, kind)(), kind=kind if kind == "resnet" else "llama", drt_export="native",
        drt_schedule="factored:2@0 dense@3 adapter:2@6", drt_matrix_optimizer="muon", max_steps=9,
        save_strategy="steps", save_steps=4,
    )  # fmt: skip
    expected.train()
    for at in (4, 8):
        resumed = made(tmp_path / "b")
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{at}"))
        assert_equal_runs(resumed, expected)


def test_the_rates_of_all_forms_follow_one_schedule(tmp_path):
    """The matrices' rate is their own, times the scheduler's multiplier, the form's and the re-warm-up's."""
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@3 adapter@6", factored_lr_scale=2.0, rewarmup_steps=2)
    optimizer = adamw(model)
    drt.install(optimizer)
    scheduler = LambdaLR(optimizer, ramp)
    seen = []
    optimizer.register_step_post_hook(lambda *_: None)
    for k in range(9):
        drt.begin_step(k, optimizer)
        weight = trainable_weights(layer_of(model, Q))[0]
        rate = matrix_group(optimizer, weight)["lr"]
        handle = optimizer.register_step_pre_hook(
            lambda o, *_, w=weight: seen.append(matrix_group(o, w)["lr"])  # after the rules' own hook
        )
        step(model, optimizer)
        handle.remove()
        scheduler.step()
        assert rate == pytest.approx(0.03 * ramp(k))
    shares = [2.0] * 3 + [0.1, 0.55, 1.0] * 2
    assert seen == pytest.approx([0.03 * ramp(k) * share for k, share in enumerate(shares)])


@pytest.mark.parametrize("schedule", ["dense@0 factored@9", "factored@0 dense@9", "adapter@0 dense@9"])
def test_going_on_after_to_dense(schedule):
    model = tiny.llama()
    drt = controller(model, schedule)
    optimizer = adamw(model)
    loop(drt, optimizer, 0, 2)
    drt.to_dense(optimizer)
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    step(model, optimizer)
    backward(twin)
    W = twin.get_submodule(Q).weight
    muon = torch.optim.Muon([W], lr=0.03, momentum=0.9, weight_decay=0.1)
    if schedule.startswith("dense"):
        assert not torch.equal(model.get_submodule(Q).weight, before[f"{Q}.weight"])
    else:  # whose momentum starts anew
        muon.step()
        assert torch.equal(model.get_submodule(Q).weight, W)


def test_a_compressed_model_trains_on_in_its_factors():
    """They are those of the first phase already, and take the update of a pair."""
    model = tiny.llama()
    compress(model, rank=4)
    U, V = (w.detach().clone() for w in trainable_weights(layer_of(model, Q)))
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model, weight_decay=0.0)
    loop(drt, optimizer, 0, 1)
    layer = layer_of(model, Q)
    moved = torch.linalg.matrix_norm(layer.U @ layer.V - U @ V, 2).item()
    assert 0.3 * 0.03 < moved < 1.3 * 0.03
    loop(drt, optimizer, 1, 8)


# ---- low precision


def test_bfloat16_weights_take_the_step_of_their_float32_twin_rounded_once():
    steps = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny.llama().bfloat16().to(dtype)
        drt = controller(model, "factored@0 dense@9")
        twin = model
        optimizer = adamw(model)
        drt.begin_step(0, optimizer)
        if dtype == torch.float32:
            twin.load_state_dict({k: v.float() for k, v in steps["before"].items()})
            for p, g in zip(trained(model), steps["gradients"], strict=True):
                p.grad = g.float()
        else:
            steps["before"] = copy.deepcopy(model.state_dict())
            backward(model)
            steps["gradients"] = [p.grad.clone() for p in trained(model)]
        optimizer.step()
        steps[dtype] = [w.detach().clone() for name in drt.targets for w in trainable_weights(layer_of(model, name))]
        assert {s[MOMENTUM].dtype for s in optimizer.state.values() if MOMENTUM in s} == {dtype}
    for low, full in zip(steps[torch.bfloat16], steps[torch.float32], strict=True):
        assert torch.equal(low, full.bfloat16())


def test_bfloat16_dense_weights_take_the_step_of_their_float32_twin_rounded_once():
    model = tiny.llama().bfloat16()
    drt = controller(model, "dense@0 factored@9")
    optimizer = adamw(model)
    drt.begin_step(0, optimizer)
    backward(model)
    W = nn.Parameter(model.get_submodule(Q).weight.detach().float())
    W.grad = model.get_submodule(Q).weight.grad.float()
    torch.optim.Muon([W], lr=0.03, momentum=0.9, weight_decay=0.1).step()
    optimizer.step()
    assert torch.equal(model.get_submodule(Q).weight, W.bfloat16())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("schedule", ["dense@0 factored@9", "factored@0 dense@9", "adapter@0 dense@9"])
def test_a_gradient_scaler_changes_no_bit_and_an_overflow_nothing(schedule, fused):
    """Fused, scale and overflow are left to the step."""
    runs = []
    for scaled in (False, True):
        model = tiny.llama()
        drt = controller(model, schedule, adapter_init="principal")
        optimizer = adamw(model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100, enabled=scaled)
        for k in range(4):
            drt.begin_step(k, optimizer)
            if k == 2:
                if not scaled:
                    continue
                before = copy.deepcopy(bits(model, optimizer))
            scaler.scale(model(**tiny.batch()).loss).backward()
            if k == 2:
                trainable_weights(layer_of(model, Q))[0].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if k == 2:
                assert_same_tree(bits(model, optimizer), before)
        runs.append(model)
    assert_same(*runs)


def test_an_overflow_elsewhere_keeps_the_matrices_where_they_are_too():
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    drt.begin_step(0, optimizer)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model(**tiny.batch()).loss).backward()
    model.model.embed_tokens.weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(MOMENTUM in state for state in optimizer.state.values())


# ---- around a step


CLOSURE = r"takes the gradients before optimizer\.step\(\), and step\(closure\) computes them .* then step\(\) without"


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("call", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)], ids=["position", "keyword"])
def test_a_closure_is_refused_whether_gradients_are_there_or_not(call, gradients):
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model)
    drt.begin_step(0, optimizer)
    if gradients:
        backward(model)
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        backward(model)

    with pytest.raises(ValueError, match=CLOSURE):
        call(optimizer, closure)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all((p.grad is not None) == gradients for p in trained(model))
    closure()
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_gradients_are_the_callers_again_after_a_step():
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model)
    drt.begin_step(0, optimizer)
    backward(model)
    gradients = {p: (p.grad, p.grad.clone()) for p in trained(model)}
    optimizer.step()
    for p, (gradient, value) in gradients.items():
        assert p.grad is gradient
        assert torch.equal(p.grad, value)


def test_a_step_that_raises_leaves_nothing_for_the_next():
    """What it had taken aside is never applied later."""
    runs = []
    for fails in (False, True):
        model = tiny.llama()
        drt = controller(model, "factored@0 dense@9")
        optimizer = adamw(model)
        drt.begin_step(0, optimizer)
        if fails:

            def failing(*_):
                raise RuntimeError("on purpose")

            handle = optimizer.register_step_pre_hook(failing)
            backward(model)
            with pytest.raises(RuntimeError, match="on purpose"):
                optimizer.step()
            handle.remove()
            optimizer.zero_grad()
            optimizer.step()  # without gradients: nothing moves
        step(model, optimizer)
        runs.append(model)
    assert_same(*runs)


def test_zero_gradients_are_gradients_and_missing_ones_are_none():
    """As under torch.optim.Muon: momentum goes on where a gradient is zero."""
    model = tiny.llama()
    drt = controller(model, "dense@0 factored@9")
    optimizer = adamw(model)
    loop(drt, optimizer, 0, 1)
    W = model.get_submodule(Q).weight
    before = W.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(W, before)
    backward(model)
    optimizer.zero_grad(set_to_none=False)
    momentum = optimizer.state[W][MOMENTUM].clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[W][MOMENTUM], 0.9 * momentum)
    assert not torch.equal(W, before)


@pytest.mark.parametrize("frozen", ["U", "V", "layer", "dense layer"])
def test_what_is_frozen_does_not_move(frozen):
    model = tiny.llama()
    drt = controller(model, "dense@0 factored@9" if frozen == "dense layer" else "factored@0 dense@9")
    optimizer = adamw(model)
    drt.begin_step(0, optimizer)
    layer = layer_of(model, Q)
    weights = [getattr(layer, frozen)] if frozen in "UV" else list(trainable_weights(layer))
    for weight in weights:
        weight.requires_grad_(False)
    before = [w.detach().clone() for w in weights]
    others = [w for w in trainable_weights(layer) if w.requires_grad]
    moving = [w.detach().clone() for w in others]
    for k in range(3):
        drt.begin_step(k, optimizer)
        step(model, optimizer)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert not any(torch.equal(w, b) for w, b in zip(others, moving, strict=True))
    assert not any(MOMENTUM in optimizer.state.get(w, {}) for w in weights)


@pytest.mark.parametrize("init", ["zero", "principal"])
@pytest.mark.parametrize("alpha", [1.0, 32.0])
def test_adapters_start_and_stay_bounded_over_fifty_steps(init, alpha):
    model = tiny.llama()
    drt = controller(model, "adapter@0 dense@60", 64, adapter_init=init, adapter_alpha=alpha, matrix_lr=0.02)
    optimizer = adamw(model, weight_decay=0.0)
    drt.begin_step(0, optimizer)
    begun = {name: effective_weight(layer_of(model, name)).detach().clone() for name in drt.targets}
    sizes = {p: p.norm().item() for p in trained(model)}
    losses = []
    for k in range(50):
        drt.begin_step(k, optimizer)
        loss = model(**tiny.batch()).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    for name, W in begun.items():
        layer = layer_of(model, name)
        L, R, s = layer.pair()
        assert L.any()
        out, into = W.shape
        moved = torch.linalg.matrix_norm(effective_weight(layer) - W, 2).item()
        assert moved < 50 * 0.02 * max(1, out / into) ** 0.5 * 1.21
        for X in (L, R):
            assert X.norm().item() < 10 * (sizes[X] + 4 * 50 * 0.02 / s)


# ---- several models, own loops, copies


def test_two_controllers_in_one_optimizer_do_what_each_does_alone():
    def alone(schedule: str, **changes):
        model = tiny.llama()
        drt = controller(model, schedule, **changes)
        optimizer = adamw(model)
        loop(drt, optimizer)
        return model

    schedules = ({"schedule": "factored@0 dense@6"}, {"schedule": "dense@0 adapter@4", "matrix_lr": 0.01})
    expected = [alone(**settings) for settings in schedules]
    models = [tiny.llama(), tiny.llama()]
    drts = [controller(model, **settings) for model, settings in zip(models, schedules, strict=True)]
    optimizer = torch.optim.AdamW([{"params": trained(m)} for m in models], lr=1e-2, weight_decay=0.1)
    for k in range(STEPS):
        for drt in drts:
            drt.begin_step(k, optimizer)
            backward(drt.model)
        optimizer.step()
        optimizer.zero_grad()
    for model, other in zip(models, expected, strict=True):
        assert_same(model, other)


def test_one_of_two_controllers_may_leave_its_matrices_to_the_optimizer():
    models = [tiny.llama(), tiny.llama()]
    drts = [
        controller(models[0], "dense@0 factored@9"),
        DynamicRank(models[1], DRTConfig(schedule="dense@0 factored@9", rank=4), STEPS),
    ]
    drts[1].apply(0)
    twin, other = tiny.llama(), None
    optimizer = torch.optim.AdamW([{"params": trained(m)} for m in models], lr=1e-2)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for k in range(3):
        for drt in drts:
            drt.begin_step(k, optimizer)
            backward(drt.model)
        optimizer.step()
        optimizer.zero_grad()
        step(twin, other)
    assert_same(models[1], twin)
    assert not torch.equal(models[0].get_submodule(Q).weight, twin.get_submodule(Q).weight)


def test_an_install_after_the_scheduler_is_refused():
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model)
    LambdaLR(optimizer, ramp)
    with pytest.raises(ValueError, match=r"matrix_optimizer add parameter groups, .* Call drt\.install\(optimizer\) b"):
        drt.install(optimizer)
    assert not any(MATRIX in group for group in optimizer.param_groups)


ADAPTIVE = ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD"]


def only_matrices(name: str, **settings) -> tuple[DynamicRank, torch.optim.Optimizer]:
    """All weights but the target layers' are frozen."""
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@3 adapter@6", **settings)
    kept = {id(w) for target in drt.targets for w in trainable_weights(layer_of(model, target))}
    for p in model.parameters():
        p.requires_grad_(id(p) in kept)
    return drt, getattr(torch.optim, name)(trained(model), lr=1e-2)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("at", [2, 5, 8])
def test_a_state_dict_of_matrices_alone_is_loaded_and_trained_on_bitwise(name, at):
    """Optimizers look in every parameter's state for entries of their own steps."""
    drt, optimizer = only_matrices(name)
    loop(drt, optimizer, 0, at)
    weights, state, structure = copy.deepcopy(
        (drt.model.state_dict(), optimizer.state_dict(), drt.state_dict())
    )
    loop(drt, optimizer, at)
    other, fresh = only_matrices(name)
    other.install(fresh)
    other.load_state_dict(structure, fresh)
    other.model.load_state_dict(weights)
    fresh.load_state_dict(state)
    loop(other, fresh, at)
    assert_same(other.model, drt.model)
    assert_same_tree(fresh.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_copy_of_an_optimizer_over_matrices_goes_on_to_the_same_bits(name):
    drt, optimizer = only_matrices(name)
    copies = []
    for k in range(0, STEPS, 2):
        copies.append((k, *copy.deepcopy((drt, optimizer))))
        loop(drt, optimizer, k, k + 2)
    for k, twin, its_optimizer in copies:
        loop(twin, its_optimizer, k)
        assert_same(twin.model, drt.model)


def test_a_state_dict_is_plain_tensors(tmp_path):
    drt, optimizer = only_matrices("NAdam")
    loop(drt, optimizer, 0, 2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert_same_tree(found, optimizer.state_dict())


def test_a_state_dict_loaded_before_the_install_is_refused_by_the_number_of_groups():
    drt, optimizer = only_matrices("AdamW")
    loop(drt, optimizer, 0, 2)
    other, fresh = only_matrices("AdamW")
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fresh.load_state_dict(optimizer.state_dict())
    other.install(fresh)
    fresh.load_state_dict(optimizer.state_dict())


# ---- what has no part in a step


def test_experts_without_tokens_stay_where_they_are():
    model = tiny.mixtral(num_local_experts=8, num_experts_per_tok=1)
    drt = controller(model, "dense@0 factored@9", include=["experts"])
    optimizer = adamw(model, weight_decay=0.0)
    drt.begin_step(0, optimizer)
    backward(model)
    name = next(iter(drt.targets))
    weight = layer_of(model, name).weight
    idle = ~weight.grad.flatten(1).any(1)
    if not idle.any():
        weight.grad[:3] = 0
        idle[:3] = True
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight[idle], before[idle])
    assert all(not torch.equal(W, b) for W, b in zip(weight[~idle], before[~idle], strict=True))


def test_tied_weights_are_no_targets_and_keep_the_runs_own_optimizer():
    model = tiny.llama(tie_word_embeddings=True)
    drt = controller(model, "factored@0 dense@6")
    optimizer = adamw(model)
    loop(drt, optimizer)
    weight = model.lm_head.weight
    assert weight is model.model.embed_tokens.weight
    assert "exp_avg" in optimizer.state[weight]
    assert MOMENTUM not in optimizer.state[weight]
    assert isinstance(form_of(model.get_submodule(Q)), type(form_of(nn.Linear(1, 1))))
    assert Adapter(4) != form_of(model.get_submodule(Q))


def test_a_layer_that_is_gone_is_named_and_nothing_moves():
    """Its weights would else take steps of the run's own optimizer, at the matrices' rate."""
    model = tiny.llama()
    drt = controller(model, "factored@0 dense@9")
    optimizer = adamw(model)
    loop(drt, optimizer, 0, 1)
    model.get_submodule("model.layers.0.self_attn").q_proj = nn.Sequential(layer_of(model, Q))
    backward(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"weight of shape \(32, 4\) .* its layer is no longer where it was .* after all"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
