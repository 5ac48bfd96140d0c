"""Settings of the service, from `CORR2D_*` environment variables or the flags of `corr2d serve`."""

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from service.configuration.api_keys import KeyRing, parse_keys, read_keys
from service.configuration.kubernetes_variables import is_kubernetes_variable
from service.server.certificates import check_certificate
from service.server.forwarding import UNIX_PEER, ProxyOptions, TrustedProxies, is_valid_prefix, parse_trusted_proxies

ENV_PREFIX = "CORR2D_"

ORIGIN_PATTERN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
HEADER_NAME_PATTERN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
DEFAULT_PORT_PATTERN = re.compile(r"http://.*:80|https://.*:443")


class SettingsError(Exception):
    """Invalid setting; the message is one line."""


class EnvironmentSource(EnvSettingsSource):
    """Environment variables, without those that Kubernetes sets: CORR2D_PORT may be one of them."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the value of a setting, or None if it is not set."""
        value, key, is_complex = super().get_field_value(field, field_name)
        is_foreign = isinstance(value, str) and is_kubernetes_variable(ENV_PREFIX + field_name.upper(), value)
        return None if is_foreign else value, key, is_complex


class Settings(BaseSettings):
    """Settings; each description is the help of a flag, a line of `corr2d config` and a row of docs/http-api.md."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True)

    host: str = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0 for every interface, :: for IPv6 and IPv4", min_length=1
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    uds: Path | None = Field(
        None, description="Unix socket to listen on instead of CORR2D_HOST and CORR2D_PORT: a path; unset: none"
    )
    ssl_certfile: Path | None = Field(
        None, description="file with the certificate chain for TLS, in PEM format; unset: no TLS"
    )
    ssl_keyfile: Path | None = Field(
        None, description="file with the private key for TLS, in PEM format; unset: it is in CORR2D_SSL_CERTFILE"
    )
    root_path: str | None = Field(
        None, description="path prefix below which a proxy publishes the service, such as /corr2d; unset: none"
    )
    trusted_proxies: str | None = Field(
        None,
        description="comma-separated addresses and networks of proxies whose X-Forwarded-* headers are used, and unix "
        "for those that connect to CORR2D_UDS; unset: none",
    )
    workers: int = Field(1, ge=1, le=64, description="worker processes that serve the port")
    device: str = Field("auto", description="device for requests with device auto: auto, cpu, cuda, cuda:1 or mps")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU cores for computations, shared by the workers; unset: all available cores"
    )
    max_body_mb: float = Field(64, gt=0, le=100_000, description="maximum request body, in MB (10^6 bytes)")
    memory_mb: float | None = Field(
        None,
        gt=0,
        le=10_000_000,
        description="memory for all concurrent requests, shared by the workers, in MB; unset: 0.6 of available memory",
    )
    max_compute_mb: float | None = Field(
        None,
        gt=0,
        le=10_000_000,
        description="maximum estimated memory of one computation, in MB; unset: 2000, or half of a worker's memory "
        "if less",
    )
    max_compute_gflop: float = Field(
        200, gt=0, le=1e9, description="maximum estimated arithmetic of one computation, in Gflop (10^9 operations)"
    )
    request_timeout_s: float = Field(
        60,
        gt=0,
        le=86_400,
        description="deadline of a request from its headers on (receive, decode, wait, compute, encode), in seconds",
    )
    queue: int = Field(
        64, ge=0, le=100_000, description="maximum number of computations that wait in the queue of each worker"
    )
    queue_timeout_s: float = Field(
        10,
        gt=0,
        le=86_400,
        description="maximum time in the queue, in seconds; longer expected waits are rejected with 503",
    )
    connections: int = Field(1000, ge=1, le=1_000_000, description="maximum open connections of each worker")
    idle_timeout_s: float = Field(
        8, gt=0, le=86_400, description="time after which a connection without a request is closed, in seconds"
    )
    header_timeout_s: float = Field(
        8, gt=0, le=86_400, description="receive timeout for the request line and headers, in seconds"
    )
    body_timeout_s: float = Field(
        10, gt=0, le=86_400, description="receive timeout per 16 kB of request body, in seconds"
    )
    send_timeout_s: float = Field(20, gt=0, le=86_400, description="send timeout per 16 kB of response, in seconds")
    drain_s: float = Field(
        2,
        ge=0,
        le=3600,
        description="time from SIGTERM, when /readyz begins to fail, until the port closes, in seconds",
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="log format, one line per request: console (readable text) or json"
    )
    replica: str | None = Field(
        None,
        min_length=1,
        description="name of this replica of the service in /metrics, /info and the log; unset: none",
    )
    log_probes: bool = Field(default=True, description="log successful requests for /livez, /readyz and /metrics, too")
    api_keys: SecretStr | None = Field(
        None,
        description="comma-separated API keys, or NAME:KEY; every request must present one. Unset: no authentication",
    )
    api_keys_file: Path | None = Field(
        None, description="file with more API keys, one per line, read again when it changes"
    )
    cors_origins: str | None = Field(
        None, description="comma-separated origins whose pages may call the API from a browser, or *; unset: none"
    )
    cors_headers: str | None = Field(
        None,
        description="comma-separated names of further request headers that these pages may send; unset: none",
    )
    cors_credentials: bool = Field(
        default=False,
        description="allow pages of CORR2D_CORS_ORIGINS to send credentials: cookies or logins of a proxy in front "
        "of the service",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources, the most important first: flags and environment; no files."""
        del env_settings, dotenv_settings, file_secret_settings
        return init_settings, EnvironmentSource(settings_cls)

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, prefix: str | None) -> str | None:
        if prefix is not None and not is_valid_prefix(prefix):
            raise ValueError(
                "not a valid path prefix: use segments of letters, digits and -._~ after a slash, without a slash at "
                "the end, such as /corr2d"
            )
        return prefix

    @field_validator("trusted_proxies")
    @classmethod
    def _check_trusted_proxies(cls, proxies: str | None) -> str | None:
        if proxies is not None:
            parse_trusted_proxies(proxies)
        return proxies

    @model_validator(mode="after")
    def _check_unix_proxies(self) -> Self:
        if self.proxy_options.trusted.has_unix_peers and self.uds is None:
            raise ValueError(
                f"{ENV_PREFIX}TRUSTED_PROXIES contains {UNIX_PEER}, which requires {ENV_PREFIX}UDS: set it, or remove "
                f"{UNIX_PEER}"
            )
        return self

    @model_validator(mode="after")
    def _check_certificate(self) -> Self:
        if self.ssl_certfile is None and self.ssl_keyfile is not None:
            raise ValueError(f"{ENV_PREFIX}SSL_KEYFILE requires {ENV_PREFIX}SSL_CERTFILE: set both")
        if self.ssl_certfile is not None:
            check_certificate(self.ssl_certfile, self.ssl_keyfile)
        return self

    @field_validator("api_keys")
    @classmethod
    def _check_api_keys(cls, keys: SecretStr | None) -> SecretStr | None:
        if keys is not None:
            parse_keys(keys.get_secret_value())
        return keys

    @field_validator("api_keys_file")
    @classmethod
    def _check_api_keys_file(cls, path: Path | None) -> Path | None:
        if path is not None:
            read_keys(path)
        return path

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: str | None) -> str | None:
        for origin in () if origins in (None, "*") else _split_list(origins):
            if not ORIGIN_PATTERN.fullmatch(origin) or DEFAULT_PORT_PATTERN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not a valid origin: use a scheme and a lower-case host, without default port "
                    "or path, such as https://example.org or http://localhost:3000"
                )
        return origins

    @field_validator("cors_headers")
    @classmethod
    def _check_headers(cls, headers: str | None) -> str | None:
        for header in () if headers is None else _split_list(headers):
            if not HEADER_NAME_PATTERN.fullmatch(header):
                raise ValueError(f"{header!r} is not a valid header name: use letters, digits and hyphens")
        return headers

    @model_validator(mode="after")
    def _check_credentials(self) -> Self:
        if self.cors_credentials and self.cors_origins in (None, "*"):
            raise ValueError(
                f"{ENV_PREFIX}CORS_CREDENTIALS requires a list of origins, but {ENV_PREFIX}CORS_ORIGINS is "
                f"{self.cors_origins or 'unset'}; with *, any page could send requests with the logins of its visitors"
            )
        return self

    @property
    def requires_api_key(self) -> bool:
        """True if requests need an API key."""
        return self.api_keys is not None or self.api_keys_file is not None

    def read_api_keys(self) -> KeyRing | None:
        """Return the API keys, None if requests need none. Raises InvalidKeys."""
        if not self.requires_api_key:
            return None
        return KeyRing(self.api_keys.get_secret_value() if self.api_keys else None, self.api_keys_file)

    @property
    def proxy_options(self) -> ProxyOptions:
        """The path prefix and the trusted proxies."""
        trusted = TrustedProxies() if self.trusted_proxies is None else parse_trusted_proxies(self.trusted_proxies)
        return ProxyOptions(self.root_path or "", trusted)

    @property
    def origins(self) -> list[str]:
        """The origins in cors_origins, as a list."""
        return [] if self.cors_origins is None else _split_list(self.cors_origins)

    @property
    def allowed_headers(self) -> list[str]:
        """The header names in cors_headers, as a list."""
        return [] if self.cors_headers is None else _split_list(self.cors_headers)

    @model_validator(mode="after")
    def _check_compute_memory(self) -> Self:
        if self.memory_mb is not None and self.max_compute_mb is not None:
            half = self.memory_mb / self.workers / 2
            if self.max_compute_mb > half:
                raise ValueError(
                    f"{ENV_PREFIX}MAX_COMPUTE_MB {self.max_compute_mb:g} is above {half:g}, "
                    f"half of a worker's part of {ENV_PREFIX}MEMORY_MB {self.memory_mb:g}"
                )
        return self


def load_settings(**flags: object) -> Settings:
    """Return the settings in force: flags (None: not given), then environment variables, then defaults.

    Raises SettingsError with one line that names the setting, its value and the allowed values.
    """
    _reject_unknown_variables()
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise SettingsError(message) from error
        name = str(first["loc"][0])
        variable = ENV_PREFIX + name.upper()
        origin = f"--{name.replace('_', '-')}" if name in given else variable
        message = message[0].lower() + message[1:]
        field = Settings.model_fields[name]
        value = "" if field.annotation == SecretStr | None else f" {first['input']!r}"
        raise SettingsError(f"{origin}{value}: {message} ({field.description})") from error


def _split_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def list_variables() -> dict[str, str]:
    """Return the CORR2D_* variables of the environment by name, in upper case; without those of Kubernetes."""
    return {
        name.upper(): value
        for name, value in sorted(os.environ.items())
        if name.upper().startswith(ENV_PREFIX) and not is_kubernetes_variable(name, value)
    }


def _reject_unknown_variables() -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for variable in list_variables():
        if variable not in known:
            near = difflib.get_close_matches(variable, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid settings: {', '.join(sorted(known))}"
            raise SettingsError(f"{variable} is not a setting; {hint}")
