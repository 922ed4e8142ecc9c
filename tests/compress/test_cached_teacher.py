"""A wrong hit would teach in silence what the teacher never said: everything here is about that."""

import json
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsight.compress import CachedTeacher
from sparsight.convert import freeze
from sparsight.nn import SampledConv2d, Sampler, ZeroFill

NAMES = ["output"]


class Counting:
    """Runs a teacher, and counts how often."""

    def __init__(self, model):
        self.model = model
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        with torch.no_grad():
            return {"output": self.model(images)}


def teacher(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))


def images(seed=0, count=3):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def files(folder):
    return sorted(Path(folder).glob("*/*.safetensors"))


def test_what_was_computed_once_is_read(tmp_path):
    cached = CachedTeacher(teacher(), tmp_path / "new")
    run = Counting(cached.model)
    first = cached.outputs(images(), run, names=NAMES)["output"]
    again = cached.outputs(images().flip(0), run, names=NAMES)["output"]
    assert run.calls == 1
    assert torch.equal(again.flip(0), first)
    assert torch.equal(first, run(images())["output"])
    assert len(files(tmp_path / "new")) == 3
    assert (cached.num_hits, cached.num_misses) == (3, 3)
    assert "num_hits=3, num_misses=3" in repr(cached)
    # Another run, and a batch of which one image is missing.
    other = CachedTeacher(teacher(), tmp_path / "new")
    mixed = torch.cat([images(), images(1, 1)])
    found = other.outputs(mixed, run, names=NAMES)["output"]
    assert run.calls == 3 and (other.num_hits, other.num_misses) == (3, 1)
    assert torch.equal(found[:3], first)
    assert torch.equal(found[3], run(mixed)["output"][3])


def test_an_image_that_differs_at_all_is_another(tmp_path):
    """One bit of one pixel, the shape, the dtype, a crop: as random augmentation leaves them."""
    cached = CachedTeacher(teacher(), tmp_path)
    run = Counting(nn.Flatten())
    cached.outputs(images(), run, names=NAMES)
    changed = images()
    changed[1, 2, 3, 4] = torch.nextafter(changed[1, 2, 3, 4], torch.tensor(9.0))
    variants = [
        changed[1:2],
        images().flip(-1),
        images().reshape(3, 3, 4, 16),
        images().double(),
        images()[..., 1:],
    ]
    for i, variant in enumerate(variants):
        found = cached.outputs(variant, run, names=NAMES)["output"]
        assert run.calls == i + 2
        assert torch.equal(found, variant.flatten(1))
    # The memory format is no difference.
    last = images().to(memory_format=torch.channels_last)
    cached.outputs(last, run, names=NAMES)
    assert run.calls == len(variants) + 1


