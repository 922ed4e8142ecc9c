"""The operator and the frozen block in bfloat16: refusals, opcheck, compile and export."""

import pytest
import torch

from sparsight.nn.frozen_block import FrozenBlock

from .rounding import (
    DTYPES,
    NARROW,
    WIDE,
    blocks,
    make_whole,
    noises,
    whole_features,
)


@pytest.mark.parametrize("wrong", ["x", "shortcut", "output", "params", "float32 block"])
def test_other_dtypes_are_refused(wrong, draw):
    dtype = WIDE if wrong == "float32 block" else NARROW
    packed = blocks.Packed(blocks.make("bottleneck", "b").block, dtype=dtype)
    x = blocks.features(packed, draw(0))
    arguments = list(packed.arguments(x, blocks.given_masks(packed, x, draw(1), 0.5)))
    if wrong == "x":
        arguments[0], arguments[1] = arguments[0].float(), arguments[1].float()
        message = "not the one that the block was packed for"
    else:
        index, to, message = {
            "shortcut": (1, WIDE, r"x is torch.bfloat16, shortcut torch.float32.*the same"),
            "output": (8, torch.float16, r"the output torch.float16.*either that or"),
            "params": (4, NARROW, r"params torch.bfloat16.*no frozen model with .to\(dtype\)"),
            "float32 block": (8, NARROW, r"x is torch.float32.*the output torch.bfloat16"),
        }[wrong]
        arguments[index] = to if index == 8 else arguments[index].to(to)
    with pytest.raises(TypeError, match=message):
        torch.ops.sparsight.sampled_block(*arguments)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("output_dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bottleneck", "bottleneck strided", "deformable"])
def test_passes_opcheck(kind, output_dtype, draw):
    packed = make_whole(kind, "c", draw(0), sampler=blocks.heads())
    x = whole_features(packed, draw(7))
    noise = noises(packed, x, draw(8))
    arguments = packed.arguments(x, [None] * len(noise), noise, output_dtype)
    torch.library.opcheck(torch.ops.sparsight.sampled_block.default, arguments)


@pytest.mark.parametrize(
    ("kind", "output_dtype"),
    [
        ("bottleneck", NARROW),
        ("bottleneck", WIDE),
        ("basic", NARROW),
        ("deformable v2 strided", WIDE),
    ],
)
def test_a_frozen_block_compiles_and_exports(kind, output_dtype, draw):
    """ "basic" has an odd number of channels: its heads are layers of their own."""
    source = blocks.make(kind, "b", sampler=blocks.heads()).block.eval().requires_grad_(False)
    frozen = FrozenBlock(source, dtype=NARROW)
    frozen.output_dtype = output_dtype
    x = blocks.features(blocks.Packed(source), draw(0)).to(WIDE)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = frozen(x)
        assert expected.dtype == output_dtype
        assert torch.equal(compiled(x), expected)
        program = torch.export.export(frozen, (x,))
        assert torch.equal(program.module()(x), expected)
