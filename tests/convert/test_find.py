"""Finding: what the default takes, what `where` may select, and every refusal with its reason."""

import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck

from sparsight.convert.find import ConversionError, find_targets
from sparsight.nn import DeformableBlock, DeformableConv2d


class OtherForward(BasicBlock):
    def forward(self, x):
        return super().forward(x) + 1


class SameForward(BasicBlock):
    pass


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnDeformable(DeformableConv2d):
    def forward(self, x, guide=None, *, sites=None):
        return super().forward(x, guide, sites=sites) + 1


class OwnDeformableBlock(DeformableBlock):
    def forward(self, x):
        return super().forward(x) + 1


def refusals(model, where=None):
    with pytest.raises(ConversionError) as caught:
        find_targets(model, where)
    for name, reason in caught.value.refused:
        assert name in str(caught.value) and reason in str(caught.value)
    return dict(caught.value.refused)


def everything(name, module):
    return True


def test_default_takes_every_residual_block():
    targets = find_targets(resnet18())
    assert list(targets.blocks) == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert targets.convs == {} and targets.left_dense == []


def test_default_takes_a_subclass_with_the_same_forward():
    assert list(find_targets(nn.Sequential(SameForward(4, 4))).blocks) == ["0"]


def test_default_takes_blocks_whose_second_convolution_is_deformable():
    blocks = [
        DeformableBlock(BasicBlock(4, 4)),
        DeformableBlock(Bottleneck(16, 4)),
        BasicBlock(4, 4),
    ]
    blocks[2].conv2 = DeformableConv2d.from_conv(blocks[2].conv2)
    targets = find_targets(nn.Sequential(*blocks))
    assert list(targets.blocks) == ["0", "1", "2"] and targets.left_dense == []


def test_outermost_selection_wins():
    targets = find_targets(
        resnet18(),
        lambda name, module: name.startswith("layer4.0") or name in ("conv1", "layer1.0.conv1"),
    )
    assert list(targets.blocks) == ["layer4.0"]
    assert list(targets.convs) == ["conv1", "layer1.0.conv1"]


def test_where_selects_convolutions_of_any_network():
    vgg = torchvision.models.vgg11()
    targets = find_targets(vgg, lambda name, module: isinstance(module, nn.Conv2d))
    assert len(targets.convs) == 8 and all(name.startswith("features.") for name in targets.convs)


def test_where_may_select_containers_along_with_their_content():
    model = nn.Sequential(nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4)), nn.ReLU())
    targets = find_targets(model, lambda name, module: name.startswith("0"))
    assert list(targets.blocks) == ["0.0", "0.1"]


def test_a_container_alone_is_refused():
    assert "container" in refusals(resnet18(), lambda name, module: name == "layer4")["layer4"]


def test_a_module_with_two_names_is_listed_once():
    block = BasicBlock(4, 4)
    assert list(find_targets(nn.Sequential(block, block)).blocks) == ["0"]
    targets = find_targets(nn.Sequential(block, block), lambda name, module: name == "1")
    assert list(targets.blocks) == ["0"]


def edit(change):
    block = Bottleneck(16, 4)
    change(block)
    return block


def edit_deformable(change):
    block = DeformableBlock(Bottleneck(16, 4))
    change(block)
    return block


