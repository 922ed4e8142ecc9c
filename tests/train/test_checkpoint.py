from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from sparsight.train.architecture import Architecture, Sampling, build_dense, convert
from sparsight.train.checkpoint import (
    AtomicCheckpointIO,
    load_checkpoint,
    read_architecture,
    read_dataset,
    save_checkpoint,
    write_atomically,
)

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

SMALL = Architecture(num_classes=3, fpn_channels=8, head_channels=8, size=(32, 48))
SAMPLED = replace(SMALL, sampling=Sampling())


@pytest.fixture(scope="module")
def dense_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "weights.safetensors"
    torch.manual_seed(1)
    save_checkpoint(path, build_dense(SMALL), SMALL)
    return path


@pytest.mark.parametrize("architecture", [SMALL, SAMPLED])
def test_what_was_saved_comes_back(tmp_path, architecture):
    model = convert(build_dense(architecture), architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    path = tmp_path / "weights.safetensors"
    save_checkpoint(path, model.to(memory_format=torch.channels_last), architecture)
    loaded, described = load_checkpoint(path)
    assert described == read_architecture(path) == architecture
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_the_data_set_is_told_and_older_files_say_nothing(tmp_path, dense_file):
    path = tmp_path / "weights.safetensors"
    save_checkpoint(path, build_dense(SMALL), SMALL, dataset="camvid")
    assert read_dataset(path) == "camvid"
    assert read_architecture(path) == load_checkpoint(path)[1] == SMALL
    assert read_dataset(dense_file) is None


def test_dense_weights_start_a_sampled_model(dense_file):
    sampled, architecture = load_checkpoint(dense_file, expected=SAMPLED)
    dense, _ = load_checkpoint(dense_file)
    state = sampled.state_dict()
    assert architecture == SAMPLED
    assert all(torch.equal(state[name], value) for name, value in dense.state_dict().items())
    assert any("samplers" in name for name in state)


def test_another_architecture_is_refused_by_name(dense_file):
    with pytest.raises(
        ValueError,
        match=r"load_checkpoint: .*weights\.safetensors' holds another architecture.*backbone is "
        r"'resnet18', not 'resnet34'.*num_classes is 3, not 4|num_classes is 3, not 4.*backbone is "
        r"'resnet18', not 'resnet34'",
    ):
        load_checkpoint(dense_file, expected=replace(SMALL, backbone="resnet34", num_classes=4))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load_checkpoint: .*gone\.safetensors' does not"):
        load_checkpoint(tmp_path / "gone.safetensors")


def test_a_pickle_is_not_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"is not a safetensors file.*pickled checkpoints are not"):
        load_checkpoint(path)


def test_weights_without_an_architecture_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"says nothing of its architecture.*save_checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["{nope", "[1, 2]"])
def test_an_architecture_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"sparsight.architecture": text})
    with pytest.raises(ValueError, match=r"architecture' in '.*' reads '.*fields .* as JSON"):
        load_checkpoint(path)


@pytest.mark.parametrize("sampling", [None, Sampling()])
def test_weights_that_do_not_fit_their_architecture_are_refused(tmp_path, sampling):
    path = tmp_path / "weights.safetensors"
    architecture = replace(SMALL, sampling=sampling)
    wider = replace(architecture, fpn_channels=16)
    save_checkpoint(path, convert(build_dense(architecture), architecture), wider)
    with pytest.raises(ValueError, match=r"do not fit .*laterals\.0\.weight.* such\); .*version"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_training_state_with_code_in_it_is_not_unpickled(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"function": print}, path)
    with pytest.raises(Exception, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)


def test_a_missing_training_state_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume: .*last\.ckpt' does not exist.*--out"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
