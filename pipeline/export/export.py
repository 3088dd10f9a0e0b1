"""Files and forms of a pruned network for others to use: the compact tensors, torch.export, ONNX, and CSR matrices."""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from scipy import sparse
from torch import Tensor, nn

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.network.build import FOREIGN
from pipeline.network.compact import FORMAT, Compacted

OPSET = 18  # the one that torch's exporter writes without converting
EXTRA = "pip install onnx onnxscript onnxruntime"


def save_compact(found: Compacted, path: str | Path) -> None:
    """Write the compact network as .safetensors: its tensors by their usual names, and in the metadata the counts.

    Layer sizes are the tensors' own, so that `pipeline.network.compact.rebuild`, or any program that shrinks the
    network's layers to them, loads the file. Tied tensors are written once.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in found.model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
        seen.add(id(tensor))
    metadata = {
        "format": FORMAT,
        "flattened": ",".join(found.flattened),
        **({"resized": json.dumps(found.resized)} if found.resized else {}),
        **({"graph": "the code computes with sizes of layers"} if found.as_graph else {}),
        **({"narrowed": ",".join(found.narrowed)} if found.narrowed else {}),
        "units": json.dumps(found.kept_units),
        "removed": json.dumps(found.removed),
    }
    storage.write_bytes(path, save_tensors(tensors, metadata))


def to_program(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The network in evaluation mode as torch.export's program: input (batch, ...), whose batch is free.

    `example`, (batch, ...), is an input; its values do not matter. It holds no input, and no path of this machine.
    Raises UserError where torch.export cannot follow the network, or its code fixes the size of the batch.
    """
    pair = _pair(example)
    try:
        program = torch.export.export(
            copy.deepcopy(model).eval(), (pair,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
    except FOREIGN as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"torch.export cannot follow the network: {reason}") from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "from_node"):  # folders of whoever exported, and addresses in memory
                    node.meta.pop(key, None)
    program.example_inputs = None
    return program


def save_program(program: torch.export.ExportedProgram, path: str | Path) -> None:
    """Write a program for `torch.export.load`. Of one network the bytes are always the same, and nothing is pickled."""
    stream = io.BytesIO()
    torch.export.save(program, stream)
    storage.write_bytes(path, stream.getvalue())


def to_onnx(model: nn.Module, example: Tensor, path: str | Path) -> None:
    """Write the network in evaluation mode as ONNX (opset 18): input "input", (batch, ...), output "output".

    The batch is free. `example`, (batch, ...), is an input; its values do not matter. Raises UserError where onnx or
    onnxscript is not installed, or the network holds what ONNX does not have.
    """
    _require("onnxscript", path, "written")
    plain = copy.deepcopy(model).eval()
    pair = _pair(example)
    with storage.atomic_path(path) as temporary, _quiet():
        try:
            program = torch.onnx.export(
                plain, (pair,), input_names=["input"], output_names=["output"], opset_version=OPSET, dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), optimize=True, verbose=False,
            )  # fmt: skip
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"'{path}' cannot be written: the network cannot be exported to ONNX: {reason}") from error
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with the folders of whoever exported
        program.save(temporary, external_data=False)


def check_onnx(path: str | Path, model: nn.Module, inputs: Tensor) -> float:
    """Largest absolute difference between onnxruntime's outputs and the network's own on `inputs`, (batch, ...).

    Raises UserError where onnxruntime is not installed, or cannot run the file.
    """
    onnxruntime = _require("onnxruntime", path, "checked")
    try:
        with storage.local_copy(path) as file:
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            (got,) = session.run(["output"], {"input": inputs.cpu().numpy()})
    except UserError:
        raise
    except Exception as error:  # onnxruntime's own errors have no other base
        raise UserError(f"onnxruntime cannot run '{path}': {' '.join(str(error).split())[:300]}") from error
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        wanted = plain(inputs).cpu().numpy()
    return float(np.abs(got - wanted).max())


class CsrLinear(nn.Module):
    """A linear layer whose weight is a sparse CSR matrix: (..., inputs) to (..., outputs). To measure with."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.weight = nn.Buffer(layer.weight.detach().to_sparse_csr())
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        y = (self.weight @ input.reshape(-1, input.shape[-1]).t()).t()
        y = y.reshape(*input.shape[:-1], -1) if input.ndim != 2 else y  # a matrix stays as it is: no copy to time
        return y if self.bias is None else y + self.bias


def to_csr(model: nn.Module) -> nn.Module:
    """A copy of the network, in evaluation mode, whose linear layers multiply by sparse CSR matrices."""
    made = copy.deepcopy(model).eval()
    if type(made) is nn.Linear:
        return CsrLinear(made)
    for name, part in list(made.named_modules()):
        if type(part) is nn.Linear:
            made.set_submodule(name, CsrLinear(part))
    return made


def save_csr(model: nn.Module, path: str | Path) -> None:
    """Write the linear layers' weights as CSR in .safetensors: `NAME.data`, `.indices`, `.indptr` and `.shape`.

    scipy.sparse.csr_matrix((data, indices, indptr), shape) is the weight, (outputs, inputs).
    """
    tensors: dict[str, Tensor] = {}
    for name, part in model.named_modules():
        if type(part) is nn.Linear:
            matrix = sparse.csr_matrix(part.weight.detach().float().cpu().numpy())
            for array, values in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
                tensors[f"{name}.weight.{array}"] = torch.from_numpy(values)
            tensors[f"{name}.weight.shape"] = torch.tensor(matrix.shape)
    storage.write_bytes(path, save_tensors(tensors))


def _pair(example: Tensor) -> Tensor:
    """The example with a batch of at least 2: exporters take one of 1 as fixed."""
    return example if len(example) > 1 else torch.cat([example, example])


def _require(package: str, path: str | Path, done: str) -> Any:
    """An optional package, imported late: these are slow to import."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"'{path}' cannot be {done}: {package} is not installed; {EXTRA}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's own progress out of the program's output."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