UNFIT_BLOCKS = {
    "forward": (OtherForward(4, 4), "another forward"),
    "patched": (edit(lambda b: setattr(b, "forward", b.forward)), "another forward"),
    "activation": (edit(lambda b: setattr(b, "relu", nn.GELU())), "activation is GELU"),
    "norm": (edit(lambda b: setattr(b, "bn2", nn.GroupNorm(1, 4))), "bn2: a GroupNorm"),
    "statistics": (
        edit(lambda b: setattr(b, "bn1", nn.BatchNorm2d(4, track_running_stats=False))),
        "bn1: it keeps no running statistics",
    ),
    "conv class": (
        edit(lambda b: setattr(b, "conv2", ScaledConv(4, 4, 3, padding=1))),
        "conv2: ScaledConv has another forward",
    ),
    "padding mode": (
        edit(lambda b: setattr(b, "conv2", nn.Conv2d(4, 4, 3, 1, 1, padding_mode="reflect"))),
        "conv2: padding_mode is 'reflect'",
    ),
    "padding": (
        edit(lambda b: setattr(b, "conv2", nn.Conv2d(4, 4, 3))),
        "conv2: padding is not half",
    ),
    "conv3": (
        edit(lambda b: setattr(b, "conv3", nn.Conv2d(4, 16, 3, padding=1))),
        "conv3 is not a 1x1",
    ),
    "extra child": (edit(lambda b: setattr(b, "attention", nn.Identity())), "attention"),
    "hook": (edit(lambda b: b.register_forward_hook(lambda *a: None)), "hooks are registered"),
    "guided where nobody guides": (
        edit(lambda b: setattr(b, "conv2", DeformableConv2d(4, 4, 3, 1, 1, guide_channels=16))),
        "conv2: it is to be guided, and torchvision's Bottleneck does not guide it; use a Deform",
    ),
    "deformable conv1": (
        edit(lambda b: setattr(b, "conv1", DeformableConv2d(16, 4, 1))),
        "conv1: DeformableConv2d has another forward",
    ),
    "deformable class": (
        edit(lambda b: setattr(b, "conv2", OwnDeformable(4, 4, 3, padding=1))),
        "conv2: OwnDeformable has another forward than DeformableConv2d",
    ),
    "deformable padding": (
        edit(lambda b: setattr(b, "conv2", DeformableConv2d(4, 4, 3))),
        "conv2: padding is not half",
    ),
    "guide that nobody asked for": (
        edit_deformable(lambda b: setattr(b, "conv2", DeformableConv2d(4, 4, 3, padding=1))),
        "conv2: a DeformableBlock guides it",
    ),
    "guide for a plain convolution": (
        edit_deformable(lambda b: setattr(b, "conv2", nn.Conv2d(4, 4, 3, padding=1))),
        "conv2: a Conv2d is not a DeformableConv2d",
    ),
    "forward of a deformable block": (
        OwnDeformableBlock(Bottleneck(16, 4)),
        "OwnDeformableBlock has another forward than DeformableBlock",
    ),
    "extra child of a deformable block": (
        edit_deformable(lambda b: setattr(b, "attention", nn.Identity())),
        "its children are not those of DeformableBlock: attention",
    ),
    "lazy": (
        edit(lambda b: setattr(b, "conv1", nn.LazyConv2d(4, 1))),
        "conv1: it is lazy",
    ),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", UNFIT_BLOCKS)
def test_unfit_blocks_are_left_dense_by_default_and_refused_when_selected(kind):
    block, reason = UNFIT_BLOCKS[kind]
    model = nn.ModuleList([block, BasicBlock(4, 4)])
    targets = find_targets(model)
    assert list(targets.blocks) == ["1"]
    ((name, why),) = targets.left_dense
    assert name == "0" and reason in why
    assert reason in refusals(model, lambda name, module: module is block)["0"]
    assert reason in refusals(nn.ModuleList([block]))["0"]


def hooked():
    conv = nn.Conv2d(4, 4, 1)
    conv.register_forward_pre_hook(lambda *args: None)
    return conv


def parametrised():
    conv = nn.Conv2d(4, 4, 1)
    parametrize.register_parametrization(conv, "weight", nn.Identity())
    return conv


UNFIT_LAYERS = {
    "deformable": (lambda: DeformableConv2d(4, 4, 1), "DeformableConv2d has another forward"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 2), "ConvTranspose2d is neither"),
    "linear": (lambda: nn.Linear(4, 4), "Linear is neither"),
    "one dimension": (lambda: nn.Conv1d(4, 4, 1), "Conv1d is neither"),
    "subclass": (lambda: ScaledConv(4, 4, 1), "ScaledConv has another forward"),
    "padding mode": (
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        "padding_mode is 'circular'",
    ),
    "hook": (hooked, "hooks are registered"),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        "parametrization",
    ),
    "parametrised": (parametrised, "a parametrization is registered"),
    "lazy": (lambda: nn.LazyConv2d(4, 1), "it is lazy"),
    "quantisation": (
        lambda: torch.ao.nn.qat.Conv2d(
            4, 4, 1, qconfig=torch.ao.quantization.get_default_qat_qconfig()
        ),
        "another forward",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", UNFIT_LAYERS)
def test_unfit_layers_are_refused(kind):
    make, reason = UNFIT_LAYERS[kind]
    model = nn.ModuleDict({"layer": make(), "fine": nn.Conv2d(4, 4, 1)})
    refused = refusals(model, lambda name, module: name in ("layer", "fine"))
    assert list(refused) == ["layer"] and reason in refused["layer"]


def test_every_refusal_is_listed_at_once():
    refused = refusals(resnet18(), everything)
    assert set(refused) == {"bn1", "relu", "maxpool", "avgpool", "fc"}


def test_a_conv_shared_with_a_selected_block_is_refused():
    block = BasicBlock(4, 4)
    refused = refusals(
        nn.ModuleList([block, nn.Sequential(block.conv1)]),
        lambda name, module: name == "0" or module is block.conv1,
    )
    assert "part of a selected block" in next(iter(refused.values()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.compile(resnet18(), backend="eager"), "is compiled"),
        (lambda: nn.DataParallel(nn.Sequential(BasicBlock(4, 4))), "wrapped in DataParallel"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "holds no residual block"),
    ],
)
def test_unfit_models_are_refused(make, message):
    with pytest.raises(ConversionError, match=message):
        find_targets(make())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_scripted_model_is_refused():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ConversionError, match=r"is scripted.*before scripting"):
        find_targets(nn.Sequential(scripted, BasicBlock(4, 4)))


