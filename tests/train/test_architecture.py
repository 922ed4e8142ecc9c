import json
from dataclasses import replace

import pytest
import torch

from sparsight.nn import SampledBlock, Sampler
from sparsight.train.architecture import (
    Architecture,
    Sampling,
    build_dense,
    convert,
)

SMALL = Architecture(num_classes=3, fpn_channels=8, head_channels=8, size=(32, 48))


def test_json_gives_the_same_architecture_back():
    for architecture in (SMALL, replace(SMALL, sampling=Sampling(noise="blue", grid_stride=None))):
        text = json.dumps(architecture.to_json())
        assert Architecture.from_json(json.loads(text)) == architecture


def test_json_of_another_version_is_refused():
    values = SMALL.to_json() | {"colour": 1}
    with pytest.raises(ValueError, match=r"from_json: fields .*colour.* another version"):
        Architecture.from_json(values)


def test_a_sampled_architecture_is_what_it_says():
    sampled = replace(SMALL, sampling=Sampling(layout="a", noise="none", grid_stride=7))
    model = convert(build_dense(sampled), sampled)
    blocks = [m for m in model.modules() if isinstance(m, SampledBlock)]
    samplers = [m for m in model.modules() if isinstance(m, Sampler)]
    assert len(blocks) == len(samplers) == 8  # layout a: one mask a block
    assert {(s.noise, s.grid_stride) for s in samplers} == {("none", 7)}
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 32, 48))["out"].shape == (1, 3, 32, 48)


def test_a_dense_architecture_is_left_alone():
    dense = build_dense(SMALL)
    assert convert(dense, SMALL) is dense


@pytest.mark.parametrize(
    ("wanted", "stored", "found"),
    [
        (SMALL, SMALL, []),
        (SMALL, replace(SMALL, size=(64, 64)), []),
        (replace(SMALL, sampling=Sampling()), SMALL, []),
        (SMALL, replace(SMALL, sampling=Sampling()), ["it is sampled, not dense"]),
        (SMALL, replace(SMALL, backbone="resnet34"), ["backbone is 'resnet34', not 'resnet18'"]),
        (
            replace(SMALL, sampling=Sampling(layout="a")),
            replace(SMALL, num_classes=4, sampling=Sampling(layout="b")),
            ["num_classes is 4, not 3", "layout is 'b', not 'a'"],
        ),
    ],
)
def test_differences_name_what_keeps_weights_from_fitting(wanted, stored, found):
    assert wanted.differences(stored) == found
