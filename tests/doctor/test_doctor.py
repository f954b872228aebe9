"""What the doctor looks at is broken here, one thing at a time: it has to find it, and name it."""

import importlib.util
import re
import sys
from importlib import import_module
from typing import get_args

import pytest
import torch
from torch import nn

from hf_drt.doctor import CHECKS, Bench, Check, Finding, Result, chosen, device_named, examine, found, not_tried
from hf_drt.doctor.layers import KINDS, cases
from hf_drt.doctor.versions import NEWEST, Requirement, compared, release, requirements
from hf_drt.forms import PRODUCTS, Form, TwoFactors
from hf_drt.forms.products import Svd
from hf_drt.linalg import Truncation

QUICK = Bench(torch.device("cpu"), quick=True)


def failed(name: str) -> dict[str, str]:
    """What did not hold in a quick check, and what was seen."""
    return {f.what: f.seen for f in examine(name, QUICK).findings if f.result is Result.FAILED}


# ---- nothing is broken


@pytest.mark.parametrize("name", ["versions", "devices", "decompositions", "forms", "switch"])
def test_everything_holds_here(name):
    report = examine(name, QUICK)
    assert [f for f in report.findings if f.result is Result.FAILED] == []
    assert report.count(Result.HELD) > 0


def beyond(finding: Finding) -> bool:
    """Whether it was not tried for a reason that lies with the machine, as far as the test can tell by itself."""
    reasons, A, matmul = {}, torch.randn(256, 256), torch.backends.mkldnn.matmul
    product, kept = A @ A, matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"  # not by monkeypatch, which does not see that it is an attribute
        same = (A @ A - product).norm() < 1e-5 * product.norm()  # it may add up in another order
    finally:
        matmul.fp32_precision = kept
    if same:
        reasons["truncated SVD, while products are in TF32 or bfloat16"] = (
            "cpu computes products of float32 in float32 whatever is set"
        )
    if importlib.util.find_spec("deepspeed") is None:
        reasons["deepspeed"] = "not installed (ModuleNotFoundError: No module named 'deepspeed')"
    return finding == not_tried(finding.what, reasons.get(finding.what, ""))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forms", "switch", "decompositions", "engines", "processes"])
def test_everything_holds_in_full(name):
    """With the compiler, 100 million parameters and two processes, and ZeRO where DeepSpeed is installed."""
    report = examine(name, Bench(torch.device("cpu")))
    assert [f for f in report.findings if f.result is not Result.HELD and not beyond(f)] == []
    if name == "forms":
        compiled = {f.what for f in report.findings if "compile" in f.values}
        assert compiled == {case.name for case in cases() if not case.repeats}


def test_every_kind_of_form_and_every_product_is_tried():
    forms = [case.form for case in cases()]
    assert {type(form) for form in forms} == set(get_args(Form))
    assert {form.decomposition for form in forms if hasattr(form, "decomposition")} == set(PRODUCTS)
    assert {case.kind for case in cases()} == set(KINDS)


# ---- something is


def scaled(cut, by: float):
    """A truncation whose singular values are off."""

    def wrong(*args, **kwargs):
        parts = cut(*args, **kwargs)
        return Truncation(parts.U, parts.S * by, parts.Vh, parts.error) if parts is not None else None

    return wrong


@pytest.mark.parametrize(
    ("function", "named"),
    [("_randomized", "subspace iteration"), ("_gram", "Gram matrix"), ("_cut", "full")],
)
def test_a_broken_way_to_decompose_is_named(monkeypatch, function, named):
    truncation = import_module("hf_drt.linalg.truncation")
    monkeypatch.setattr(truncation, function, scaled(getattr(truncation, function), 1.05))
    wrong = failed("decompositions")
    assert f"truncated SVD, {named}" in wrong
    ways = {"subspace iteration", "Gram matrix", "full"} - {named}
    assert not {f"truncated SVD, {other}" for other in ways} & set(wrong)
    assert re.search(r"error 0\.\d+, stated 0\.\d+, the best 0\.\d+", wrong[f"truncated SVD, {named}"])


