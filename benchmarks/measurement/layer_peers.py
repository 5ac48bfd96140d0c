"""The layers that benchmarks/layers.py measures, and the calls of core and of the other libraries on them.

Each library is imported only in the process that calls it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Call = Callable[[], Array]


class Layer(NamedTuple):
    """A layer: shape of the images, filters, side of the kernel, stride and groups; padding keeps the size."""

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: int
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        steps = f", stride {self.stride}" if self.stride > 1 else ""
        grouped = (
            "" if self.groups == 1 else ", depthwise" if self.groups == self.channels else f", {self.groups} groups"
        )
        image = f"{self.batch} x {self.channels} x {self.height} x {self.width}"
        return f"{image} -> {self.filters}, {self.kernel} x {self.kernel}{steps}{grouped}"

    @property
    def padding(self) -> int:
        """Pixels of zeros on each side."""
        return self.kernel // 2

    def draw(self) -> tuple[Array, Array]:
        """Return random images and kernels."""
        rng = np.random.default_rng(0)
        images = rng.standard_normal((self.batch, self.channels, self.height, self.width), np.float32)
        weight = rng.standard_normal((self.filters, self.channels // self.groups, self.kernel, self.kernel), np.float32)
        return images, weight


def prepare_torch(layer: Layer, threads: int, *, channels_last: bool = False) -> Call:
    """Return a call of torch's conv2d, with or without conversion to and from channels_last."""
    import torch

    torch.set_num_threads(threads)
    images, weight = (torch.from_numpy(array) for array in layer.draw())
    options = None, layer.stride, layer.padding, 1, layer.groups
    if not channels_last:
        return lambda: torch.nn.functional.conv2d(images, weight, *options).numpy()

    def convolve() -> Array:
        inputs, kernels = (part.to(memory_format=torch.channels_last) for part in (images, weight))
        output: Array = torch.nn.functional.conv2d(inputs, kernels, *options).contiguous().numpy()
        return output

    return convolve


def prepare_onnx_runtime(layer: Layer, threads: int) -> Call:
    """Return a call of ONNX Runtime on a model of the one layer."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    model = build_model(layer).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    images = layer.draw()[0]
    return lambda: session.run(None, {"images": images})[0]


def prepare_openvino(layer: Layer, threads: int) -> Call:
    """Return a call of OpenVINO on a model of the one layer, in float32."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(
        openvino.Core().read_model(build_model(layer).SerializeToString()), "CPU", options
    )
    request, images = compiled.create_infer_request(), layer.draw()[0]

    def convolve() -> Array:
        # The output belongs to the request: a new one is a copy, as for the others.
        output: Array = request.infer([images], share_inputs=True)[0].copy()
        return output

    return convolve


def build_model(layer: Layer) -> Any:
    """Return an ONNX model of the layer, with its kernels as constants."""
    from onnx import TensorProto, helper, numpy_helper

    images, weight = layer.draw()
    node = helper.make_node(
        "Conv",
        ["images", "weight"],
        ["output"],
        kernel_shape=[layer.kernel] * 2,
        strides=[layer.stride] * 2,
        pads=[layer.padding] * 4,
        group=layer.groups,
    )
    shapes = [("images", images.shape), ("output", None)]
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in shapes)
    graph = helper.make_graph([node], "layer", inputs, outputs, [numpy_helper.from_array(weight, "weight")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


EACH_CALL = "weight in each call"
"""Instead of an engine: core.conv2d, which gets the weight in each call and does not keep a transformed one."""


class CoreCalls:
    """The calls of core in its process: with its own choice, and each engine alone."""

    def __init__(self, threads: int) -> None:
        import torch

        import core

        torch.set_num_threads(threads)
        self._machine = core.measure_machine(core.Machine(threads))
        self._prepared: tuple[Layer, str | None] | None = None
        self._call: Callable[[Array], Any]

    def prepare(self, layer: Layer, engine: str | None) -> Call | None:
        """Return a call of a core.Conv2d, or of core.conv2d if the engine is EACH_CALL.

        Return None if the engine cannot compute the layer.
        """
        import core

        try:
            self._convolve(layer, engine)
        except core.MethodUnavailable:
            return None
        return lambda: np.asarray(self._convolve(layer, engine).array)

    def choose(self, layer: Layer) -> str:
        """Return the engine that core chooses."""
        return str(self._convolve(layer, None).engine)

    def _convolve(self, layer: Layer, engine: str | None) -> Any:
        import core

        if (layer, engine) != self._prepared:
            self._prepared = layer, engine
            self._images, weight = layer.draw()
            options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
            if engine not in (None, EACH_CALL):
                options |= {"engines": (engine,), "method": core.ENGINES[engine].METHOD}
            if engine == EACH_CALL:
                self._call = lambda images: core.conv2d(images, weight, machine=self._machine, **options)
            else:
                self._call = core.Conv2d(weight, machine=self._machine, **options)
        return self._call(self._images)


PEERS: dict[str, Callable[[Layer, int], Call]] = {
    "torch": prepare_torch,
    "torch channels_last": lambda layer, threads: prepare_torch(layer, threads, channels_last=True),
    "ONNX Runtime": prepare_onnx_runtime,
    "OpenVINO": prepare_openvino,
}
PEER_PACKAGES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}
