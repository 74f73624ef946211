"""The service's settings: environment variables, checked when it starts.

Not here: what the settings mean in detail (`README.md`), and the API keys themselves (`auth.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from dspylite.errors import SettingsError, nearest
from examples.embedding_service.auth import ApiKeys, is_loopback

PREFIX = "EMBEDDING_SERVICE_"


class Config(BaseModel):
    """All settings. Each is read from `EMBEDDING_SERVICE_<NAME IN CAPITALS>`.

    Secrets are `SecretStr`: neither `repr` nor an error shows them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # The web side
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_keys: SecretStr = SecretStr("")
    max_body_bytes: int = Field(1_048_576, ge=1, le=64 * 1_048_576)
    rate_limit: int = Field(600, ge=0)  # requests of one user in a window; 0 is no limit
    rate_window_s: int = Field(60, ge=1)

    # The model
    model: str = "offline/hashing"
    api_base: str | None = None
    embedding_key: SecretStr | None = None
    dimensions: int | None = Field(None, ge=1)
    instruction: str = ""  # with its last blank, which is a part of it
    query_instruction: str = ""
    tokenizer: str | None = None
    chunk_tokens: int = Field(256, ge=8)
    chunk_overlap: int = Field(32, ge=0)

    # The store
    store: Literal["auto", "chroma", "builtin"] = "auto"
    data: str = "embedding-service-data"  # empty keeps everything in memory
    chroma_url: str | None = None

    # The queue
    redis_url: SecretStr | None = None
    queue_size: int = Field(10_000, ge=1)
    batch_documents: int = Field(32, ge=1)
    batch_wait_s: float = Field(0.02, ge=0, le=10)
    max_attempts: int = Field(1_500, ge=1)
    retry_max_s: float = Field(60, gt=0)
    lease_s: float = Field(60, ge=0.5)
    visibility_timeout_s: int = Field(3_600, ge=1)
    keep_tasks_s: int = Field(7 * 86_400, ge=1)
    shutdown_s: int = Field(10, ge=0)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Read the settings from environment variables.

        Empty variables count as absent, except `EMBEDDING_SERVICE_DATA`.

        Raises:
            SettingsError: A variable is unknown or has an impossible value; all are named at once.
        """
        given = os.environ if environment is None else environment
        values = {
            name.removeprefix(PREFIX).lower(): value if "INSTRUCTION" in name else value.strip()
            for name, value in given.items()
            if name.startswith(PREFIX) and (value.strip() or name == PREFIX + "DATA")
        }
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            faults = "; ".join(
                _fault(".".join(map(str, fault["loc"])), fault["type"], fault["msg"])
                for fault in error.errors(include_input=False, include_context=False)
            )
        # Outside of the handler: pydantic's own error might be shown with what it was given.
        raise SettingsError(f"The service cannot start: {faults}.")

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: SecretStr) -> SecretStr:
        ApiKeys(value.get_secret_value())
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        return value

    @field_validator("chroma_url", "api_base")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if not self.keys and not is_loopback(self.host):
            raise ValueError(
                f"{PREFIX}HOST={self.host} would open a service without API keys to the network; "
                f"set {PREFIX}API_KEYS"
            )
        if self.chunk_overlap * 2 > self.chunk_tokens:
            raise ValueError(f"{PREFIX}CHUNK_OVERLAP must be at most half of {PREFIX}CHUNK_TOKENS")
        if self.redis_url and not self.chroma_url:
            raise ValueError(
                f"with {PREFIX}REDIS_URL the workers need a store that they share: "
                f"set {PREFIX}CHROMA_URL"
            )
        if self.chroma_url and self.store == "builtin":
            raise ValueError(f"{PREFIX}CHROMA_URL and {PREFIX}STORE=builtin exclude each other")
        if self.store == "chroma" and not self.chroma_url and not self.data:
            raise ValueError(f"{PREFIX}STORE=chroma needs {PREFIX}DATA or {PREFIX}CHROMA_URL")
        return self

    @property
    def keys(self) -> ApiKeys:
        """The accepted API keys."""
        return ApiKeys(self.api_keys.get_secret_value())

    @property
    def data_path(self) -> Path | None:
        """Where the embedded mode keeps its files; None where it keeps none."""
        return Path(self.data) if self.data else None

    def collection_of(self, user: str) -> str:
        """Name the collection that holds a user's vectors of this model.

        One for each user, so that no filter stands between tenants; and one for each model, so
        that vectors which cannot be compared never meet.
        """
        kind = [user, self.model, self.dimensions, self.instruction]
        return "es-" + hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:40]


def _fault(name: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        hint = nearest(name, Config.model_fields).replace("`", "")
        return f"{PREFIX}{name.upper()} is no setting. {hint.upper()}".rstrip("? .")
    said = message.removeprefix("Value error, ")
    return f"{PREFIX}{name.upper()}: {said}" if name else said
