"""Settings of the service, read from environment variables that begin with LLM4EHR_."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, IPvAnyNetwork, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from service.access.hosts import is_private_url

PREFIX = "LLM4EHR_"

ASYMMETRIC = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
"""Algorithms by which nobody can sign who can verify."""

SETTINGS_FILE = "LLM4EHR_SETTINGS_FILE"
"""Names a file of further settings, NAME=value; what is in the environment wins."""

# Beyond some years nothing is meant, and sums of times soon leave the calendar.
_MAX_HOURS = 87_600

# Names under our prefix that other parts of the project read.
_FOREIGN = (SETTINGS_FILE, "LLM4EHR_BACKBONES", "LLM4EHR_DATA", "LLM4EHR_TEST_")


class Settings(BaseSettings):
    """All settings and their defaults. An unknown LLM4EHR_ variable is an error, not a no-op."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_parse_none_str="none", extra="forbid", frozen=True
    )

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000

    log_path: Path = Path("llm4ehr-log.sqlite")
    """File of the log; made if it does not exist. Unused with `log_url`."""

    log_url: SecretStr | None = None
    """`postgresql://…` of a log that several replicas share, in the place of the file."""

    authentication: Literal["required", "open"] = "required"
    """"open" lets everybody do everything: for demonstrations alone."""

    clients_file: Path | None = None
    """YAML file of the clients: hashed API keys, certificate subjects, scopes, restrictions."""

    oidc_issuer: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """Whose bearer tokens are accepted; None: none are."""

    oidc_audience: str | None = None
    """The audience that a token must name; needed with an issuer."""

    oidc_jwks_url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """Where the issuer's keys are; None: where its metadata say."""

    oidc_algorithms: tuple[str, ...] = ("RS256", "RS384", "ES256", "ES384")
    """How tokens may be signed, as a JSON list; none but asymmetric algorithms are allowed."""

    oidc_leeway_seconds: Annotated[float, Field(ge=0, le=300, allow_inf_nan=False)] = 30.0
    """How far the issuer's clock may be from ours."""

    trusted_gateways: tuple[IPvAnyNetwork, ...] = ()
    """Networks of gateways, as a JSON list, whose word on a client's certificate is taken."""

    gateway_secret_file: Path | None = None
    """File with what a gateway sends to show that it is one; needed with `trusted_gateways`."""

    bundle_digests: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] | None = None
    """The digest of every version that may be loaded, a JSON object by NAME/VERSION; None: any."""

    log_format: Literal["text", "json"] = "text"
    """How the lines of the application's log are written."""

    model_repository: Path = Path("model_repository")
    bundle: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+/[1-9][0-9]*$")] = "llm4ehr/1"
    """Which model answers, as NAME/VERSION within the repository."""

    backend: Literal["torch-cpu", "torch-cuda", "onnx-cpu", "onnx-cuda"] = "torch-cpu"
    """Where and with what the network is computed."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products of the backbone's linear layers; a reduced one needs `precision_gate`."""

    precision_gate: Path | None = None
    """What `python -m service gate` measured of this bundle in this precision."""

    max_models: Annotated[int, Field(ge=1)] = 3
    """Most versions of models that are loaded at a time, each with slots of its own."""

    model_control: bool = False
    """Whether versions may be loaded, activated, unloaded and compared over HTTP."""

    audit_interval_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 10.0
    """How often an idle service computes a random stay again from the log; None: never."""

    kv_memory_mib: Annotated[int, Field(ge=1)] = 512
    """Memory for the live states of stays. What does not fit is rebuilt from the log on demand."""

    state_memory_mib: Annotated[int, Field(ge=1)] = 1024
    """Memory for features and answers of stays. What does not fit is computed again on demand."""

    engine_rows: Annotated[int, Field(ge=1, le=4096)] = 32
    """Most rows (one hour of one stay each) in one forward pass."""

    torch_threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of a forward pass; None: one less than the cores."""

    read_deadline_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """How long a read waits for the engine; a client may ask for less."""

    write_deadline_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """How long the body of a write may take to come, and after it a write to be in the log."""

    max_waiting_writes: Annotated[int, Field(ge=1)] = 1024
    """Most writes waiting for the log before it answers `overloaded`."""

    max_connections: Annotated[int, Field(ge=1)] = 1000
    """Most connections at a time; who comes then is told to come again."""

    max_in_flight_per_client: Annotated[int, Field(ge=1)] | None = None
    """Most requests of one client at a time; None: no limit."""

    requests_per_second_per_client: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1000
    """Requests of one client a second, over some seconds; None: no limit, nor one of failures."""

    drain_grace_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """How long a service that was told to stop still answers while it says that it is not ready."""

    drain_timeout_seconds: Annotated[int, Field(ge=1)] = 20
    """After so long the process ends, whatever is left to do."""

    tracing: Literal["none", "console", "otlp"] = "none"
    """Where OpenTelemetry spans go."""

    max_pending: Annotated[int, Field(ge=1)] = 4096
    """Most stays waiting for the engine before it answers `overloaded`."""

    cached_entries: Annotated[int, Field(ge=0)] = 200_000
    """Most log entries kept in memory, about 1 KiB each."""

    scoring_enabled: bool = True
    """The kill switch: without it data is taken and kept, but no score is computed or shown."""

    allowed_lateness_hours: Annotated[float, Field(ge=0, le=_MAX_HOURS)] = 2.0
    """How long after its end an hour stays preliminary."""

    staleness_limit_hours: Annotated[float, Field(gt=0, le=_MAX_HOURS)] | None = 12.0
    """Age of the newest data beyond which no score is shown; None: no limit."""

    future_tolerance_minutes: Annotated[float, Field(ge=0, le=60 * _MAX_HOURS)] = 5.0
    """How far the clocks of senders may run ahead of ours."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 1 << 20
    max_items: Annotated[int, Field(ge=1)] = 5000
    """Most observations, events and withdrawals in one request, together."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the file that the environment names."""
        if not (path := os.environ.get(SETTINGS_FILE)):
            return init_settings, env_settings
        if not Path(path).is_file():
            raise FileNotFoundError(f"{SETTINGS_FILE} names a file that does not exist: {path}")
        return init_settings, env_settings, DotEnvSettingsSource(settings_cls, env_file=path)

    @model_validator(mode="after")
    def _refuse_unknown_variables(self) -> Self:
        known = {PREFIX + name.upper() for name in type(self).model_fields}
        unknown = sorted(
            name
            for name in (key.upper() for key in os.environ)
            if name.startswith(PREFIX) and name not in known and not _is_foreign(name)
        )
        if unknown:
            raise ValueError(f"unknown environment variables: {', '.join(unknown)}")
        return self

    @model_validator(mode="after")
    def _know_clients(self) -> Self:
        """Refuses what would leave a way in that is not meant, or none at all."""
        needs = {
            "OIDC_AUDIENCE": self.oidc_issuer and not self.oidc_audience,
            "OIDC_ISSUER": (self.oidc_audience or self.oidc_jwks_url) and not self.oidc_issuer,
            "GATEWAY_SECRET_FILE": self.trusted_gateways and not self.gateway_secret_file,
            "TRUSTED_GATEWAYS": self.gateway_secret_file and not self.trusted_gateways,
            "CLIENTS_FILE": self.trusted_gateways and not (self.clients_file or self.oidc_issuer),
        }
        if missing := [PREFIX + name for name, is_missing in needs.items() if is_missing]:
            raise ValueError(f"the settings of clients need {', '.join(missing)} too")
        for url in filter(None, (self.oidc_issuer, self.oidc_jwks_url)):
            if not is_private_url(url):
                raise ValueError(f"{PREFIX}OIDC_…: keys are read by https, or from this machine")
        if not self.oidc_algorithms or not ASYMMETRIC.issuperset(self.oidc_algorithms):
            allowed = ", ".join(sorted(ASYMMETRIC))
            raise ValueError(f"{PREFIX}OIDC_ALGORITHMS: allowed are {allowed}")
        if self.authentication == "open" and self.knows_clients:
            raise ValueError(f"{PREFIX}AUTHENTICATION=open contradicts the settings of clients")
        return self

    @property
    def knows_clients(self) -> bool:
        """Whether it is said who the clients are."""
        return bool(self.clients_file or self.oidc_issuer or self.trusted_gateways)

    @model_validator(mode="after")
    def _leave_time_to_stop(self) -> Self:
        if self.drain_grace_seconds >= self.drain_timeout_seconds:
            raise ValueError(f"{PREFIX}DRAIN_GRACE_SECONDS must be less than the drain timeout")
        return self

    @property
    def allowed_lateness(self) -> timedelta:
        return timedelta(hours=self.allowed_lateness_hours)

    @property
    def staleness_limit(self) -> timedelta | None:
        hours = self.staleness_limit_hours
        return None if hours is None else timedelta(hours=hours)

    @property
    def future_tolerance(self) -> timedelta:
        return timedelta(minutes=self.future_tolerance_minutes)


def _is_foreign(name: str) -> bool:
    *names, test = _FOREIGN
    return name in names or name.startswith(test)
