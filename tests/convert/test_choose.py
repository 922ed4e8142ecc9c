"""Layers run dense where they are told to or measured to, and nowhere else."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import sparsight
import sparsight.convert.choose as choose_file
from sparsight.convert import ConversionError
from sparsight.nn import Sampler, SamplingDecision, ZeroFill, record_sampling
from sparsight.nn.frozen_block import FrozenBlock
from sparsight.nn.frozen_conv import FrozenConv2d
from sparsight.ops import cpu

# Relative to the largest output; the two paths round differently, layer by layer.
TOLERANCE = 1e-4
LAYERS = ["layer1.0", "layer2.0", "layer2.1"]


def make_network(block=Bottleneck, layout="b", **options):
    """A converted ResNet of two stages whose masks have holes, in eval mode."""
    torch.manual_seed(0)
    source = ResNet(block, [1, 2, 1, 1], **options)
    source.layer3 = source.layer4 = nn.Identity()
    source.fc = nn.Linear(128 * block.expansion, 7)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    sampler = partial(Sampler, bias=-0.5)
    return sparsight.sparsify(source.eval(), layout=layout, sampler=sampler).eval()


def make_convolutions(num=1, channels=4, **options):
    """A chain of sampled convolutions."""
    torch.manual_seed(0)
    convs = nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num)))
    options = {"sampler": partial(Sampler, bias=0.0), **options}
    return sparsight.sparsify(convs, where=lambda n, m: isinstance(m, nn.Conv2d), **options).eval()


def fill_masks(layer: nn.Module) -> nn.Module:
    """The same layer with masks all true."""
    for module in layer.modules():
        if isinstance(module, Sampler):
            nn.init.constant_(module.head.bias, 1e4)
    return layer


def frozen_layers(model: nn.Module) -> dict[str, FrozenBlock]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FrozenBlock)}


def forms(model: nn.Module) -> dict[str, str]:
    return {name: layer.computed for name, layer in frozen_layers(model).items()}


def relative_error(actual, expected) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds by form in place of the clock's, and the calls that were timed."""

    class Clock:
        def __init__(self):
            self.ms = {"dense": 3.1, "sampled": 4.0}
            self.calls = []

        def __call__(self, layer, x):
            layer.forward(x)
            self.calls.append((layer.computed, tuple(x.shape)))
            ms = self.ms[layer.computed]
            return ms(x) if callable(ms) else ms

    made = Clock()
    monkeypatch.setattr(choose_file, "call_ms", made)
    return made


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("layout", ["a", "b", "c"])
def test_told_layers_return_what_the_source_returns_with_full_masks(layout, block):
    model = make_network(block, layout)
    x = torch.randn(2, 3, 33, 25)
    frozen = sparsight.freeze(model, example=x, choose={"layer1.0": "dense", "layer2.0": "dense"})
    assert forms(frozen) == {"layer1.0": "dense", "layer2.0": "dense", "layer2.1": "sampled"}
    expected = copy.deepcopy(model)
    fill_masks(expected.layer1[0]), fill_masks(expected.layer2[0])
    with torch.no_grad():
        assert relative_error(frozen(x), expected(x)) < TOLERANCE
        assert relative_error(frozen(x), model(x)) > TOLERANCE  # the masks had holes
        other = torch.randn(1, 3, 40, 64)
        assert relative_error(frozen(other), expected(other)) < TOLERANCE


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 10, 3, padding=1),  # reads rows as runs of channels
        nn.Conv2d(3, 8, 5, stride=2),  # its sampler runs outside of the kernel
        nn.Conv2d(3, 9, 3, padding=2, dilation=2, groups=3, bias=False),
    ],
    ids=str,
)
def test_told_convolutions_equal_the_convolution(conv):
    torch.manual_seed(0)
    source = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()).eval()
    model = sparsight.sparsify(source, where=lambda name, _: name == "0")
    x = torch.randn(2, 3, 17, 23)
    frozen = sparsight.freeze(model.eval(), example=x, choose=lambda name, layer: "dense")
    assert forms(frozen) == {"0": "dense"}
    with torch.no_grad():
        assert relative_error(frozen(x), source(x)) < TOLERANCE


