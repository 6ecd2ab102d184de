"""ONNX, by torch's exporter for `torch.export` programs."""

import copy
import logging
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch

from trainer.export.contents import Contents
from trainer.export.form import Form, Predict

OPSET = 20  # of 2023: what runtimes of today know, and the first with everything that classifiers' exports use
_TRACED = 2  # images; of one the exporter would take the batch for a constant


def _write(contents: Contents, path: Path) -> None:
    trained, size = contents.trained, contents.trained.recipe.input.size
    network = copy.deepcopy(trained.network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (torch.zeros(_TRACED, 3, size, size),), None, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("n")},), opset_version=OPSET, external_data=False, verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # lines of the exporter's source, and where that was
    onnx.helper.set_model_props(model, contents.metadata())
    onnx.save(model, path)


def _load(contents: Contents, path: Path) -> Predict:
    onnx.checker.check_model(path, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = contents.trained.threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)

    return predict


ONNX = Form(
    suffix=".onnx",
    require=lambda _: None,
    write=_write,
    load=_load,
    usage='onnxruntime.InferenceSession("{path}").run(["logits"], {{"images": images}})',
)
