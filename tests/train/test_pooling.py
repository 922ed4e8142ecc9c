import pytest
from torch import nn

from sparsight.convert import ConversionError
from sparsight.models import resnet_cifar, small_c3d
from sparsight.nn.pooling import PooledConv2d, SoftPool2d, SoftPool3d
from sparsight.train.pooling import apply_pooling


def test_own_poolings_are_left_alone():
    dense = small_c3d(num_classes=2)
    assert apply_pooling(dense, "own", pools_strides=False) is dense


def test_a_kind_is_put_in_and_the_source_stays():
    dense = small_c3d(num_classes=2)
    pooled = apply_pooling(dense, "soft", pools_strides=False)
    assert sum(isinstance(module, SoftPool3d) for module in pooled.modules()) == 3
    assert sum(isinstance(module, nn.MaxPool3d) for module in dense.modules()) == 3


@pytest.mark.parametrize(
    ("kind", "cls"), [("soft", SoftPool2d), ("max", nn.MaxPool2d), ("average", nn.AvgPool2d)]
)
def test_strides_become_poolings_where_asked(kind, cls):
    pooled = apply_pooling(resnet_cifar(8), kind, pools_strides=True)
    convs = [module for module in pooled.modules() if isinstance(module, PooledConv2d)]
    assert [type(conv.pool) for conv in convs] == [cls, cls]


def test_a_network_without_poolings_is_refused():
    with pytest.raises(ConversionError, match="holds no selected module that soft pooling could"):
        apply_pooling(resnet_cifar(8), "soft", pools_strides=False)


def test_strides_need_a_kind():
    with pytest.raises(ValueError, match=r"pools_strides=True came with pooling='own'.*--pooling"):
        apply_pooling(resnet_cifar(8), "own", pools_strides=True)