def test_by_default_every_layer_stays_sampled(clock):
    model, x = make_network(), torch.randn(1, 3, 33, 33)
    for choose in (None, {}, {"layer1.0": "sampled"}, lambda name, layer: "sampled"):
        frozen = sparsight.freeze(model, example=x, choose=choose)
        assert set(forms(frozen).values()) == {"sampled"}
        assert "computed=" not in repr(frozen)
        with torch.no_grad():
            assert relative_error(frozen(x), model(x)) < TOLERANCE
    assert not clock.calls


def test_a_callable_sees_each_layer_of_the_source_under_its_name():
    model, seen = make_network(), {}

    def choose(name, layer):
        seen[name] = layer
        return "dense" if name.startswith("layer2") else "sampled"

    frozen = sparsight.freeze(model, example=torch.randn(1, 3, 33, 33), choose=choose)
    assert seen == {name: model.get_submodule(name) for name in LAYERS}
    assert list(forms(frozen).values()) == ["sampled", "dense", "dense"]


@pytest.mark.parametrize(
    ("dense_ms", "form"), [(3.1, "dense"), (3.91, "dense"), (3.93, "sampled"), (4.5, "sampled")]
)
def test_measured_layers_run_dense_where_dense_wins_by_two_percent(clock, dense_ms, form):
    clock.ms["dense"] = dense_ms
    model, x = make_network(), torch.randn(1, 3, 33, 33)
    frozen = sparsight.freeze(model, example=x, choose="measured")
    assert forms(frozen) == dict.fromkeys(LAYERS, form)
    expected = fill_masks(copy.deepcopy(model)) if form == "dense" else model
    with torch.no_grad():
        assert relative_error(frozen(x), expected(x)) < TOLERANCE


def test_the_choice_is_each_layers_own_and_shown(clock):
    clock.ms["dense"] = lambda x: 3.1 if x.shape[1] == 64 else 5.0
    model, x = make_network(), torch.randn(1, 3, 33, 33)
    frozen = sparsight.freeze(model, example=x, choose="measured")
    assert forms(frozen) == {"layer1.0": "dense", "layer2.0": "sampled", "layer2.1": "sampled"}
    with torch.no_grad(), record_sampling(model) as record:
        model(x)
    own = [d for d in record.decisions if d.name.startswith("layer1.0.")]
    density = sum(d.macs * d.mask.float().mean() for d in own) / sum(d.macs for d in own)
    layers = frozen_layers(frozen)
    assert layers["layer1.0"].measured.density == pytest.approx(density.item())
    shown = f"computed=dense (dense: 3.1 ms, sampled: 4 ms at density {density:.2f})"
    assert shown in repr(layers["layer1.0"])
    assert "computed=sampled (dense: 5 ms, sampled: 4 ms at density 0." in repr(layers["layer2.0"])


def test_layers_are_timed_in_turns_on_what_they_receive(clock):
    model, x = make_network(), torch.randn(2, 3, 33, 33)
    received = []
    handle = model.layer2[0].register_forward_pre_hook(lambda m, a: received.append(a[0].shape))
    model(x)
    handle.remove()
    sparsight.freeze(model, example=x, choose="measured")
    turns = [form for form, shape in clock.calls if shape == received[0]]
    assert turns[:6] == ["dense", "sampled", "dense", "sampled", "sampled", "dense"]
    assert turns.count("dense") == turns.count("sampled") == 1 + choose_file.MAX_SAMPLES


def test_both_forms_are_timed_with_the_frozen_shortcut(monkeypatch):
    shortcuts = []

    def call_ms(layer, x):
        shortcuts.append(layer.downsample)
        return 1.0

    monkeypatch.setattr(choose_file, "call_ms", call_ms)
    model = make_network(BasicBlock)
    frozen = sparsight.freeze(model, example=torch.randn(1, 3, 33, 33), choose="measured")
    assert isinstance(frozen.layer2[0].downsample[0], FrozenConv2d)
    assert {id(s) for s in shortcuts} == {id(m.downsample) for m in frozen_layers(frozen).values()}


