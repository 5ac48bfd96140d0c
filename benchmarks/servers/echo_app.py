"""An application that returns the request body: an upper bound for every application on this server and framework."""

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

app = FastAPI()


async def echo(request: Request) -> Response:
    """Return the body of the request unchanged."""
    return Response(await request.body(), media_type=request.headers["content-type"])


app.add_route("/echo", echo, methods=["POST"])
