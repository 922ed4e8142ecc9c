"""The dense network as others run it: eager, torch.compile, OpenVINO, ONNX Runtime.

Each rival is given what suits it best: norms folded, weights packed once, inputs and outputs bound
beforehand, the same number of threads. A rival that is not installed, or was left out, is a line in
the table. Each must return what the source returns, or there is no benchmark.
"""

import contextlib
import copy
import io
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_map
from torchvision.ops.misc import FrozenBatchNorm2d

from harness.script import Candidate, Settings

# Largest error over largest value of the output.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


def folded(model: nn.Module) -> nn.Module:
    """The model with each norm folded into the convolution registered right before it."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for parent in model.modules():
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, NORMS):
                # The two kinds of norm hold the same statistics under the same names.
                fused = fuse_conv_bn_eval(conv, norm)  # pyright: ignore[reportArgumentType]
                setattr(parent, conv_name, fused)
                setattr(parent, norm_name, nn.Identity())
    return model.to(memory_format=torch.channels_last)


def compiled(model: nn.Module) -> nn.Module:
    """The folded model in torch.compile with freezing, which packs the weights once.

    Forgets what was compiled before: call once per comparison, or `torch.compile` beside it.
    """
    import torch._inductor.config as inductor

    inductor.freezing = True
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False)  # pyright: ignore[reportReturnType]


def onnx_bytes(model: nn.Module, x: Tensor) -> bytes | str:
    """The model as an ONNX file, or why there is none."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as missing:
        return f"not installed ({missing.name})"
    # Outputs that alias each other or the input would be bound to one buffer.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x.contiguous(),), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


class OpenVino:
    """A network in OpenVINO, on one input that lies where OpenVINO reads it.

    Args:
        program: ONNX file.
        x: the input.
        settings: threads and dtype.
        channels_last: bind channels-last maps instead of NCHW; which is faster depends on the
            network, so that both are measured.
    """

    def __init__(
        self, program: bytes, x: Tensor, settings: Settings, *, channels_last: bool
    ) -> None:
        import openvino as ov

        core = ov.Core()
        model = core.read_model(program)
        self.channels_last = channels_last
        if channels_last:
            steps = ov.preprocess.PrePostProcessor(model)
            ends = [steps.input(0), *(steps.output(i) for i in range(len(model.outputs)))]
            for end in ends:
                end.tensor().set_layout(ov.Layout("NHWC"))
                end.model().set_layout(ov.Layout("NCHW"))
            model = steps.build()
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": settings.threads,
            "INFERENCE_PRECISION_HINT": "bf16" if settings.dtype == torch.bfloat16 else "f32",
        }
        self.request = core.compile_model(model, "CPU", hints).create_infer_request()
        self.input = (x.permute(0, 2, 3, 1) if channels_last else x).contiguous().numpy()
        self.request.set_input_tensor(ov.Tensor(self.input, shared_memory=True))

    def __call__(self, *_: Any) -> None:
        self.request.infer()

    def outputs(self) -> list[Tensor]:
        """What the last call returned."""
        made = [torch.from_numpy(tensor.data) for tensor in self.request.output_tensors]
        return [t.permute(0, 3, 1, 2) for t in made] if self.channels_last else made


class OnnxRuntime:
    """A network in ONNX Runtime, input and outputs bound; arguments as for `OpenVino`."""

    def __init__(self, program: bytes, x: Tensor, settings: Settings) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        self.input = x.contiguous().numpy()
        # The shapes of the outputs are known after one run.
        names = [output.name for output in self.session.get_outputs()]
        first = self.session.run(names, {self.session.get_inputs()[0].name: self.input})
        self.made = [ort.OrtValue.ortvalue_from_numpy(np.asarray(output)) for output in first]
        self.binding = self.session.io_binding()
        self.binding.bind_cpu_input(self.session.get_inputs()[0].name, self.input)
        for name, value in zip(names, self.made, strict=True):
            self.binding.bind_ortvalue_output(name, value)

    def __call__(self, *_: Any) -> None:
        self.session.run_with_iobinding(self.binding)

    def outputs(self) -> list[Tensor]:
        """What the last call returned."""
        return [torch.from_numpy(value.numpy()) for value in self.made]


