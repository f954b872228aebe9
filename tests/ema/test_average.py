"""EMA in a hand-written loop: the average, the model that shows it, what is kept and what is refused."""

import copy

import mixed
import pytest
import tiny
import torch
from torch import nn

from hf_drt import EMA, Adapter, DynamicRank, EMADecay, Factored, convert, dense_state_dict, effective_weight
from hf_drt.ema import read_average, write_average
from hf_drt.forms import LowRankLinear
from hf_drt.targets import join_attention, split_attention

CONSTANT = EMADecay(0.8, warmup=False)


def moved(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.05)


def followed(model: nn.Module, updates: int = 4, **options) -> tuple[EMA, dict[str, torch.Tensor]]:
    """An average, and the one expected: of dense state dicts, in float64."""
    ema, expected = EMA(model, CONSTANT, **options), {}
    for step in range(updates):
        moved(model, step)
        ema.update()
        now = {key: value.double() for key, value in dense_state_dict(model).items()}
        expected = {key: 0.8 * expected.get(key, value) + 0.2 * value for key, value in now.items()}
    return ema, expected


def state(model: nn.Module) -> dict:
    """Everything that must be the same afterwards: objects, addresses, bits, flags and gradients, by name."""
    return {
        name: (id(p), p.data_ptr(), p.detach().clone(), p.requires_grad, id(p.grad), p._version)
        for name, p in model.named_parameters()
    }


def assert_same(model: nn.Module, before: dict) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    for name, (*kept, values, flag, gradient, version) in {k: (v[0], v[1], *v[2:]) for k, v in before.items()}.items():
        assert [*after[name][:2], *after[name][3:]] == [*kept, flag, gradient, version], name
        assert torch.equal(after[name][2], values), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "mixtral"])
def test_a_model_in_every_form_shows_the_average_as_a_dense_one_and_is_itself_again(kind, tmp_path):
    model = mixed.mixed(kind)
    ema, expected = followed(model)
    tiny.logits(model, mixed.batch(kind))
    before, modules, block = state(model), [*model.modules()], model.config.quantization_config
    with ema.averaged() as dense:
        shown = model.state_dict()
        assert dense is model
        assert not any(isinstance(module, LowRankLinear) for module in model.modules())
        model.save_pretrained(tmp_path)
        y = tiny.logits(model, mixed.batch(kind))
        assert max((shown[key].double() - value).abs().max() for key, value in expected.items()) < 1e-6
    assert_same(model, before)
    assert [*model.modules()] == modules
    assert model.config.quantization_config == block
    again = type(model).from_pretrained(tmp_path)  # an ordinary dense model
    torch.testing.assert_close(tiny.logits(again, mixed.batch(kind)), y, rtol=0, atol=1e-5)


def test_the_model_is_itself_again_after_an_exception_with_its_gradients():
    model = mixed.mixed()
    ema, _ = followed(model)
    model(**tiny.batch()).loss.backward()
    before = state(model)
    assert any(p.grad is not None for p in model.parameters())

    def fail() -> None:
        with ema.averaged():
            model(**tiny.batch()).loss.backward()  # of the average: thrown away
            model.eval()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert_same(model, before)
    assert {module.training for module in model.modules()} == {False}
    ema.update()


def test_an_average_of_the_models_dtype_is_shown_without_a_copy():
    model = mixed.mixed()
    ema, _ = followed(model)
    with ema.averaged():
        lent = {p.data_ptr() for p in model.parameters()}
    assert {average.data_ptr() for average in ema.state_dict()["averages"].values()} <= lent


