"""The house rules of DESIGN.md, read from the source text: who may import whom, and what lies
where.

Every rule is a function from a project root to a list of complaints. Each is run on this project,
where it must find nothing, and on a small project made up for it, where it must find exactly what
was planted.

Imports are read with `ast`, so a lazy import inside a function counts as much as one at the top of
the file.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sparsight"

# ops <- nn <- {convert | models | compress} <- {measure | export} <- train <- demo, cli
FLOOR = {
    "_kernels": 0,
    "ops": 1,
    "nn": 2,
    "convert": 3,
    "models": 3,
    "compress": 3,
    "measure": 4,
    "export": 4,
    "train": 5,
    "demo": 6,
    "cli": 7,  # `sparsight demo` is a command: cli stands on demo, never the other way round
}
ROOMS = [name for name in FLOOR if name not in ("_kernels", "demo", "cli")]
# `import sparsight` must stay light: the package itself names what inference needs, nothing of
# training.
PACKAGE_INIT_FLOOR = FLOOR["measure"]

# Each heavy third party has one home: paths inside src/sparsight, a folder standing for all that is
# in it.
HOMES = {
    "triton": ["ops/triton"],
    "lightning": ["train"],
    "pytorch_lightning": ["train"],
    "torchmetrics": ["train"],
    "jsonargparse": ["cli.py"],
    "faster_coco_eval": [
        "train/average_precision.py",
        "train/average_recall.py",
        "train/data/mask_rle.py",
    ],
    "matplotlib": ["train/pictures.py"],
    "onnx": ["export/onnx.py"],
    "onnxruntime": ["export/onnx.py"],
    "onnxscript": ["export/onnx.py"],
    # In models/, only what wraps torchvision's own architectures or takes its ResNet as backbone.
    # What finds residual blocks (convert) knows them by their children, so that timm's match too.
    "torchvision": [
        "models/backbone_stages.py",
        "models/backbone_weights.py",
        "models/faster_rcnn.py",
        "models/mask_proposals.py",
        "models/semantic_fpn.py",
        "models/stride8_trunks.py",
        "models/torchvision_resnet.py",
        "models/torchvision_segmentation.py",
        "train/data",
    ],
    "timm": ["models/backbone_stages.py"],
    "torch_pruning": ["compress/channel_groups.py"],
    "sklearn": ["compress/lasso.py"],
    "scipy": ["train/data/voc.py"],
    "openvino": [],  # a rival in bench/, never a dependency
    "pycocotools": [],  # what tests compare with
}

FORBIDDEN_STEMS = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_LINES = 600

# Modules without a test file of their own, each with the reason.
UNMIRRORED: dict[str, str] = {}

ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<])/(?:home|root|work|Users|opt|mnt|data|srv|tmp)/\w")


def python_files(root: Path) -> Iterator[tuple[Path, ast.Module, str]]:
    package = root / "src" / PACKAGE
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield path.relative_to(package), ast.parse(text, filename=str(path)), text


def imported_modules(tree: ast.Module, relative: Path) -> Iterator[tuple[str, int]]:
    """Every module a file imports, absolute, with the line; `from a import b` yields a.b."""
    package_parts = [PACKAGE, *relative.parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = package_parts[: len(package_parts) - node.level + 1] + base
            for alias in node.names:
                yield ".".join([*base, alias.name]), node.lineno
        elif isinstance(node, ast.Call) and node.args:
            # importlib.import_module("x") and __import__("x") are imports too.
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            target = node.args[0]
            if name in ("import_module", "__import__") and isinstance(target, ast.Constant):
                if isinstance(target.value, str):
                    yield target.value, node.lineno


def room_of(relative: Path) -> str:
    return relative.parts[0].removesuffix(".py")


def arrow_complaints(root: Path) -> list[str]:
    complaints = []
    for relative, tree, _ in python_files(root):
        own = room_of(relative)
        is_package = relative.as_posix() == "__init__.py"
        floor = PACKAGE_INIT_FLOOR if is_package else FLOOR.get(own)
        if floor is None:
            complaints.append(
                f"{relative}: {own} is no room of the house; add it to DESIGN.md first"
            )
            continue
        for module, line in imported_modules(tree, relative):
            parts = module.split(".")
            if parts[0] != PACKAGE:
                continue
            target = parts[1] if len(parts) > 1 else ""
            if not is_package and target not in FLOOR:
                complaints.append(
                    f"{relative}:{line}: imports {module}; a room imports rooms, not the package"
                )
            elif target in FLOOR and target != own:
                allowed = FLOOR[target] <= floor if is_package else FLOOR[target] < floor
                if target == "_kernels":
                    allowed = own == "ops"
                if not allowed:
                    complaints.append(f"{relative}:{line}: {own} must not import {target}")
    return complaints


def home_complaints(root: Path) -> list[str]:
    complaints = []
    for relative, tree, _ in python_files(root):
        where = relative.as_posix()
        for module, line in imported_modules(tree, relative):
            third_party = module.split(".")[0]
            homes = HOMES.get(third_party)
            if homes is None or any(
                where == home or where.startswith(home + "/") for home in homes
            ):
                continue
            complaints.append(f"{where}:{line}: {third_party} lives in {homes or 'no room'}")
    return complaints


def mirror_complaints(root: Path) -> list[str]:
    complaints = []
    for relative, _, _ in python_files(root):
        if relative.name == "__init__.py" or relative.as_posix() in UNMIRRORED:
            continue
        test = root / "tests" / relative.parent / f"test_{relative.name}"
        if not test.exists():
            complaints.append(f"{relative}: has no {test.relative_to(root).as_posix()}")
    return complaints


def orphan_complaints(root: Path) -> list[str]:
    """Tests in a room's folder that name no module: what crosses rooms belongs in tests/ itself."""
    complaints = []
    for room in ROOMS:
        for test in sorted((root / "tests" / room).rglob("test_*.py")):
            relative = test.relative_to(root / "tests")
            source = root / "src" / PACKAGE / relative.parent / test.name.removeprefix("test_")
            package = source.with_suffix("")
            if not source.exists() and not package.is_dir():
                complaints.append(f"tests/{relative.as_posix()}: mirrors no module")
    return complaints


