"""The same correlation in LitServe, with its minimum of one process for HTTP and one worker."""

import sys
from typing import Any

import litserve
import torch
from torch.nn import functional


class Correlation(litserve.LitAPI):  # type: ignore[misc]  # litserve is not installed here
    """A service with JSON requests and responses, by the hooks of LitServe."""

    def setup(self, device: str) -> None:
        """Load nothing: the server has no model."""

    def decode_request(self, request: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Convert nested lists to tensors."""
        return torch.tensor(request["input"]), torch.tensor(request["kernel"])

    def predict(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the output."""
        image, kernel = x
        return functional.conv2d(image[None, None], kernel[None, None])[0, 0]

    def encode_response(self, output: torch.Tensor) -> dict[str, Any]:
        """Convert the output to nested lists."""
        return {"output": output.tolist()}


if __name__ == "__main__":  # the worker processes import this file, too
    server = litserve.LitServer(Correlation(), accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, access_log=False)
