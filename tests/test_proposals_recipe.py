"""The recipe of InstanceFCN from the command line: trained, evaluated, drawn, resumed."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.models import resnet as zoo

from sparsight.cli import load_recipe, main
from sparsight.train.data import Coco, write_synthetic_coco
from sparsight.train.data.mask_rle import decode_masks

pytestmark = pytest.mark.usefixtures("narrow_resnet18")
RECIPE = str(Path(__file__).resolve().parents[1] / "recipes" / "proposals" / "instance_fcn.py")
FLAGS = ["--quick", "--backbone", "resnet18", "--num-stages", "2", "--m", "9"]
FLAGS += ["--progress-bar", "false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert main(["train", RECIPE, *FLAGS, "--budget", "0.7", "--out", str(out)]) == 0
    return out


def test_training_leaves_weights_a_score_and_a_log(trained):
    result = json.loads((trained / "result.json").read_text())
    assert result["num_images"] == 4 and result["task"] == "coco mask proposals"
    assert result["settled_share"] == pytest.approx(0.7, abs=0.02)
    assert 0.55 < result["share"] < 0.85
    assert 0 <= result["metrics"]["ar1000"] <= 1
    assert result["architecture"]["model"] == "instance_fcn"
    assert result["architecture"]["scales"] == [0.75, 1.0]
    log = (trained / "log" / "metrics.csv").read_text()
    for name in ("val_ar100", "loss_mask", "loss_objectness", "expected_share", "val_share"):
        assert name in log


def test_evaluating_counts_the_same_and_measures(trained, tmp_path, capsys):
    out = tmp_path / "scores.json"
    flags = ["--data", str(trained / "data"), "--frozen", "false", "--out", str(out)]
    assert main(["evaluate", str(trained / "weights.safetensors"), *flags]) == 0
    result = json.loads(out.read_text())
    before = json.loads((trained / "result.json").read_text())
    assert result["scores"][0]["macs_total"] == before["macs_total"]
    assert result["scores"][0]["metrics"] == before["metrics"]
    assert (result["dataset"], result["task"], result["metric"]) == ("coco", "proposals", "ar100")
    assert [row["name"] for row in result["latency"]["rows"]] == [
        "dense, eager channels-last",
        "dense, frozen",
        "sampled, frozen",
    ]
    assert "AR@1000" in capsys.readouterr().out


def test_a_smaller_size_is_the_resized_baseline(trained, tmp_path):
    out = tmp_path / "scores.json"
    flags = ["--data", str(trained / "data"), "--size", "32x64", "--latency", "false"]
    weights = str(trained / "weights.safetensors")
    assert main(["evaluate", weights, *flags, "--out", str(out)]) == 0
    before = json.loads((trained / "result.json").read_text())
    score = json.loads(out.read_text())["scores"][0]
    assert 0.2 < score["macs_dense"] / before["macs_dense"] < 0.35


def test_proposals_are_written_as_cocos_results(trained, tmp_path):
    folder = trained / "data" / "val2017"
    flags = ["--images", str(folder), "--out", str(tmp_path), "--frozen", "false"]
    assert main(["predict", str(trained / "weights.safetensors"), *flags]) == 0
    listed = json.loads((tmp_path / "images.json").read_text())
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert len(listed) == 4
    for image in listed:
        own = [row for row in found if row["image_id"] == image["id"]]
        size = image["height"], image["width"]
        masks = decode_masks([row["segmentation"] for row in own], size=size)
        for mask, row in zip(masks, own, strict=True):
            x, y, width, height = (int(side) for side in row["bbox"])
            assert mask.sum() == mask[y : y + height, x : x + width].sum() > 0
            assert row["category_id"] == 1 and 0 <= row["score"] <= 1
        overlay = tmp_path / f"{Path(image['file_name']).stem}_overlay.png"
        with Image.open(overlay) as picture:
            assert picture.size == size[::-1]


def test_a_profile_and_masks_are_drawn(trained, tmp_path, capsys):
    weights = str(trained / "weights.safetensors")
    assert main(["profile", weights]) == 0
    assert "network.backbone.layer2.1" in capsys.readouterr().out
    flags = [weights, "--data", str(trained / "data"), "--out", str(tmp_path)]
    assert main(["masks", *flags, "--images", "[1]", "--shows_data", "true"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000107.png", "overview.png"]


def test_voc_is_trained_on_and_a_dense_run_starts_a_sampled_one(tmp_path):
    recipe = load_recipe(Path(RECIPE))
    torch.save(zoo.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    common = {"backbone": "resnet18", "num_stages": 2, "m": 9, "quick": True}
    common |= {"progress_bar": False, "overfit_images": 2, "dataset": "voc"}
    dense = recipe(**common, pretrained=str(tmp_path / "resnet18.pth"), out=str(tmp_path / "a"))
    assert (dense["num_images"], dense["share"]) == (2, 1.0)
    assert dense["task"] == "voc mask proposals" and dense["architecture"]["is_norm_frozen"]
    sampled = recipe(
        **common,
        is_norm_frozen=True,
        init=str(tmp_path / "a" / "weights.safetensors"),
        sampling_weight=0.1,
        interpolation="nearest",
        out=str(tmp_path / "b"),
    )
    assert len(sampled["density"]) == 2 * 4 + 1
    flags = ["--data", str(tmp_path / "a" / "data"), "--latency", "false", "--frozen", "false"]
    assert main(["evaluate", str(tmp_path / "a" / "weights.safetensors"), *flags]) == 0


def test_steps_become_epochs(monkeypatch, tmp_path):
    recipe = load_recipe(Path(RECIPE))
    asked = []

    def fit(self, task, *, resume):
        asked.append((self.epochs, self.batch_size, self.accumulate))
        return False

    monkeypatch.setattr("sparsight.train.recipe.Recipe.fit", fit)
    root = tmp_path / "data"
    for split in ("train2017", "val2017"):
        write_synthetic_coco(root, num_images=8, split=split, size=(32, 32))
    assert len(Coco(root, keeps_empty=False)) == 6
    common = {"data": str(root), "backbone": "resnet18", "num_stages": 2, "out": str(tmp_path)}
    assert recipe(**common, steps=10, accumulate=3) == {}
    assert recipe(**common, epochs=7, batch_size=2) == {}
    assert asked == [(5, 1, 3), (7, 2, 8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "instance_fcn: no data folder was given; COCO's, with"),
        (["--data", "nowhere"], "root='nowhere' has no annotations/instances_train2017.json"),
        (["--data", "nowhere", "--dataset", "voc"], "root='nowhere' has no list of images"),
        (["--quick", "--sbd", "x"], "sbd='x' with dataset='coco'; SBD annotates VOC's"),
        (["--quick", "--init", "gone.safetensors"], "'gone.safetensors' does not exist"),
        (["--quick", "--pretrained", "gone.pth"], "'gone.pth' does not exist"),
        (["--quick", "--pretrained", "a", "--init", "b"], "pretrained='a' and init='b' were both"),
    ],
)
def test_bad_input_is_one_line_without_a_traceback(arguments, message, capsys, tmp_path):
    assert main(["train", RECIPE, *arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