def naming_complaints(root: Path) -> list[str]:
    return [
        f"{relative}: name a file after the one thing it holds"
        for relative, _, _ in python_files(root)
        if any(part.removesuffix(".py").strip("_") in FORBIDDEN_STEMS for part in relative.parts)
    ]


def docstring_complaints(root: Path) -> list[str]:
    return [
        f"{relative}: a room says in its docstring what enters, what leaves and whom it may import"
        for relative, tree, _ in python_files(root)
        if relative.name == "__init__.py" and not ast.get_docstring(tree)
    ]


def length_complaints(root: Path) -> list[str]:
    paths = [relative for relative, _, _ in python_files(root)]
    files = [(root / "src" / PACKAGE / path) for path in paths]
    files += sorted(path for path in (root / "csrc").glob("*") if path.is_file())
    complaints = []
    for path in files:
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > MAX_LINES:
            complaints.append(f"{path.relative_to(root).as_posix()}: {length} lines")
    return complaints


def safety_complaints(root: Path) -> list[str]:
    complaints = []
    for relative, tree, text in python_files(root):
        for module, line in imported_modules(tree, relative):
            if module.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle"):
                complaints.append(f"{relative}:{line}: imports {module}; no unpickling")
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "weights_only":
                if isinstance(node.value, ast.Constant) and node.value.value is False:
                    complaints.append(f"{relative}:{node.value.lineno}: weights_only=False")
        for number, content in enumerate(text.splitlines(), start=1):
            if ABSOLUTE_PATH.search(content):
                complaints.append(f"{relative}:{number}: a path of one machine")
    return complaints


