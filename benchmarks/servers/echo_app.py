"""The same bytes back: what is left when nothing is computed, a bound for everything on this server and framework."""

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

app = FastAPI()


async def echo(request: Request) -> Response:
    """Neither parsed nor written anew."""
    return Response(await request.body(), media_type=request.headers["content-type"])


app.add_route("/echo", echo, methods=["POST"])
