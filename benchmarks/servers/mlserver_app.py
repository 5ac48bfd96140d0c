"""The same correlation in MLServer: a custom runtime in the server's only process, flat data in its V2 protocol."""

import asyncio
import sys

import torch
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from torch.nn import functional


class Correlation(MLModel):  # type: ignore[misc]  # mlserver is not installed here
    """Tensors `input` and `kernel` in, `output` out."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """By the codec that it has for numpy's arrays."""
        image, kernel = (torch.from_numpy(NumpyCodec.decode_input(tensor)) for tensor in payload.inputs)
        output = functional.conv2d(image[None, None], kernel[None, None])[0, 0].numpy()
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("output", output)])


def main() -> None:
    """Serve on the port that the command line names; gRPC takes any."""
    settings = Settings(
        host="127.0.0.1",
        http_port=int(sys.argv[1]),
        grpc_port=0,
        metrics_endpoint=None,
        parallel_workers=0,
        debug=False,  # its access log
    )
    asyncio.run(MLServer(settings).start([ModelSettings(name="correlation", implementation=Correlation)]))


if __name__ == "__main__":
    main()
