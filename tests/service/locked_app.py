"""An application that requires API keys, and the keys that it accepts."""

from typing import Any

from fastapi import FastAPI
from pydantic import SecretStr

from service.app import create_app
from service.configuration.settings import Settings

ALICE_KEY, BOB_KEY, CAROL_KEY = "alices-key-0123456789", "bobs-key-0123456789/+=~", "carols-key-0123456789"
WRONG_KEY = "nobodys-key-0123456789"
PAGE_ORIGIN = "https://pages.example.org"

OPEN_PATHS = [
    "/",
    "/docs",
    "/guide",
    "/guide/security",
    "/openapi.json",
    "/livez",
    "/readyz",
    "/static-offline-docs/swagger-ui.css",
]


def create_locked_app(**settings: Any) -> FastAPI:
    return create_app(Settings(device="cpu", api_keys=SecretStr(f"{ALICE_KEY}, {BOB_KEY}"), **settings))
