"""Merged maps: torch's operators one by one are the truth, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F

from sparsight.ops import cpu, merge_maps
from sparsight.ops.merge import merge_maps_plain

RESIZINGS = ("nearest", "bilinear", "bilinear_corners")
SIZES = [
    [(4, 6), (2, 3), (7, 9)],
    [(1, 1), (5, 4), (5, 4)],
    [(8, 8), (4, 4), (16, 16)],
    [(9, 1), (3, 5), (2, 2)],
]
CHANNELS = [(3,), (16, 5), (48, 48), (96, 32), (33, 1, 17)]


def maps_of(channels, sizes, *, dtype=torch.float32, batch=2):
    return [
        torch.randn(batch, c, *size).to(dtype=dtype, memory_format=torch.channels_last)
        for c, size in zip(channels, sizes, strict=False)
    ]


@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("resizing", RESIZINGS)
@pytest.mark.parametrize("merging", ["concatenate", "sum"])
def test_the_kernel_is_torchs_operators(isa, resizing, merging):
    torch.manual_seed(0)
    for channels in CHANNELS:
        for sizes in SIZES:
            if merging == "sum":
                channels = channels[:1] * len(channels)
            maps = maps_of(channels, sizes)
            largest = tuple(max(x.shape[i] for x in maps) for i in (2, 3))
            for size in (largest, (11, 13), (1, 1)):
                expected = merge_maps_plain(maps, merging=merging, resizing=resizing, size=size)
                number = RESIZINGS.index(resizing)
                for num_threads in (1, 3):
                    found = cpu.merge_maps(
                        maps, size, merging == "sum", number, isa=isa, num_threads=num_threads
                    )
                    assert found.is_contiguous(memory_format=torch.channels_last)
                    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_maps_of_the_size_are_copied_to_the_bit():
    x, y = maps_of((37, 5), [(6, 5), (6, 5)])
    x[0, 3, 2, 1], y[1, 0, 0, 0] = torch.inf, torch.nan
    found = merge_maps([x, y], merging="concatenate")
    assert torch.equal(found[:, :37], x)
    assert torch.equal(found[:, 37:].nan_to_num(7), y.nan_to_num(7))


def test_not_numbers_stay_where_torch_has_them():
    (x,) = maps_of((20,), [(3, 4)], batch=1)
    x[0, 2, 1, 1], x[0, 5, 2, 3] = torch.nan, torch.inf
    for resizing in RESIZINGS:
        found = merge_maps([x], merging="sum", resizing=resizing, size=(7, 9))
        expected = merge_maps_plain([x], merging="sum", resizing=resizing, size=(7, 9))
        assert torch.equal(found.isnan(), expected.isnan())


def test_large_maps_are_written_past_the_caches_alike():
    x, y = maps_of((64, 32), [(360, 480), (180, 240)], batch=1)
    found = merge_maps([x, y], merging="concatenate")
    assert found.nbytes > 48 << 20
    torch.testing.assert_close(
        found, merge_maps_plain([x, y], merging="concatenate"), atol=2e-6, rtol=1e-5
    )


@pytest.mark.skipif(not cpu.has_bfloat16(), reason="no AVX-512 BF16")
def test_bfloat16_is_rounded_once():
    torch.manual_seed(0)
    x, y = maps_of((40, 40), [(5, 6), (9, 11)], dtype=torch.bfloat16)
    for resizing in RESIZINGS:
        found = merge_maps([x, y], merging="sum", resizing=resizing)
        exact = merge_maps_plain([x.float(), y.float()], merging="sum", resizing=resizing)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), exact, atol=1e-6, rtol=2**-8)
    both = merge_maps([y, y], merging="concatenate")
    assert torch.equal(both, torch.cat([y, y], 1))


def test_what_the_kernel_does_not_take_is_torchs():
    x = torch.randn(1, 3, 4, 5, requires_grad=True)
    y = torch.randn(1, 3, 2, 2)
    merge_maps([x, y], merging="sum").sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    wide = merge_maps([x.detach().double(), y.double()], merging="sum", resizing="nearest")
    assert torch.equal(wide, x.detach().double() + F.interpolate(y.double(), size=(4, 5)))
    with torch.no_grad():
        assert merge_maps([x], merging="concatenate").shape == x.shape


@pytest.mark.parametrize(
    ("maps", "options", "error", "words"),
    [
        ([], {}, ValueError, "empty"),
        ([torch.zeros(3, 4, 5)], {}, ValueError, r"\(3, 4, 5\)"),
        ([torch.zeros(1, 2, 4, 5), torch.zeros(2, 2, 4, 5)], {}, ValueError, r"maps\[1\]"),
        ([torch.zeros(1, 2, 0, 5)], {}, ValueError, "at least one"),
        ([torch.zeros(1, 2, 4, 5), torch.zeros(1, 3, 4, 5)], {}, ValueError, "3 channels"),
        ([torch.zeros(1, 2, 4, 5, dtype=torch.int64)], {}, TypeError, "int64"),
        (
            [torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4, 5, dtype=torch.float64)],
            {},
            TypeError,
            "float64",
        ),
        ([torch.zeros(1, 2, 4, 5)], {"resizing": "cubic"}, ValueError, "cubic"),
        ([torch.zeros(1, 2, 4, 5)], {"size": (0, 3)}, ValueError, r"size=\(0, 3\)"),
    ],
)
def test_bad_input_is_named(maps, options, error, words):
    with pytest.raises(error, match=words):
        merge_maps(maps, merging="sum", **options)


def test_an_unknown_merging_is_named():
    with pytest.raises(ValueError, match="'product'"):
        merge_maps([torch.zeros(1, 2, 4, 5)], merging="product")