@pytest.mark.parametrize(("module", "function", "named"), [("tucker", "tucker2", "Tucker-2"), ("cp", "cp", "CP")])
def test_a_decomposition_that_raises_is_named_and_the_others_go_on(monkeypatch, module, function, named):
    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sys.modules["hf_drt.doctor.decompositions"], function, out_of_memory)
    assert failed("decompositions") == {named: "RuntimeError: out of memory"}


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, L):
        return L.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.1 * gradient


class Bad(Svd):
    """As the SVD's, of linear layers, with a gradient of one factor that is too large."""

    name, help, two_matrices = "bad", "two matrices, one with a wrong gradient", False

    def refusal(self, shape):
        return "of linear layers only" if shape.kernel or shape.experts is not None else None

    def names(self, adapts):
        return ("lora_bad_R", "lora_bad_L") if adapts else ("bad_R", "bad_L")

    def needed(self, adapts):
        return self.names(adapts)

    def shapes(self, form, shape):
        right, left = self.names(form.adapts)
        return {left: (shape.d_out, form.rank), right: (form.rank, shape.d_in)}

    def factors(self, tensors):
        R, L = tensors
        return _WrongBackward.apply(L), R

    def linear(self, x, tensors, bias=None):
        L, R = self.factors(tensors)
        return nn.functional.linear(x @ R.mT, L, bias)

    def added_linear(self, y, x, tensors, scale):
        return y + scale * self.linear(x, tensors)


@pytest.fixture
def registered():
    def add(product: TwoFactors):
        PRODUCTS.add(product.name, product)
        added.append(product.name)

    added: list[str] = []
    yield add
    for name in added:
        PRODUCTS.remove(name)


def test_a_form_whose_backward_pass_is_wrong_is_named(registered):
    """The definition of its weight is wrong in the same way, so that autograd alone would not show it."""
    registered(Bad())
    wrong = failed("forms")
    assert set(wrong) == {"linear: bad factored", "linear: bad adapter", "linear: bad adapter, principal"}
    assert "backward in float64: gradient of bad_L is off by" in wrong["linear: bad factored"]
    assert "backward in float64: gradient of lora_bad_L is off by" in wrong["linear: bad adapter"]


class BadForward(Bad):
    name = "bad"

    def factors(self, tensors):
        R, L = tensors
        return L, R

    def linear(self, x, tensors, bias=None):
        return 1.01 * super().linear(x, tensors, bias)


def test_a_form_that_computes_another_function_is_named(registered):
    registered(BadForward())
    assert re.search(r"fp32: \w+.* is off by 1\.0e-02, and may be by", failed("forms")["linear: bad factored"])


class BadError(BadForward):
    def linear(self, x, tensors, bias=None):
        return Bad.linear(self, x, tensors, bias)

    def decompose(self, form, source):
        U, S, Vh, error = super().decompose(form, source)
        return U, S, Vh, error / 2


def test_a_decomposition_that_states_another_error_is_named(registered):
    registered(BadError())
    assert "conversion: W differs by" in failed("forms")["linear: bad factored"]
    assert "product bad, linear" in failed("decompositions")


class Good(BadError):
    def decompose(self, form, source):
        return Svd.decompose(self, form, source)


def test_a_product_that_is_registered_is_looked_at_too(registered):
    registered(Good())
    held = [f.what for name in ("forms", "decompositions") for f in examine(name, QUICK).findings]
    assert {"linear: bad factored", "linear: bad adapter", "product bad, linear"} <= set(held)
    assert not failed("forms")


