import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sparsight.cli import find_recipe, load_recipe, main, normalise_flags
from sparsight.train.architecture import Architecture, Sampling, build_dense, convert
from sparsight.train.checkpoint import read_dataset, save_checkpoint
from sparsight.train.data import SyntheticScenes, moving_shapes

pytestmark = pytest.mark.usefixtures("narrow_resnet18")
ROOT = Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "recipes" / "segmentation" / "camvid.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder in CamVid's layout with drawn scenes in it."""
    root = tmp_path_factory.mktemp("camvid")
    for split, count, seed in (("train", 6, 1), ("val", 3, 2)):
        for folder in (root / split, root / f"{split}annot"):
            folder.mkdir()
        for i, (image, labels) in enumerate(SyntheticScenes(count, size=(64, 96), seed=seed)):
            if i == count:
                break
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            picture.save(root / split / f"scene{i}.png")
            Image.fromarray(labels.byte().numpy()).save(root / f"{split}annot" / f"scene{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """What a quick sampled run leaves."""
    out = tmp_path_factory.mktemp("run")
    arguments = ["--data", str(data), "--size", "64x96", "--fpn-channels", "8", "--quick"]
    arguments += ["--head-channels=8", "--budget", "0.7", "--progress-bar", "false"]
    assert main(["train", RECIPE, *arguments, "--out", str(out)]) == 0
    return out


def test_training_leaves_weights_a_score_and_a_log(trained):
    result = json.loads((trained / "result.json").read_text())
    assert result["num_images"] == 3
    assert result["share"] == pytest.approx(0.7, abs=0.02)
    assert result["architecture"]["sampling"]["layout"] == "b"
    assert 0 <= result["miou"] <= 1
    assert (trained / "weights.safetensors").is_file()
    assert "val_miou" in (trained / "log" / "metrics.csv").read_text()


def test_evaluating_counts_the_same_and_measures(trained, data, tmp_path, capsys):
    out = tmp_path / "scores.json"
    weights = str(trained / "weights.safetensors")
    # The noise depends on an image's place in its batch: the same batches as in training.
    flags = ["--seeds", "2", "--batch-size", "2", "--out", str(out)]
    assert main(["evaluate", weights, "--data", str(data), *flags]) == 0
    result = json.loads(out.read_text())
    trained_result = json.loads((trained / "result.json").read_text())
    assert result["scores"][0]["macs_total"] == trained_result["macs_total"]
    assert result["scores"][0]["miou"] == pytest.approx(trained_result["miou"], abs=0.01)
    assert result["scores"][1]["macs_total"] != result["scores"][0]["macs_total"]
    assert (result["dataset"], result["metric"]) == ("camvid", "miou")
    mious = [score["miou"] for score in result["scores"]]
    assert result["summary"]["miou"]["mean"] == pytest.approx(sum(mious) / 2)
    assert (result["summary"]["miou"]["min"], result["summary"]["miou"]["max"]) == (
        min(mious),
        max(mious),
    )
    assert [row["name"] for row in result["latency"]["rows"]] == [
        "dense, eager channels-last",
        "dense, frozen",
        "sampled, frozen",
    ]
    printed = capsys.readouterr().out
    assert "mIoU" in printed and "; 2 sampling seeds" in printed


def test_a_profile_names_the_layers(trained, capsys):
    assert main(["profile", str(trained / "weights.safetensors")]) == 0
    assert "layer1.0" in capsys.readouterr().out


def test_a_profile_with_measured_layers_says_what_both_forms_took(trained, capsys):
    assert main(["profile", str(trained / "weights.safetensors"), "--choose", "measured"]) == 0
    line = r"layer1\.0: computed=(dense|sampled) \(dense: .* ms, sampled: .* ms at density [01]\."
    assert re.search(line, capsys.readouterr().out)


def test_a_profile_of_a_classifier_names_the_layers(tmp_path, capsys):
    architecture = Architecture(
        model="resnet_cifar", num_classes=10, backbone="resnet8", size=(32, 32), sampling=Sampling()
    )
    weights = tmp_path / "weights.safetensors"
    save_checkpoint(weights, convert(build_dense(architecture), architecture), architecture)
    assert main(["profile", str(weights)]) == 0
    assert "layer3.0" in capsys.readouterr().out


def test_a_model_with_other_poolings_is_trained_and_scored_frozen(data, tmp_path):
    flags = ["--data", str(data), "--size", "32x48", "--fpn-channels", "8", "--head-channels", "8"]
    flags += ["--quick", "--progress-bar", "false", "--pooling", "soft", "--pools-strides"]
    assert main(["train", RECIPE, *flags, "--out", str(tmp_path)]) == 0
    trained = json.loads((tmp_path / "result.json").read_text())
    weights, out = str(tmp_path / "weights.safetensors"), tmp_path / "scores.json"
    flags = ["--data", str(data), "--latency", "false", "--out", str(out)]
    assert main(["evaluate", weights, *flags]) == 0
    result = json.loads(out.read_text())
    assert result["architecture"] == trained["architecture"]
    assert result["architecture"]["pools_strides"] and result["frozen"]
    assert result["scores"][0]["macs_total"] == trained["macs_total"]
    assert result["scores"][0]["miou"] == pytest.approx(trained["miou"], abs=1e-3)


def test_a_model_of_clips_is_scored_and_profiled_without_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(moving_shapes._NUM_CLIPS, "val", 4)
    architecture = Architecture(
        model="small_c3d",
        num_classes=8,
        backbone=None,
        fpn_channels=None,
        head_channels=None,
        size=(16, 16),
        pooling="soft",
    )
    weights = tmp_path / "weights.safetensors"
    save_checkpoint(weights, build_dense(architecture), architecture, dataset="moving_shapes")
    out = tmp_path / "scores.json"
    assert main(["evaluate", str(weights), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["dataset"], result["metric"]) == ("moving_shapes", "top1")
    assert result["architecture"]["pooling"] == "soft"
    assert [row["name"] for row in result["latency"]["rows"]][1] == "dense, frozen"
    capsys.readouterr()
    assert main(["profile", str(weights)]) == 0
    assert re.search(r"pool1 +SoftPool3d", capsys.readouterr().out)
    assert main(["profile", str(weights), "--image", "x.png"]) == 1
    assert "image='x.png' was given for a model of clips" in capsys.readouterr().err


def test_masks_are_drawn(trained, data, tmp_path):
    arguments = [str(trained / "weights.safetensors"), "--data", str(data), "--images", "[0,2]"]
    assert main(["masks", *arguments, "--out", str(tmp_path)]) == 0
    written = ["overview.png", "scene0.png", "scene2.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == written
    assert main(["masks", *arguments, "--out", str(tmp_path / "b"), "--per-sampler", "false"]) == 0
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["overview.png"]


def test_results_that_cannot_be_written_are_one_line(trained, data, tmp_path, capsys):
    flags = [str(trained / "weights.safetensors"), "--data", str(data)]
    assert main(["evaluate", *flags, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "is a folder; a file is required; pass --out" in printed.err
    assert "seed 0" not in printed.out  # nothing was scored in vain
    (tmp_path / "file").write_text("")
    assert main(["masks", *flags, "--images", "[0]", "--out", str(tmp_path / "file")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sparsight: error: ") and "file" in error and "Traceback" not in error


def test_pictures_are_predicted(trained, data, tmp_path, capsys):
    weights = str(trained / "weights.safetensors")
    flags = ["--images", str(data / "val"), "--out", str(tmp_path), "--scales", "0.5,1", "--flip"]
    assert main(["predict", weights, *flags, "--window", "64x64", "--overlap", "8"]) == 0
    names = [f"scene{i}_{kind}.png" for i in range(3) for kind in ("labels", "overlay")]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    assert main(["predict", weights, "--images", "nowhere"]) == 1
    assert "'nowhere' does not exist" in capsys.readouterr().err


def test_an_image_that_is_not_there_is_named(trained, data, tmp_path, capsys):
    arguments = [str(trained / "weights.safetensors"), "--data", str(data), "--images", "[7]"]
    assert main(["masks", *arguments, "--out", str(tmp_path)]) == 1
    assert "camvid: image 7 of 3; 0 to 2 is required" in capsys.readouterr().err


def test_another_data_set_is_asked_for_in_vain(trained, data, capsys):
    """A run is recorded as one of CamVid; the images and the number of classes must fit."""
    assert read_dataset(trained / "weights.safetensors") == "camvid"
    flags = [str(trained / "weights.safetensors"), "--data", str(data), "--dataset"]
    assert main(["evaluate", *flags, "cityscapes"]) == 1
    assert "Cityscapes: root=" in capsys.readouterr().err
    assert main(["masks", *flags, "coco"]) == 1
    error = capsys.readouterr().err
    assert "'coco' was asked for; one of camvid, cityscapes is required; pass it as" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "root='nowhere' has no folder 'train'; expected train/"),
        ([], "no data folder was given"),
        (["--quick", "--budget", "1.5"], "budget=1.5; a share of the dense model's MACs in (0, 1]"),
        (["--quick", "--init", "gone.safetensors"], "'gone.safetensors' does not exist"),
        (
            ["--quick", "--budget", "0.5", "--sampling-weight", "0.1"],
            "budget=0.5 and sampling_weight=0.1 were both given",
        ),
    ],
)
def test_bad_input_is_one_line_without_a_traceback(arguments, message, capsys, tmp_path):
    assert main(["train", RECIPE, *arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sparsight: error: ")
    assert message in error
    assert "Traceback" not in error
    with pytest.raises((ValueError, FileNotFoundError)):
        main(["train", RECIPE, *arguments, "--out", str(tmp_path), "--traceback"])


def test_a_checkpoint_of_another_architecture_does_not_start_a_run(trained, tmp_path, capsys):
    arguments = ["--quick", "--size", "64x96", "--init", str(trained / "weights.safetensors")]
    assert main(["train", RECIPE, *arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "num_classes is 11, not 6" in error
    assert "fpn_channels is 8, not 48" in error
    assert "it is sampled, not dense" in error


def test_a_recipe_is_found_by_path_and_by_name(tmp_path):
    assert find_recipe(RECIPE) == Path(RECIPE)
    for name in ("segmentation/camvid", "recipes/segmentation/camvid.py"):
        assert find_recipe(name).resolve() == Path(RECIPE)
    with pytest.raises(
        FileNotFoundError, match=r"recipe 'nope' was not found.*segmentation/camvid"
    ):
        find_recipe("nope")
    empty = tmp_path / "mine.py"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"mine\.py' defines no function 'mine'"):
        load_recipe(empty)


def test_a_recipe_of_ones_own_runs(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("def mine(*, batch_size: int = 1):\n    print('ran', batch_size)\n")
    assert main(["train", str(path), "--batch-size", "3"]) == 0
    assert "ran 3" in capsys.readouterr().out


def test_flags_may_be_written_as_people_write_them():
    given = ["--batch-size", "8", "--size=240x320", "--quick", "--out-dir=a-b", "--lr", "1e-3"]
    assert normalise_flags(given) == [
        "--batch_size",
        "8",
        "--size=[240,320]",
        "--quick",
        "true",
        "--out_dir=a-b",
        "--lr",
        "1e-3",
    ]
    given = ["--scales", "0.75,1,1.25", "--images=0,2", "a,b", "1.2.3"]
    assert normalise_flags(given) == ["--scales", "[0.75,1,1.25]", "--images=[0,2]", "a,b", "1.2.3"]
    assert normalise_flags(["--quick", "--help"]) == ["--quick", "true", "--help"]


def test_unknown_commands_and_flags_are_refused(capsys):
    assert main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["train", RECIPE, "--wings", "2"])
    assert stopped.value.code == 2
    assert "wings" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "profile", "masks", "predict", "demo"])
def test_every_command_explains_its_flags(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"sparsight {command}" in capsys.readouterr().out


SAMPLING_FLAGS = {
    "method": "sampled",
    "budget": "null",
    "sampling_weight": "null",
    "weights": "macs",
    "layout": "b",
    "noise": "white",
    "grid_stride": "11",
    "interpolation": "rbf",
    "eps": "null",
    "straight_through": "False",
    "anneal_share": "1.0",
}


@pytest.mark.parametrize(
    ("recipe", "own"),
    [
        ("segmentation/camvid", {}),
        ("segmentation/cityscapes", {}),
        ("detection/coco", {}),
        ("segmentation/prune_and_sample_camvid", {"budget": "0.5"}),
        (
            "classification/prune_and_sample_cifar10",
            {
                "budget": "0.5",
                "layout": "a",
                "noise": "blue",
                "grid_stride": "null",
                "anneal_share": "0.6",
                "window": "3",
            },
        ),
        ("classification/imagenet", {"window": "7"}),
        (
            "classification/cifar10",
            {
                "layout": "a",
                "noise": "blue",
                "grid_stride": "null",
                "anneal_share": "0.6",
                "window": "3",
            },
        ),
    ],
)
def test_every_recipe_has_the_flags_of_sampling_with_its_own_defaults(recipe, own, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(ROOT / "recipes" / f"{recipe}.py"), "--help"])
    _, options = re.split(r"\noptions:\n", capsys.readouterr().out)
    found = {
        match[1]: match[2]
        for text in re.split(r"\n  (?=--)", options)
        if (match := re.match(r"--(\w+)\b.*\bdefault:\s*([^)]+)\)", text, flags=re.DOTALL))
    }
    for name, default in (SAMPLING_FLAGS | own).items():
        assert found[name] == default, name
    assert ("window" in found) == ("window" in own)
    assert {"teacher", "devices", "seed", "data"} <= set(found)  # other groups, and its own


def test_help_runs_as_a_program():
    ran = subprocess.run(
        [sys.executable, "-m", "sparsight.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "sparsight COMMAND" in ran.stdout
