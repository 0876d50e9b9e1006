"""ONNX files and torch.export archives: capturing the model's graph, writing, opening.

A file holds the graph for any number of images of one size, the weights, and the metadata.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from gcahng.errors import InputError
from gcahng.export.model import ExportedModel

OPSET = 18
"""Version of the ONNX operators: the one that torch's exporter is written in, read by onnxruntime 1.14 and later."""
INPUT, OUTPUT = "images", "embeddings"
METADATA_FILE = "gcahng.json"
"""Where a torch.export archive keeps the metadata."""

Embed = Callable[[Tensor], Tensor]
Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        suffix: Of its name.
        packages: What it needs beside torch.
        write: (program, path, metadata): writes the file, and others beside it where it needs them.
        open: The model of a file, on the CPU.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, Metadata], None]
    open: Callable[[Path], Embed]


def capture(model: ExportedModel, example: Tensor, backbone: str) -> ExportedProgram:
    """The graph of the model, for any number of images.

    Args:
        model: What to export, on the CPU.
        example: At least two images as `model.forward` takes them: one alone would be taken for a constant.
        backbone: Its name, for messages.
    Raises:
        InputError: The model's code cannot be captured.
    """
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(model, (example,), dynamic_shapes={INPUT: {0: batch}})
    except Exception as error:  # torch.export lets the errors of the model's code and of many layers of its own through
        raise InputError(
            f"Backbone `{backbone}` cannot be exported: {_reason(error)}. torch.export needs a forward pass of tensor "
            "operations alone, for any number of images."
        ) from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _write_onnx(program: ExportedProgram, path: Path, metadata: Metadata, external_data: bool | None = None) -> None:
    """Weights go into a second file `path`.data where they exceed protobuf's 2 GB, or with `external_data`."""
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: "batch"}},
                verbose=False,
            )
    except Exception as error:  # as for `capture`: onnxscript's rewriting raises kinds of its own
        raise InputError(
            f"Backbone `{metadata['backbone']}` cannot be exported to ONNX: {_reason(error)}. Use --format "
            "torch-export."
        ) from error
    assert made is not None
    made.model.metadata_props.update({name: _text(value) for name, value in metadata.items()})
    made.save(path, external_data=external_data)


def _open_onnx(path: Path) -> Embed:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; its warnings are about its own optimisations

    def embed(images: Tensor) -> Tensor:
        with _runtime_errors():
            return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    with _runtime_errors():
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return embed


@contextmanager
def _runtime_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's own kinds share no base
        raise InputError(
            f"onnxruntime cannot run the exported model: {_reason(error)}. Use a newer onnxruntime, or --format "
            "torch-export."
        ) from error


def _write_program(program: ExportedProgram, path: Path, metadata: Metadata) -> None:
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata, indent=1)})


def _open_program(path: Path) -> Embed:
    module = torch.export.load(path).module()
    return torch.no_grad()(module)


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
    "torch-export": Format(".pt2", (), _write_program, _open_program),
}


def require_packages(name: str) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        InputError: One is missing.
    """
    missing = [package for package in FORMATS[name].packages if find_spec(package) is None]
    if missing:
        raise InputError(
            f"`--format` {name} needs {', '.join(missing)}, not installed here. Install with: pip install "
            "'gcahng[export]'; or use --format torch-export, which needs torch alone."
        )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors are raised; what torch and onnxscript log of their own steps is none of the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """What stopped an export, from the chain of errors: operator, fixed size, or the last error's first line."""
    last = error
    while last.__cause__ is not None:
        last = last.__cause__
    text = str(last)
    if found := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text):
        return f"ONNX has no counterpart of the operator {found[1]}"
    if found := re.search(r"specialized it to be a constant \((\d+)\)", text):
        return f"its code works for batches of {found[1]} images only"
    if "data-dependent" in text:
        return "what it computes depends on the values of a tensor (an `if`, or a size)"
    return f"{type(last).__name__}: {(text.strip().splitlines() or ['no message'])[0].rstrip('.')}"
