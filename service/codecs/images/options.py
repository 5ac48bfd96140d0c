"""Options for the decoding of images."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ImageOptions(BaseModel):
    """Options of a request whose body is an image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    orientation: Literal["apply", "ignore"] = Field(
        "apply", description="image bodies: rotate and flip as the orientation in the file says, or ignore it"
    )
    alpha: Literal["drop", "keep", "white", "black"] = Field(
        "drop",
        description="image bodies: drop alpha, keep it as the last plane, or compose the image with white or black",
    )


DEFAULT_IMAGE_OPTIONS = ImageOptions.model_validate({})
