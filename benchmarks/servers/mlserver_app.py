"""The same correlation in MLServer: a custom runtime in the only process, with flat data in the V2 protocol."""

import asyncio
import sys

import torch
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from torch.nn import functional


class Correlation(MLModel):  # type: ignore[misc]  # mlserver is not installed here
    """A model with the input tensors `input` and `kernel` and the output tensor `output`."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Compute the output; NumpyCodec converts the tensors."""
        image, kernel = (torch.from_numpy(NumpyCodec.decode_input(tensor)) for tensor in payload.inputs)
        output = functional.conv2d(image[None, None], kernel[None, None])[0, 0].numpy()
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("output", output)])


def main() -> None:
    """Serve HTTP on the port in the command line, and gRPC on any free port."""
    settings = Settings(
        host="127.0.0.1",
        http_port=int(sys.argv[1]),
        grpc_port=0,
        metrics_endpoint=None,
        parallel_workers=0,
        debug=False,  # no access log
    )
    asyncio.run(MLServer(settings).start([ModelSettings(name="correlation", implementation=Correlation)]))


if __name__ == "__main__":
    main()
