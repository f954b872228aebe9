"""Optimizers as people write them for themselves: some keep all per parameter, each of the others has a fault."""

import threading

import torch
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

# ---- that follow a change of form


class Soap(Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioners (Vyas et al. 2024), all of it made at the first step, which
    is no update; of vectors plain Adam."""

    def __init__(self, params, lr=3e-3, betas=(0.95, 0.95), eps=1e-8, frequency=10):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "frequency": frequency})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    sides = [torch.zeros(n, n, dtype=p.dtype, device=p.device) for n in p.shape]
                    state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p), "GG": sides}
                    self.precondition(p, state, group)
                    state["Q"] = [torch.linalg.eigh(side)[1] for side in state["GG"]]
                    continue
                self.update(p, state, group)

    def precondition(self, p, state, group):
        for dim, side in enumerate(state["GG"]):
            flat = p.grad.movedim(dim, 0).flatten(1) if p.ndim > 1 else p.grad[:, None]
            side.lerp_(flat @ flat.T, 1 - group["betas"][1])

    def update(self, p, state, group):
        (beta1, beta2), bases = group["betas"], state["Q"]
        state["step"] += 1
        state["m"].lerp_(p.grad, 1 - beta1)
        g, m = (turned(x, bases) for x in (p.grad, state["m"]))
        state["v"].lerp_(g * g, 1 - beta2)
        scale = (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        p.sub_(turned(m / (state["v"].sqrt() + group["eps"]), [Q.T for Q in bases]), alpha=group["lr"] * scale)
        self.precondition(p, state, group)
        if state["step"] % group["frequency"] == 0:
            state["Q"] = [torch.linalg.qr(side @ Q)[0] for side, Q in zip(state["GG"], state["Q"], strict=True)]


def turned(x, bases):
    for Q in bases:
        x = torch.tensordot(x, Q, dims=[[0], [0]])
    return x


class Lion(Optimizer):
    """The sign of an interpolated momentum (Chen et al. 2023)."""

    def __init__(self, params, lr=3e-4, betas=(0.9, 0.99), weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.lerp(m, p.grad, 1 - group["betas"][0]).sign(), alpha=group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])


class OwnAdam(torch.optim.Adam):
    """Adam that counts its steps as well, for a log."""

    made = 0

    def step(self, closure=None):
        self.made += 1
        return super().step(closure)


class Stochastic(Lion):
    """Rounds at random, which draws numbers for every parameter in turn."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            p.add_(torch.rand_like(p) - 0.5, alpha=1e-4)


# ---- that do not


class Plain(Optimizer):
    """Gradient descent, from which the faulty ones are made."""

    def __init__(self, params, lr=0.01, **more):
        super().__init__(params, {"lr": lr, **more})
        self.begin()

    def begin(self):
        pass

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(self.direction(p, group), alpha=group["lr"])

    def direction(self, p, group):
        return p.grad


class OwnList(Plain):
    def begin(self):
        self.mine = self.parameters()

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for p in self.mine if p.grad is not None):
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


class Acquainted(Plain):
    """Updates those that it was made with."""

    def begin(self):
        self.known = set(self.parameters())

    def direction(self, p, group):
        return p.grad if p in self.known else torch.zeros_like(p)


class ByIdentity(Plain):
    def begin(self):
        self.scales = {id(p): 1.0 for p in self.parameters()}

    def direction(self, p, group):
        return p.grad * self.scales[id(p)]


class MadeState(Plain):
    """Its state is made where it is constructed."""

    def begin(self):
        for p in self.parameters():
            self.state[p] = {"average": torch.zeros_like(p)}

    def direction(self, p, group):
        return self.state[p]["average"].mul_(0.9).add_(p.grad)


class ByIndex(Plain):
    def begin(self):
        self.averages = {}

    def direction(self, p, group):
        index = next(i for i, other in enumerate(self.parameters()) if other is p)
        return self.averages.setdefault(index, torch.zeros_like(p)).mul_(0.9).add_(p.grad)


class Buffers(Plain):
    def begin(self):
        self.buffers = [torch.zeros_like(p) for p in self.parameters()]

    def direction(self, p, group):
        index = next(i for i, other in enumerate(self.parameters()) if other is p)
        return self.buffers[index].mul_(0.9).add_(p.grad)


class OwnDict(Plain):
    def begin(self):
        self.averages = {}

    def direction(self, p, group):
        return self.averages.setdefault(p, torch.zeros_like(p)).mul_(0.9).add_(p.grad)


class WeakDict(OwnDict):
    """Lets parameters go, but a checkpoint does not have it."""

    def begin(self):
        self.averages = WeakIdKeyDictionary()


class InGroup(Plain):
    def direction(self, p, group):
        return group.setdefault("averages", {}).setdefault(p, torch.zeros_like(p)).mul_(0.9).add_(p.grad)


class GroupSteps(Plain):
    """Adam whose bias correction counts the group's steps."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr, k=0)

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
        super().step(closure)

    def direction(self, p, group):
        state, k = self.state[p], group["k"]
        m, v = (state.setdefault(name, torch.zeros_like(p)) for name in "mv")
        m.lerp_(p.grad, 0.1)
        v.lerp_(p.grad**2, 0.001)
        return m / (1 - 0.9**k) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)


class Coupled(Plain):
    """Divides by the norm of all gradients together."""

    def direction(self, p, group):
        return p.grad / torch.stack([q.grad.norm() for q in self.parameters() if q.grad is not None]).norm()


class InBackward(Plain):
    def begin(self):
        for p in self.parameters():
            p.register_post_accumulate_grad_hook(self.update)

    @torch.no_grad()
    def update(self, p):
        p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        p.grad = None

    def step(self, closure=None):
        pass


class InBackwardByClosure(InBackward):
    def begin(self):
        for p in self.parameters():
            p.register_hook(lambda grad: self.seen.append(grad.norm()))
        self.seen = []


class OwnBackward(Plain):
    """As LOMO: a method in place of step()."""

    def step(self, closure=None):
        raise NotImplementedError("call fused_backward(loss, lr)")


class Closures(Plain):
    def step(self, closure):
        closure()
        super().step()


class HoldsModel(Plain):
    def begin(self):
        self.model = torch.nn.Linear(2, 2)


class HoldsLock(Plain):
    def begin(self):
        self.lock = threading.Lock()


class Projector:
    rank = 4


class ObjectInState(Plain):
    def direction(self, p, group):
        return p.grad * self.state[p].setdefault("projector", Projector()).rank


class Still(Plain):
    @torch.no_grad()
    def step(self, closure=None):
        pass


class FixedRate(Plain):
    """Does not read the rate of its groups."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for p in self.parameters() if p.grad is not None):
            p.sub_(p.grad, alpha=1e-3)


class NoEmptyGroup(Plain):
    def add_param_group(self, group):
        if not list(group["params"]):
            raise ValueError("a group without parameters")
        super().add_param_group(group)


class KeepsGroups(Plain):
    """Updates the groups that it was made with."""

    def begin(self):
        self.groups = list(self.param_groups)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(p.grad, alpha=group["lr"])


class SlowWeights(Optimizer):
    """Lookahead (Zhang et al. 2019): parameters come back to a slow average; it holds another optimizer."""

    def __init__(self, inner):
        self.optimizer = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        for p in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[p].setdefault("slow", p.detach().clone())
            p.copy_(slow.lerp_(p, 0.5))