def test_a_switch_that_keeps_old_weights_is_found(monkeypatch):
    """What a switch should have let go of is still alive in the next one."""
    switch = sys.modules["hf_drt.doctor.switch"]
    kept = []
    begin = switch.DynamicRank.begin_step

    def hoarding(drt, *args):
        begin(drt, *args)
        kept.extend(torch.zeros(192 * 512 * 8) for _ in range(8))

    monkeypatch.setattr(switch.DynamicRank, "begin_step", hoarding)
    assert any("promised at most" in seen for seen in failed("switch").values())


# ---- the checks themselves


def test_what_a_check_raises_is_a_finding_without_paths_and_names(monkeypatch):
    private = sys.modules["hf_drt.doctor.private"]
    monkeypatch.setattr(private.getpass, "getuser", lambda: "jdoe")
    monkeypatch.setattr(private.platform, "node", lambda: "lab7.example.org")

    def breaks(bench):
        yield found("first", True, "fine")
        raise RuntimeError("jdoe's /home/jdoe/models/a.so on lab7.example.org: no such C:\\Users\\jdoe\\b.dll")

    CHECKS.add("toy", Check("a toy", breaks))
    try:
        first, last = examine("toy", QUICK).findings
    finally:
        CHECKS.remove("toy")
    assert (first.what, first.result) == ("first", Result.HELD)
    assert (last.what, last.result) == ("the rest of toy", Result.FAILED)
    assert last.seen == "RuntimeError: (user)'s a.so on (machine): no such b.dll"


def test_names_are_chosen_and_wrong_ones_refused():
    assert chosen(["switch", "forms"]) == ["forms", "switch"]
    assert "forms" not in chosen((), ["forms"])
    with pytest.raises(ValueError, match=r"check must be one of versions, devices, .*processes, got 'form'"):
        chosen(["form"])
    with pytest.raises(ValueError, match=r"no check is left: forms without forms"):
        chosen(["forms"], ["forms"])
    with pytest.raises(ValueError, match=r"there is no device 'npu' here; there are .*cpu"):
        device_named("npu")
    assert device_named("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("version", "extra", "result", "seen"),
    [
        ("2.13.0+cpu", None, Result.HELD, r"2\.13\.0\+cpu"),
        ("2.12.1", None, Result.FAILED, r"2\.12\.1, but hf_drt needs torch>=2\.13\.0"),
        ("2.20", None, Result.FAILED, r"but hf_drt needs torch<2\.15"),
        ("2.14.0", None, Result.NOT_TRIED, r"2\.14\.0 is newer than 2\.13\.0, the newest that was tested"),
        (None, None, Result.FAILED, r"not installed"),
        (None, "peft", Result.NOT_TRIED, r"not installed; it is of the extra 'peft'"),
    ],
)
def test_a_version_is_held_against_those_tested(version, extra, result, seen):
    finding = compared(Requirement("torch", ((">=", "2.13.0"), ("<", "2.15")), extra), version)
    assert finding.result is result
    assert re.search(seen, finding.seen)


def test_the_newest_versions_are_those_of_requirements_and_within_their_bounds():
    asked = {requirement.name: requirement for requirement in requirements()}
    assert asked["transformers"].bounds
    assert set(NEWEST) == set(asked)
    assert {name: asked[name].broken(version) for name, version in NEWEST.items() if asked[name].broken(version)} == {}
    assert release("2.13.0+cpu") == release("2.13") < release("2.13.1rc1")


def test_a_mode_that_a_device_lacks_is_not_tried(monkeypatch):
    forms = sys.modules["hf_drt.doctor.forms"]
    lacks = forms.unusable
    monkeypatch.setattr(forms, "unusable", lambda mode, device: "no" if "16" in mode.name else lacks(mode, device))
    report = examine("forms", QUICK)
    assert [f.what for f in report.findings if f.result is Result.NOT_TRIED][:2] == ["bf16", "fp16"]
    assert not_tried("bf16", "no") in report.findings
    assert all("bf16" not in f.values for f in report.findings)