def test_a_step_of_the_optimizer_is_refused_while_the_average_is_shown():
    model, other = mixed.mixed(), nn.Linear(2, 2)
    ema, _ = followed(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**tiny.batch()).loss.backward()
    before = state(model)
    with ema.averaged():
        other(torch.ones(2)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()  # of another model
        with pytest.raises(RuntimeError, match=r"cannot be trained: a step of AdamW would change that"):
            optimizer.step()
    assert_same(model, before)
    optimizer.step()


def test_a_change_of_form_is_refused_while_the_average_is_shown():
    model = tiny.llama()
    drt = DynamicRank(model, "factored:4@0 dense@2", 4)
    drt.apply(0)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ema, _ = followed(model)
    before = state(model)
    with ema.averaged():
        for change in (lambda: drt.begin_step(2, optimizer), drt.to_dense, lambda: drt.empty_phase(1)):
            with pytest.raises(RuntimeError, match="shows its average, and cannot change form"):
                change()
    assert_same(model, before)
    assert drt.phase == 0

    def change() -> None:
        with ema.averaged():
            block = model.model.layers[0].mlp
            block.up_proj = convert(block.up_proj, Factored(2)).module

    with pytest.raises(RuntimeError, match="cannot change form: a layer was replaced"):
        change()
    assert_same(model, before)
    drt.begin_step(2, optimizer)
    assert drt.is_dense


def test_calls_that_would_take_the_average_for_the_weights_are_refused_while_it_is_shown():
    model = mixed.mixed()
    ema, _ = followed(model)
    with ema.averaged():
        for call in (ema.update, ema.copy_to, lambda: ema.load_state_dict(ema.state_dict())):
            with pytest.raises(RuntimeError, match=r"shows its average: call \w+\(\) after the block"):
                call()
        with ema.averaged():  # nothing more
            shown = model.state_dict()
        assert all(torch.equal(value, shown[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_averaged_in_float32_or_better(dtype):
    """An update of 1 / 1000 is below the precision of half of these types: an average in them would stand still."""
    model = mixed.mixed().to(dtype)
    ema = EMA(model, EMADecay(0.999, warmup=False))
    ema.update()
    start = {key: value.double().clone() for key, value in dense_state_dict(model).items()}
    moved(model)
    ema.update()
    averages = ema.state_dict()["averages"]
    assert {a.dtype for a in averages.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    rows = [(key, p) for key, p in model.named_parameters() if key in averages]
    for key, p in rows:
        torch.testing.assert_close(
            averages[key].double(), 0.999 * start[key] + 0.001 * p.double(), rtol=1e-6, atol=1e-8
        )
    for name, layer in model.named_modules():
        if isinstance(layer, LowRankLinear):
            now = layer.layout.stored(effective_weight(layer)).double()
            then = 0.999 * start[f"{name}.weight"] + 0.001 * now
            torch.testing.assert_close(averages[f"{name}.weight"].double(), then, rtol=0, atol=2e-3)
    with ema.averaged():
        assert {p.dtype for p in model.parameters()} == {dtype}
        tiny.logits(model, mixed.batch())


def test_what_its_user_has_frozen_is_left_alone_until_it_is_trained():
    model = tiny.llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    ema = EMA(model, CONSTANT)
    assert "model.embed_tokens.weight" not in ema.state_dict()["averages"]
    embedding = model.model.embed_tokens.weight.clone()
    with ema.averaged():
        assert torch.equal(model.model.embed_tokens.weight, embedding)
    model.model.embed_tokens.weight.requires_grad_(True)
    ema.update()
    moved(model)
    ema.update()
    expected = 0.8 * embedding + 0.2 * model.model.embed_tokens.weight
    torch.testing.assert_close(ema.state_dict()["averages"]["model.embed_tokens.weight"], expected.detach())


def test_tied_weights_have_one_average_and_stay_tied():
    model = tiny.llama(tie_word_embeddings=True)
    ema, _ = followed(model)
    assert "lm_head.weight" not in ema.state_dict()["averages"]
    with ema.averaged():
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, ema.state_dict()["averages"]["model.embed_tokens.weight"])


def test_buffers_are_averaged_if_asked_and_whole_numbers_copied():
    for asked in (True, False):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        ema = EMA(model, CONSTANT, buffers=asked)
        means = []
        for step in range(3):
            model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step)))
            ema.update()
            means.append(model[1].running_mean.clone())
        expected = 0.8 * (0.8 * means[0] + 0.2 * means[1]) + 0.2 * means[2] if asked else means[2]
        with ema.averaged():
            torch.testing.assert_close(model[1].running_mean, expected)
            assert model[1].num_batches_tracked == 3
            if asked:
                model(torch.randn(8, 4))  # writes to what is shown
        torch.testing.assert_close(model[1].running_mean, means[2], rtol=0, atol=0) if asked else None
        assert len(ema.state_dict()["averages"]) == (7 if asked else 4)


def test_a_state_goes_on_to_the_same_bits_in_whatever_form_it_is_loaded(tmp_path):
    model = tiny.llama()
    drt = DynamicRank(model, "factored:4@0 dense@4 adapter:4@6", 8)
    drt.apply(0)
    ema, _ = followed(model)
    write_average(tmp_path, ema)
    twin, twin_drt = copy.deepcopy((model, drt))
    other = EMA(tiny.llama(), CONSTANT)
    other.load_state_dict(copy.deepcopy(ema.state_dict()))  # into a dense model
    assert other.updates == 4
    again = EMA(twin, CONSTANT)
    again.load_state_dict(read_average(tmp_path))
    for step in (4, 6):
        for controller, average in ((drt, ema), (twin_drt, again)):
            controller.apply(step)
            moved(controller.model, step)
            average.update()
    assert again.updates == ema.updates == 6
    for key, average in ema.state_dict()["averages"].items():
        assert torch.equal(again.state_dict()["averages"][key], average), key


def test_the_average_is_copied_into_a_dense_model_and_truncated_only_if_asked():
    model = mixed.mixed()
    ema, expected = followed(model)
    dense = tiny.llama()
    objects = [*map(id, dense.parameters())]
    assert ema.copy_to(dense) == {}
    assert [*map(id, dense.parameters())] == objects
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=0, atol=1e-6)
    before = state(model)
    with pytest.raises(
        ValueError, match=r"the average is dense, and the model has layers of low rank \(model\.layers\.0"
    ):
        ema.copy_to()
    assert_same(model, before)
    bases = {n: p.clone() for n, p in model.named_parameters() if n.endswith(".base")}
    errors = ema.copy_to(truncate=True)
    for name, layer in model.named_modules():
        if not isinstance(layer, LowRankLinear):
            continue
        key, W = f"{name}.weight", expected[f"{name}.weight"]
        base = bases[f"{name}.base"].double() if isinstance(layer.form, Adapter) else torch.zeros(())
        tail = torch.linalg.svdvals(W - base)[layer.form.rank :].norm() / W.norm()
        assert errors[key] == pytest.approx(tail.item(), abs=1e-5)
        if isinstance(layer.form, Adapter):
            assert torch.equal(layer.base, bases[f"{name}.base"])
    assert len(errors) == sum(isinstance(layer, LowRankLinear) for layer in model.modules())