RULES = [
    arrow_complaints,
    home_complaints,
    mirror_complaints,
    orphan_complaints,
    naming_complaints,
    docstring_complaints,
    length_complaints,
    safety_complaints,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_is_in_order(rule):
    assert rule(ROOT) == []


def test_the_house_is_there():
    """A rule that reads no file finds nothing: the checks above must have read the real package."""
    read = {relative.as_posix() for relative, _, _ in python_files(ROOT)}
    assert {"__init__.py", "ops/__init__.py", "nn/__init__.py", "measure/macs.py"} <= read


def test_exceptions_are_needed():
    """An exception outlives its reason unless someone looks: the module exists and has no test."""
    for name in UNMIRRORED:
        relative = Path(name)
        assert (ROOT / "src" / PACKAGE / relative).exists(), name
        assert not (ROOT / "tests" / relative.parent / f"test_{relative.name}").exists(), name


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nn/a.py", "import sparsight.convert"),
        ("nn/a.py", "from sparsight.convert import freeze"),
        ("nn/a.py", "from sparsight import convert"),
        ("nn/a.py", "from ..convert import freeze"),
        ("nn/a.py", "from .. import convert"),
        ("nn/a.py", "def f():\n    from sparsight.train import recipe"),
        ("nn/a.py", "import importlib\nimportlib.import_module('sparsight.train')"),
        ("nn/a.py", "from sparsight import sparsify"),
        ("nn/a.py", "import sparsight"),
        ("nn/a.py", "from sparsight import _kernels"),
        ("convert/a.py", "from sparsight.models import frrn"),
        ("models/a.py", "from sparsight.compress import prune"),
        ("measure/a.py", "from sparsight.export import program"),
        ("measure/a.py", "from sparsight.train import recipe"),
        ("demo.py", "from sparsight import cli"),
        ("elsewhere/a.py", ""),
        ("__init__.py", "from sparsight.train import Recipe"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path, name, text):
    plant(tmp_path, {f"src/sparsight/{name}": text})
    assert len(arrow_complaints(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ops/cpu.py", "from sparsight import _kernels"),
        (
            "nn/a.py",
            "from sparsight.ops import interpolate\nfrom sparsight.nn.sampler import Sampler",
        ),
        ("nn/a.py", "from ..ops.conv import sampled_conv2d\nfrom .sampler import Sampler"),
        ("measure/a.py", "from sparsight import nn, convert"),
        ("cli.py", "def main():\n    from sparsight import demo"),
        ("__init__.py", "from sparsight import ops\nfrom sparsight.convert import freeze"),
        ("nn/a.py", "import torch\nimport sparsight_elsewhere"),
    ],
)
def test_a_right_arrow_is_not(tmp_path, name, text):
    plant(tmp_path, {f"src/sparsight/{name}": text})
    assert arrow_complaints(tmp_path) == []


def test_a_third_party_away_from_home_is_found(tmp_path):
    plant(
        tmp_path,
        {
            "src/sparsight/train/a.py": "import lightning as L",
            "src/sparsight/train/data/b.py": "from torchvision import transforms",
            "src/sparsight/models/semantic_fpn.py": "import torchvision",
            "src/sparsight/ops/triton/conv.py": "import triton.language as tl",
            "src/sparsight/convert/c.py": "def f():\n    import torchvision.models",
            "src/sparsight/nn/d.py": "from lightning import Trainer",
            "src/sparsight/ops/conv.py": "import triton",
            "src/sparsight/measure/e.py": "import openvino",
        },
    )
    found = [complaint.split(":")[0] for complaint in home_complaints(tmp_path)]
    assert sorted(found) == ["convert/c.py", "measure/e.py", "nn/d.py", "ops/conv.py"]


def test_a_missing_and_an_orphaned_test_are_found(tmp_path):
    plant(
        tmp_path,
        {
            "src/sparsight/nn/__init__.py": '"""Room."""',
            "src/sparsight/nn/sampler.py": "",
            "src/sparsight/nn/noise.py": "",
            "src/sparsight/cli.py": "",
            "tests/nn/test_sampler.py": "",
            "tests/nn/test_gone.py": "",
            "tests/test_cli.py": "",
        },
    )
    assert mirror_complaints(tmp_path) == ["nn/noise.py: has no tests/nn/test_noise.py"]
    assert orphan_complaints(tmp_path) == ["tests/nn/test_gone.py: mirrors no module"]


def test_a_bad_name_a_silent_room_and_a_long_file_are_found(tmp_path):
    plant(
        tmp_path,
        {
            "src/sparsight/nn/__init__.py": "",
            "src/sparsight/nn/utils.py": "",
            "src/sparsight/train/helpers/x.py": "",
            "src/sparsight/ops/long.py": "\n" * (MAX_LINES + 1),
            "src/sparsight/ops/fits.py": "\n" * MAX_LINES,
            "csrc/long.h": "//\n" * (MAX_LINES + 1),
        },
    )
    assert len(naming_complaints(tmp_path)) == 2
    assert len(docstring_complaints(tmp_path)) == 1
    found = [complaint.split(":")[0] for complaint in length_complaints(tmp_path)]
    assert found == ["src/sparsight/ops/long.py", "csrc/long.h"]


def test_unpickling_and_machine_paths_are_found(tmp_path):
    machine_path = "/" + "home" + "/someone/data"
    plant(
        tmp_path,
        {
            "src/sparsight/train/a.py": "import pickle",
            "src/sparsight/train/b.py": "import torch\ntorch.load('x', weights_only=False)",
            "src/sparsight/train/c.py": "import torch\ntorch.load('x', weights_only=True)",
            "src/sparsight/train/d.py": f"DATA = '{machine_path}'",
            "src/sparsight/train/e.py": "URL = 'https://arxiv.org/data/2003.08866'  # a/b",
        },
    )
    found = [complaint.split(":")[0] for complaint in safety_complaints(tmp_path)]
    assert found == ["train/a.py", "train/b.py", "train/d.py"]


def test_annotations_are_shipped():
    """PEP 561: without this file type checkers ignore the annotations of an installed package."""
    assert (ROOT / "src" / PACKAGE / "py.typed").exists()