@pytest.mark.skipif(not cpu.has_bfloat16(), reason="needs AVX-512 BF16")
@pytest.mark.parametrize("choose", ["measured", lambda name, layer: "dense"])
def test_dense_layers_hand_on_bfloat16_like_sampled_ones(clock, choose):
    model, x = make_network(), torch.randn(1, 3, 65, 65)
    frozen = sparsight.freeze(model, example=x, choose=choose, dtype=torch.bfloat16)
    assert set(forms(frozen).values()) == {"dense"}
    sampled = frozen_layers(sparsight.freeze(model, example=x, dtype=torch.bfloat16))
    assert sampled["layer2.0"].output_dtype == torch.bfloat16  # or this would say nothing
    for name, layer in frozen_layers(frozen).items():
        for attribute in ("dtype", "output_dtype", "shortcut_dtype"):
            assert getattr(layer, attribute) == getattr(sampled[name], attribute)
    expected = fill_masks(copy.deepcopy(model))
    with torch.no_grad():
        error = relative_error(frozen(x), expected(x))
        assert error < 1e-2 < relative_error(frozen(x), model(x))


def test_slow_layers_are_sampled_less_often(clock):
    x = torch.randn(1, 4, 9, 9)
    for dense_ms, num_samples in ((26.0, 9), (100.0, 2), (5000.0, 0)):
        clock.calls.clear()
        clock.ms = {"dense": dense_ms, "sampled": dense_ms}
        frozen = sparsight.freeze(make_convolutions(), example=x, choose="measured")
        # With the warm-up, which is all that the slowest get.
        assert len(clock.calls) == 2 * (1 + num_samples)
        assert frozen[0].measured.dense_ms == frozen[0].measured.sampled_ms == dense_ms


def test_the_clock_runs_while_the_layer_does():
    layer = frozen_layers(sparsight.freeze(make_convolutions(), example=torch.ones(1, 4, 9, 9)))[
        "0"
    ]
    calls = []
    layer.forward = lambda x: calls.append(x)
    assert choose_file.call_ms(layer, "features") > 0
    assert calls == ["features"]


def test_measured_on_the_real_clock_keeps_every_layer_in_one_of_its_forms():
    model, x = make_network(BasicBlock), torch.randn(1, 3, 33, 33)
    frozen = sparsight.freeze(model, example=x, choose="measured")
    expected = copy.deepcopy(model)
    for name, layer in frozen_layers(frozen).items():
        assert layer.measured.dense_ms > 0 and layer.measured.sampled_ms > 0
        if layer.computed == "dense":
            fill_masks(expected.get_submodule(name))
    with torch.no_grad():
        assert relative_error(frozen(x), expected(x)) < TOLERANCE


class Twice(nn.Module):
    """One layer under two names, called at two sizes."""

    def __init__(self, layer):
        super().__init__()
        self.first = layer
        self.again = nn.Sequential(layer)

    def forward(self, x):
        return self.again(self.first(x)[..., ::2, ::2])


def test_a_shared_layer_is_one_layer_under_all_its_names(clock):
    model, x = Twice(make_convolutions()[0]).eval(), torch.randn(1, 4, 20, 20)
    expected = fill_masks(copy.deepcopy(model))
    for choose in ({"first": "dense"}, {"again.0": "dense"}, lambda n, m: "dense", "measured"):
        frozen = sparsight.freeze(model, example=x, choose=choose)
        assert frozen.first is frozen.again[0]
        assert frozen.first.computed == "dense"
        with torch.no_grad():
            assert relative_error(frozen(x), expected(x)) < TOLERANCE
    with pytest.raises(ConversionError, match=r"again\.0: it is 'sampled'.*'dense' as 'first'"):
        sparsight.freeze(model, example=x, choose={"first": "dense", "again.0": "sampled"})