def test_the_average_on_another_device_is_the_same():
    """The way over a copy, here of the same device by another name."""
    model = mixed.mixed()
    ema, far = EMA(model, CONSTANT), EMA(model, CONSTANT, device="cpu:0")
    for step in range(3):
        moved(model, step)
        ema.update()
        far.update()
    for key, average in ema.state_dict()["averages"].items():
        torch.testing.assert_close(far.state_dict()["averages"][key], average, rtol=0, atol=1e-6)
    assert far.nbytes == 4 * sum(p.numel() for p in tiny.llama().parameters())


def test_an_update_forms_no_whole_weight_of_factors(monkeypatch):
    """The largest new tensor of an update is a factor."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
                sizes.append(result.numel())
            return result

    layer = nn.ModuleList([convert(nn.Linear(64, 64, bias=False), Factored(4)).module]).to(torch.bfloat16)
    ema = EMA(layer, CONSTANT)
    with Sizes():
        ema.update()
    assert 0 < max(sizes) <= 4 * 64


def test_a_compiled_model_is_averaged_and_shown_without_a_compilation():
    model = nn.Sequential(convert(nn.Linear(6, 5), Factored(2)).module, nn.ReLU())
    counts, x = [], torch.randn(3, 6)
    compiled = torch.compile(model, backend=lambda graph, inputs: counts.append(1) or graph.forward)
    compiled(x)
    ema, done = EMA(compiled, CONSTANT), len(counts)
    moved(model)
    ema.update()
    moved(model, 1)
    assert (ema.model, done) == (model, 1)
    for _ in range(2):
        with ema.averaged():
            expected = (x @ ema.state_dict()["averages"]["0.weight"].T + ema.state_dict()["averages"]["0.bias"]).relu()
            torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(counts) == done
    torch._dynamo.reset()


# ---- refused


def test_of_attention_that_is_packed_again_the_way_out_is_told():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    split_attention(model)
    ema = EMA(model)
    join_attention(model)
    with pytest.raises(ValueError, match=r"q_proj.*If its attention was split then, call hf_drt\.split_attention"):
        ema.update()
    split_attention(model)
    ema.update()


def test_a_model_that_has_become_another_is_named():
    model = tiny.llama()
    ema = EMA(model)
    model.resize_token_embeddings(tiny.VOCAB + 2)
    with pytest.raises(
        ValueError, match=r"of another model: model.embed_tokens.weight has shape \(64, 32\) in the average"
    ):
        ema.update()
    del model.model.layers[1:]
    with pytest.raises(ValueError, match=r"the average has model\.layers\.1\..* and \d more, which the model lacks"):
        ema.update()
    assert ema.updates == 0
    with pytest.raises(ValueError, match="Build EMA anew on the model that is trained"), ema.averaged():
        pass
    with pytest.raises(ValueError, match="which the model lacks"):
        EMA(tiny.llama()).copy_to(tiny.bert())


def test_a_state_of_another_model_is_named_and_changes_nothing():
    ema = EMA(tiny.llama(), CONSTANT)
    before = {key: value.clone() for key, value in ema.state_dict()["averages"].items()}
    stored = ema.state_dict()["averages"]
    lacking = {key: value for key, value in stored.items() if "norm" not in key}
    wrong = {
        r"the state has no 'updates' and 'averages'": {"averages": {}},
        r"the state has extra.weight, which the model lacks": {**stored, "extra.weight": torch.ones(2)},
        r"the model has model.layers.0.input_layernorm.weight, .* and 2 more, which the state lacks": lacking,
        r"lm_head.weight has shape \(2,\) in the state": {**stored, "lm_head.weight": torch.ones(2)},
    }
    for message, averages in wrong.items():
        given = averages if "no 'updates'" in message else {"updates": 9, "averages": averages}
        with pytest.raises(ValueError, match=message):
            ema.load_state_dict(given)
    assert ema.updates == 0
    assert all(torch.equal(value, before[key]) for key, value in ema.state_dict()["averages"].items())


def test_files_that_are_missing_damaged_or_newer_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no drt_ema.safetensors: it was written without an average"):
        read_average(tmp_path)
    path = write_average(tmp_path, EMA(nn.Linear(4, 4)))
    whole = path.read_bytes()
    for damaged in (whole[:-7], b"", whole.replace(b"hf_drt_ema", b"hf_drt_emb")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"drt_ema.safetensors is cut short or damaged"):
            read_average(tmp_path)
    path.write_bytes(whole.replace(b'version\\": 1', b'version\\": 7'))
    with pytest.raises(ValueError, match=r"format version 7; this hf_drt reads up to 1"):
        read_average(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["drt_ema.safetensors"]


def test_a_model_without_a_trained_weight_is_refused():
    with pytest.raises(ValueError, match="has no trained weight to average"):
        EMA(nn.Linear(2, 2).requires_grad_(False))