def test_precision_and_what_is_asked_for_are_part_of_the_key(tmp_path):
    cached = CachedTeacher(teacher().eval(), tmp_path)
    run = Counting(cached.model)
    exact = cached.outputs(images(), run, names=NAMES)["output"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = cached.outputs(images(), run, names=NAMES)["output"]
    assert run.calls == 2 and rough.dtype == torch.bfloat16
    cached.outputs(images(), run, names=["output", "layer2"])
    assert run.calls == 3
    assert torch.equal(cached.outputs(images(), run, names=NAMES)["output"], exact)


def test_half_precision_returns_what_it_stores(tmp_path):
    """Also on the call that computes it: a resumed run sees what the first one saw."""
    cached = CachedTeacher(teacher(), tmp_path, dtype=torch.float16)
    run = Counting(cached.model)
    first, again = (cached.outputs(images(), run, names=NAMES)["output"] for _ in range(2))
    assert run.calls == 1 and first.dtype == torch.float32
    assert torch.equal(first, again)
    assert torch.equal(first, run(images())["output"].half().float())


def test_another_teacher_is_refused(tmp_path):
    CachedTeacher(teacher(), tmp_path)
    CachedTeacher(teacher(), tmp_path)
    message = r"was written for another teacher; .*pass another folder, or delete this one"
    with pytest.raises(ValueError, match=message):
        CachedTeacher(teacher(1), tmp_path)
    norms = teacher()
    norms[1].running_mean += 1
    with pytest.raises(ValueError, match=message):
        CachedTeacher(norms, tmp_path)
    strided = teacher()
    strided[0].padding_mode = "reflect"  # the same weights, another structure
    with pytest.raises(ValueError, match=message):
        CachedTeacher(strided, tmp_path)
    with pytest.raises(ValueError, match=r"written for another dtype"):
        CachedTeacher(teacher(), tmp_path, dtype=torch.float16)
    (tmp_path / "teacher.json").write_text("[")
    with pytest.raises(ValueError, match=r"another format and teacher and dtype"):
        CachedTeacher(teacher(), tmp_path)


def test_a_teacher_that_changes_while_it_teaches_is_refused(tmp_path):
    cached = CachedTeacher(teacher(), tmp_path)
    run = Counting(cached.model)
    cached.outputs(images(), run, names=NAMES)
    cached.model.load_state_dict(teacher().state_dict())  # written to, but the same
    cached.outputs(images(), run, names=NAMES)
    cached.model.load_state_dict(teacher(1).state_dict())
    with pytest.raises(ValueError, match=r"the teacher has changed since"):
        cached.outputs(images(), run, names=NAMES)
    other = CachedTeacher(teacher(), tmp_path)
    other.model[3].weight = nn.Parameter(other.model[3].weight.detach() * 2)
    with pytest.raises(ValueError, match=r"the teacher has changed since"):
        other.outputs(images(), run, names=NAMES)


@pytest.mark.parametrize("damage", [b"", b"cut", None])
def test_what_is_damaged_is_computed_again(tmp_path, damage):
    cached = CachedTeacher(teacher(), tmp_path)
    run = Counting(cached.model)
    wanted = cached.outputs(images(count=2), run, names=NAMES)["output"]
    first, second = files(tmp_path)
    first.write_bytes(second.read_bytes() if damage is None else damage)
    with pytest.warns(UserWarning, match="is damaged or was renamed; it is computed again"):
        found = cached.outputs(images(count=2), run, names=NAMES)["output"]
    assert torch.equal(found, wanted) and run.calls == 2
    assert torch.equal(cached.outputs(images(count=2), run, names=NAMES)["output"], wanted)
    assert run.calls == 2


def test_many_writers_leave_whole_files(tmp_path):
    cached = [CachedTeacher(teacher(), tmp_path) for _ in range(3)]
    wanted = cached[0].model(images())
    threads = [
        threading.Thread(
            target=lambda c=c: [
                c.outputs(images(), Counting(c.model), names=NAMES) for _ in range(2)
            ]
        )
        for c in cached
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = cached[0].outputs(images(), Counting(None), names=NAMES)["output"]
    torch.testing.assert_close(found, wanted)
    names = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors"}


def test_a_full_folder_takes_no_more(tmp_path):
    cached = CachedTeacher(teacher(), tmp_path, max_gib=400 / 2**30)
    run = Counting(cached.model)
    with pytest.warns(UserWarning, match="is full; what is missing is computed each time"):
        first = cached.outputs(images(), run, names=NAMES)["output"]
    kept = len(files(tmp_path))
    assert 0 < kept < 3
    assert torch.equal(cached.outputs(images(), run, names=NAMES)["output"], first)
    assert len(files(tmp_path)) == kept and run.calls == 2


def test_what_is_not_finite_is_not_kept(tmp_path):
    cached = CachedTeacher(teacher(), tmp_path, dtype=torch.float16)
    run = Counting(nn.Flatten())
    with pytest.raises(ValueError, match=r"not finite in torch\.float16; .*store in float32"):
        cached.outputs(images() * 1e6, run, names=NAMES)
    assert not files(tmp_path)


def test_what_cannot_be_cached_is_refused(tmp_path):
    for noise in ("blue", "none"):
        sampler = Sampler(3, noise=noise)
        sampled = nn.Sequential(SampledConv2d(3, 8, 3, sampler=sampler, interpolation=ZeroFill()))
        frozen = freeze(sampled.eval(), example=torch.zeros(1, 3, 8, 8))
        for i, model in enumerate((sampled, frozen)):
            if noise == "none":
                CachedTeacher(model, tmp_path / str(i))
                continue
            with pytest.raises(ValueError, match=r"draws noise in '0\.\w.*place in the batch"):
                CachedTeacher(model, tmp_path / "new")
    with pytest.raises(ValueError, match=r"dtype=torch\.int8; a floating type"):
        CachedTeacher(teacher(), tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"max_gib=0; more than 0"):
        CachedTeacher(teacher(), tmp_path, max_gib=0)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files but no teacher\.json"):
        CachedTeacher(teacher(), tmp_path)
    cached = CachedTeacher(teacher(), tmp_path / "rows")
    with pytest.raises(ValueError, match=r"\(5,\) for 3 images; one row for each image"):
        cached.outputs(images(), lambda _: {"output": torch.zeros(5)}, names=NAMES)


def test_the_folder_says_whose_it_is(tmp_path):
    CachedTeacher(teacher(), tmp_path)
    stored = json.loads((tmp_path / "teacher.json").read_text())
    assert set(stored) == {"format", "teacher", "dtype"} and len(stored["teacher"]) == 64