def test_calls_of_a_shared_layer_are_added_up(clock):
    # Dense wins the large call by less than it loses the small one.
    clock.ms = {"dense": lambda x: {20: 9.0, 10: 3.0}[x.shape[2]], "sampled": 5.0}
    model, x = Twice(make_convolutions()[0]).eval(), torch.randn(1, 4, 20, 20)
    frozen = sparsight.freeze(model, example=x, choose="measured")
    assert frozen.first.computed == "sampled"
    assert (frozen.first.measured.dense_ms, frozen.first.measured.sampled_ms) == (12.0, 10.0)
    assert len(clock.calls) == 2 * 2 * (1 + choose_file.MAX_SAMPLES // 2)


@pytest.mark.parametrize("dense", [["0"], ["0.downsample"], ["0", "0.downsample"]])
def test_a_sampled_layer_inside_of_another_ones_shortcut_has_its_own_choice(clock, dense):
    """Also as the whole shortcut, and measured: in every way the same model comes out."""
    torch.manual_seed(0)
    model = make_network(BasicBlock)
    block, inner = model.layer1[0], make_convolutions(channels=64)[0]
    nn.init.constant_(inner.sampler.head.bias, -3.0)
    block.downsample = inner
    model, x = nn.Sequential(block).eval(), torch.randn(1, 64, 12, 12)
    expected = copy.deepcopy(model)
    if "0" in dense:
        fill_masks(expected[0].samplers)
    if "0.downsample" in dense:
        fill_masks(expected[0].downsample)
    told = sparsight.freeze(model, example=x, choose=dict.fromkeys(dense, "dense"))
    by_num_decisions, timed = {2: "0", 1: "0.downsample"}, []

    def call_ms(layer, x):
        layer.forward(x)
        name = by_num_decisions[len(layer.samplers)]
        timed.append(name)
        return {"dense": 1.0 if name in dense else 3.0, "sampled": 2.0}[layer.computed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_file, "call_ms", call_ms)
        measured = sparsight.freeze(model, example=x, choose="measured")
    with torch.no_grad(), record_sampling(model) as record:
        model(x)
    own = [d for d in record.decisions if "downsample" not in d.name]
    density = sum(d.macs * d.mask.float().mean() for d in own) / sum(d.macs for d in own)
    assert measured.get_submodule("0").measured.density == pytest.approx(density.item())
    # The inner one runs while the outer one is timed, but is timed on its own only.
    assert timed.count("0") == timed.count("0.downsample") == 2 * (1 + choose_file.MAX_SAMPLES)
    for frozen in (told, measured):
        assert {n for n, form in forms(frozen).items() if form == "dense"} == set(dense)
        with torch.no_grad():
            assert relative_error(frozen(x), expected(x)) < TOLERANCE


def test_a_model_that_is_one_layer_can_be_chosen(clock):
    model, x = make_convolutions()[0], torch.randn(1, 4, 9, 9)
    for choose in ({"": "dense"}, "measured"):
        frozen = sparsight.freeze(model, example=x, choose=choose)
        assert isinstance(frozen, FrozenBlock) and frozen.computed == "dense"


def test_what_cannot_be_followed_is_listed_with_its_neighbours():
    model, x = make_network(), torch.randn(1, 3, 33, 33)
    choose = {
        "layer2.7": "dense",
        "layer2": "dense",
        "layer1.0": "fast",
        "layer2.1": "dense",
        "layer1.0.samplers.0": "sampled",
    }
    with pytest.raises(ConversionError, match="4 layers of ResNet") as caught:
        sparsight.freeze(model, example=x, choose=choose)
    reasons = dict(caught.value.refused)
    assert list(reasons) == ["layer2.7", "layer2", "layer1.0", "layer1.0.samplers.0"]
    assert "no module of this name" in reasons["layer2.7"] and "'layer2.0'" in reasons["layer2.7"]
    assert "a Sequential, not a sampled layer" in reasons["layer2"]
    assert "'layer2.0', 'layer2.1'" in reasons["layer2"]
    assert reasons["layer1.0"] == "'fast' is no form of a layer; it must be 'dense' or 'sampled'"
    assert "it is a Sampler" in reasons["layer1.0.samplers.0"]


@pytest.mark.parametrize(
    ("choose", "error", "message"),
    [
        ("mesured", ConversionError, r"choose is 'mesured'.*'measured'; pass that"),
        (3, TypeError, r"choose is a int, but must be None, 'measured', a mapping"),
        (["layer1.0"], TypeError, r"choose is a list.*choose=\{'layer1.0': 'dense'\}"),
        (lambda name, layer: True, ConversionError, r"layer2.1: True is no form of a layer"),
        ({1: "dense"}, ConversionError, r"1: there is no module of this name"),
    ],
)
def test_what_is_no_choice_is_refused(choose, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        sparsight.freeze(make_network(), example=torch.randn(1, 3, 33, 33), choose=choose)


def test_a_dense_model_has_nothing_to_choose(clock):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(1, 3, 5, 5)
    sparsight.freeze(model, example=x, choose="measured")
    assert not clock.calls
    with pytest.raises(ConversionError, match="the model has no sampled layers"):
        sparsight.freeze(model, example=x, choose={"layer1.0": "dense"})


class DecidedOutside(nn.Module):
    """A convolution that is told where to compute."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        mask = x.sum(1, keepdim=True) > 0
        decision = SamplingDecision(mask, mask.float(), None)
        return self.conv(x, decision=decision)


def test_layers_that_are_told_where_to_compute_stay_sampled(clock):
    x = torch.randn(1, 4, 9, 9)
    for with_sampler in (False, True):
        conv = make_convolutions(interpolation=ZeroFill())[0]
        conv.sampler = conv.sampler if with_sampler else None
        model = DecidedOutside(conv).eval()
        frozen = sparsight.freeze(model, example=x, choose="measured")
        assert forms(frozen) == {"conv": "sampled"} and not clock.calls
        with torch.no_grad():
            assert relative_error(frozen(x), model(x)) < TOLERANCE
        message = "a decision is passed, but" if with_sampler else "conv: it has no sampler"
        with pytest.raises(ValueError, match=message):
            sparsight.freeze(model, example=x, choose={"conv": "dense"})


def test_layers_that_stay_unfrozen_cannot_be_told_to_run_dense(clock):
    model = sparsight.sparsify(
        nn.Sequential(nn.Conv2d(2, 3, 13), nn.Conv2d(3, 3, 1)),
        where=lambda name, module: isinstance(module, nn.Conv2d),
    ).eval()
    x = torch.randn(1, 2, 16, 16)
    with pytest.raises(ConversionError, match=r"(?s)1 layers.*  0: its kernel .* 128 taps") as e:
        sparsight.freeze(model, example=x, choose=lambda name, layer: "dense")
    assert [name for name, _ in e.value.refused] == ["0"]
    with pytest.warns(UserWarning, match="layer 0 stays unfrozen"):
        frozen = sparsight.freeze(model, example=x, choose="measured")
    assert forms(frozen) == {"1": "dense"}


def test_layers_that_the_example_does_not_reach_stay_sampled_and_are_named(clock):
    class Branches(nn.Module):
        def __init__(self, used, unused):
            super().__init__()
            self.used, self.unused = used, unused

        def forward(self, x):
            # An empty batch, as of a detector's head without proposals, reaches nothing either.
            self.unused(x[:0])
            return self.used(x)

    model = Branches(*make_convolutions(2)).eval()
    with pytest.warns(UserWarning, match="layer unused stays sampled.*does not run"):
        frozen = sparsight.freeze(model, example=torch.randn(1, 4, 9, 9), choose="measured")
    assert forms(frozen) == {"used": "dense", "unused": "sampled"}


def test_measuring_leaves_no_hooks(clock):
    frozen = sparsight.freeze(make_network(), example=torch.randn(1, 3, 33, 33), choose="measured")
    assert not any(module._forward_hooks for module in frozen.modules())


def test_the_state_of_a_frozen_model_loads_into_one_of_the_same_choice():
    x, choose = torch.randn(1, 3, 33, 33), {"layer2.0": "dense"}
    first = sparsight.freeze(make_network(), example=x, choose=choose)
    other = make_network()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    second = sparsight.freeze(other, example=x, choose=choose)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
    with pytest.raises(RuntimeError, match=r"size mismatch for layer2.0.params"):
        second.load_state_dict(sparsight.freeze(other, example=x).state_dict())


def test_nothing_is_decided_again_at_run_time(clock):
    x = torch.randn(1, 3, 33, 33)
    frozen = sparsight.freeze(make_network(), example=x, choose="measured")
    timed = len(clock.calls)
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    clock.ms["dense"] = 100.0
    with torch.no_grad():
        assert torch.equal(frozen(x), frozen(x))
        frozen(torch.randn(3, 3, 64, 48))
    assert len(clock.calls) == timed and set(forms(frozen).values()) == {"dense"}
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
