import json
import re

import pytest

from sparsight.demo import Row, demo, describe_attraction, format_table
from sparsight.train.evaluate import Score

pytestmark = pytest.mark.usefixtures("narrow_resnet18")


def test_a_quick_demo_leaves_one_self_contained_page(tmp_path, capsys):
    rows = demo(out=str(tmp_path), quick=True, budget=0.9)
    assert [row.name.split(",")[0] for row in rows] == ["dense", "dense", "sampled and frozen"]
    assert rows[2].score.share == pytest.approx(0.9, abs=0.02)
    assert rows[0].score.share == 1.0
    assert rows[1].score.macs_total < rows[0].score.macs_total
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "sampled and frozen" in page
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("report.html")
    assert "CPU: " in printed
    assert len(json.loads((tmp_path / "result.json").read_text())) == 3
    assert (tmp_path / "masks.png").is_file()


def score(**changes) -> Score:
    values = {
        "miou": 0.5,
        "class_iou": {},
        "num_images": 1,
        "macs_dense": 2e6,
        "macs_total": 2e6,
        "share": 1.0,
        "density": {},
        "class_density": {},
    }
    return Score(**(values | changes))


def test_the_table_compares_with_its_first_row():
    rows = [
        Row("dense", score(), 10.0),
        Row("sampled", score(macs_total=8e5, density={"a": 0.2, "b": 0.4}), 8.0),
    ]
    lines = format_table(rows).splitlines()
    assert lines[1].split() == ["dense", "50.0", "2", "1.00", "1", "10.00", "1.00x"]
    assert lines[2].split() == ["sampled", "50.0", "1", "0.40", "0.30", "8.00", "1.25x"]


def test_what_attracts_samples_comes_first():
    text = describe_attraction(score(class_density={"Sky": 0.1, "Car": 0.8}))
    assert "Car 80%, Sky 10%" in text