def check_agrees(
    name: str, made: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Raise RuntimeError unless a candidate computes what the source does."""
    for actual, expected in zip(made, truth, strict=True):
        error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"{name}: the output is off by {error:.3g} of its largest value, but at most "
                f"{TOLERANCE[dtype]:.3g} is allowed; do not time what is wrong."
            )


def as_tensors(output: Any) -> list[Tensor]:
    """The tensors of a module's output."""
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)


EXPORTED = ("openvino", "openvino nhwc", "onnxruntime")
SHOWN = (*EXPORTED, "compile", "eager")  # in the order of the columns


def exported_rivals(
    model: nn.Module,
    x: Tensor,
    settings: Settings,
    truth: Sequence[Tensor],
    names: Sequence[str] = EXPORTED,
) -> dict[str, Candidate]:
    """The model in OpenVINO (either layout) and ONNX Runtime, checked against `truth`."""
    builds = {
        "openvino": lambda p: OpenVino(p, x, settings, channels_last=False),
        "openvino nhwc": lambda p: OpenVino(p, x, settings, channels_last=True),
        "onnxruntime": lambda p: OnnxRuntime(p, x, settings),
    }
    made: dict[str, Candidate] = {}
    program: bytes | str | None = None  # exported once, and only if somebody runs it
    for name in names:
        reason = settings.left_out(name)
        if name == "onnxruntime" and settings.dtype == torch.bfloat16:
            reason = "no bfloat16 on the CPU"
        if reason is not None:
            made[name] = reason
            continue
        program = onnx_bytes(model, x) if program is None else program
        if isinstance(program, str):
            made[name] = program
            continue
        try:
            rival = builds[name](program)
        except ImportError as missing:
            made[name] = f"not installed ({missing.name})"
            continue
        rival()
        check_agrees(name, rival.outputs(), truth, settings.dtype)
        made[name] = rival
    return made


def torch_rivals(
    model: nn.Module, x: Tensor, settings: Settings, truth: Sequence[Tensor]
) -> dict[str, Candidate]:
    """The model in torch, "compile" with freezing and "eager", float32 in and float32 out."""
    made: dict[str, Candidate] = {}
    plain = in_dtype(folded(model), settings.dtype)
    for name, build in (("compile", compiled), ("eager", lambda plain: plain)):
        reason = settings.left_out(name)
        if reason is not None:
            made[name] = reason
            continue
        made[name] = rival = build(plain)
        with torch.inference_mode():
            check_agrees(name, as_tensors(rival(x)), truth, settings.dtype)
    return made


def dense_rivals(
    model: nn.Module, x: Tensor, settings: Settings, exported: Sequence[str] = EXPORTED
) -> dict[str, Candidate]:
    """The dense model as everyone runs it, on float32 input `x`, each checked against the source.

    Names: `exported`, "compile", "eager". In bfloat16, too, maps are float32 at both ends.
    """
    with torch.inference_mode():
        truth = as_tensors(model(x))
    rivals = exported_rivals(folded(model), x, settings, truth, exported) if exported else {}
    return {**rivals, **torch_rivals(model, x, settings, truth)}


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network computing in `dtype` between float32 ends."""
    return model if dtype == torch.float32 else Cast(copy.deepcopy(model).to(dtype), dtype)


class Cast(nn.Module):
    """A network that casts its input first, and its output back to float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.eval(), dtype
        self.eval()

    def forward(self, x: Tensor) -> Any:
        """Return what the network returns for the cast input."""
        return tree_map(lambda leaf: leaf.float(), self.model(x.to(self.dtype)))