def test_a_module_compiled_in_place_is_refused():
    model = nn.Sequential(BasicBlock(4, 4))
    model[0].compile(backend="eager")
    with pytest.raises(ConversionError, match=r"submodule '0' is compiled"):
        find_targets(model)


def test_where_that_selects_nothing_is_refused():
    with pytest.raises(ConversionError, match=r"selected none of the .*named_modules"):
        find_targets(resnet18(), lambda name, module: False)


def test_where_must_be_callable():
    with pytest.raises(TypeError, match=r"where is 'layer4'.*lambda name, module"):
        find_targets(resnet18(), "layer4")


def test_the_error_survives_pickling():
    error = ConversionError("sparsify: refused:", [("a.b", "because"), ("c", "also")])
    copied = pickle.loads(pickle.dumps(error))
    assert str(copied) == str(error) and copied.refused == error.refused
    assert isinstance(error, ValueError)


class Chain(nn.Module):
    """Says which of its convolutions cost enough to be sampled."""

    def __init__(self, *names):
        super().__init__()
        self.names = names
        self.cheap, self.dear = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.odd = ScaledConv(4, 4, 3, padding=1)
        self.relu = nn.ReLU()

    def convs_to_sample(self):
        return list(self.names)


def test_default_takes_the_convolutions_that_a_module_names():
    targets = find_targets(nn.Sequential(Chain("dear"), BasicBlock(4, 4), Chain()))
    assert list(targets.convs) == ["0.dear"] and list(targets.blocks) == ["1"]
    assert list(find_targets(Chain("dear", "cheap")).convs) == ["cheap", "dear"]


def test_a_named_convolution_that_cannot_be_sampled_is_left_dense_with_its_reason():
    targets = find_targets(Chain("dear", "odd", "relu"))
    assert list(targets.convs) == ["dear"]
    assert targets.left_dense == [
        ("odd", "ScaledConv has another forward than Conv2d"),
        ("relu", "a ReLU is not a Conv2d"),
    ]
