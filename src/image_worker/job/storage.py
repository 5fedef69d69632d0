"""Pictures kept in S3-compatible storage, for replies that hold links in their place.

Any service that speaks S3 with signatures of version 4 will do. The operator names a bucket by
environment variables; a caller may name another by `s3Config`, RunPod's own field beside `input`,
and is trusted with it no further than with a picture's URL.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self
from urllib.parse import urlsplit

import requests
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth  # type: ignore[import-untyped]
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from urllib3.util import Retry

from image_worker.errors import InvalidRequest, InvalidSettings, StorageUnavailable
from image_worker.job.network import public_addresses, request, within
from image_worker.job.request import translate
from image_worker.settings import Settings

UPLOAD_SECONDS = 60.0  # for all pictures of a job
_TIMEOUT = (5, 20)  # to connect, and the longest silence of a server
_RETRIES = Retry(
    2,
    backoff_factor=0.5,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=None,  # a PUT of the same bytes to the same name may be repeated
    raise_on_status=False,
    respect_retry_after_header=False,  # the server's word on how long to wait is not taken
)

_ENDPOINT = re.compile(
    r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(?::(\d{1,5}))?((/[\w.~-]+)*)/*", re.ASCII
)
_BUCKET = re.compile(r"\w[\w.-]{1,61}\w", re.ASCII)
_BUCKET_IN_HOST = re.compile(r".+\.(s3[.-].+|\w+\.digitaloceanspaces\.com)")
_REGION = re.compile(
    r"(?:^|\.)(?:s3[.-](?:dualstack\.)?([\w-]+)\.\w+\.\w.*|(\w+)\.digitaloceanspaces\.com)$"
)


def _printable(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    if not (text.isascii() and text.isprintable()):
        raise ValueError("only printable ASCII is allowed")
    return secret


Secret = Annotated[SecretStr, Field(min_length=1, max_length=1000), AfterValidator(_printable)]


class _S3Config(BaseModel):
    """RunPod's names. What else it may hold is RunPod's own."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)

    endpoint: str = Field(alias="endpointUrl", max_length=1000)
    access_key: Secret = Field(alias="accessId")
    secret_key: Secret = Field(alias="accessSecret")
    bucket: str | None = Field(None, alias="bucketName")


@dataclass(frozen=True)
class Storage:
    """A bucket. `base` is its URL, `public` whether it must be at a public address."""

    base: str
    access_key: SecretStr
    secret_key: SecretStr
    link_seconds: int
    public: bool

    @classmethod
    def from_settings(cls, settings: Settings) -> Self | None:
        """The operator's bucket, or None where there is none.

        Raises:
            InvalidSettings: the URL is no S3 endpoint, or the bucket's name is missing.
        """
        endpoint, key = settings.bucket_endpoint_url, settings.bucket_access_key_id
        secret = settings.bucket_secret_access_key
        if endpoint is None or key is None or secret is None:
            return None
        try:
            base = bucket_url(endpoint, settings.bucket_name)
        except ValueError as error:
            raise InvalidSettings(f"BUCKET_ENDPOINT_URL is {error}") from None
        return cls(base, key, secret, settings.bucket_link_seconds, public=False)

    @classmethod
    def from_job(cls, s3_config: object, link_seconds: int) -> Self:
        """A caller's bucket. Blocks while its host name is looked up.

        Raises:
            InvalidRequest: a field is missing or wrong, or the endpoint is not public https.
            StorageUnavailable: the endpoint's host name cannot be resolved now.
        """
        try:
            config = _S3Config.model_validate(s3_config)
        except ValidationError as error:
            raise translate(error, "s3Config") from None
        try:
            base = bucket_url(config.endpoint, config.bucket)
        except ValueError as error:
            raise InvalidRequest(f"the URL is {error}", field="s3Config.endpointUrl") from None
        if not base.startswith("https://"):
            raise InvalidRequest("the URL must start with https://", field="s3Config.endpointUrl")
        storage = cls(base, config.access_key, config.secret_key, link_seconds, public=True)
        storage._check_address()
        return storage

    def put(self, job_id: str, files: Sequence[bytes], form: str) -> list[str]:
        """Stores pictures of a format (`png`, …) under new names; returns links to them.

        The links are valid for `link_seconds`, for anyone who has them.

        Raises:
            StorageUnavailable: not all of them could be stored in time.
            InvalidRequest: a caller's bucket refused them.
        """
        folder = re.sub(r"[^A-Za-z0-9_-]", "_", job_id)[:100] or "job"
        urls = [f"{self.base}/{folder}/{uuid.uuid4()}.{form}" for _ in files]

        def work() -> None:
            for url, data in zip(urls, files, strict=True):
                self._put(url, data, f"image/{form}")

        late = StorageUnavailable(f"storing took over {UPLOAD_SECONDS:g} seconds")
        within(UPLOAD_SECONDS, work, late)
        return [self._link(url) for url in urls]

    def _put(self, url: str, data: bytes, kind: str) -> None:
        signed = AWSRequest("PUT", url, data=data, headers={"Content-Type": kind})
        S3SigV4Auth(self._credentials, "s3", self._region).add_auth(signed)
        headers = dict(signed.headers.items())
        try:
            with request(
                "PUT",
                url,
                public=self.public,
                retries=_RETRIES,
                timeout=_TIMEOUT,
                data=data,
                headers=headers,
            ) as response:
                status = response.status_code
        except (requests.RequestException, ValueError) as error:
            raise StorageUnavailable("the storage does not answer") from error
        if 200 <= status < 300:
            return
        reason = f"the storage refused the pictures with status {status}"
        if self.public and 300 <= status < 500 and status not in (408, 425, 429):
            raise InvalidRequest(reason, field="s3Config")
        raise StorageUnavailable(reason)

    def _link(self, url: str) -> str:
        signed = AWSRequest("GET", url)
        S3SigV4QueryAuth(self._credentials, "s3", self._region, expires=self.link_seconds).add_auth(
            signed
        )
        return str(signed.url)

    def _check_address(self) -> None:
        from runpod.serverless.utils.rp_ssrf import SSRFError

        late = StorageUnavailable("the host name of s3Config.endpointUrl could not be resolved")
        try:
            within(_TIMEOUT[0], lambda: public_addresses(self.base), late)
        except SSRFError as error:
            if isinstance(error.__cause__, OSError):
                raise late from error
            raise InvalidRequest(
                "the URL must lead to a public address", field="s3Config.endpointUrl"
            ) from error
        except ValueError as error:
            raise InvalidRequest("the URL is not valid", field="s3Config.endpointUrl") from error

    @property
    def _credentials(self) -> Credentials:
        return Credentials(self.access_key.get_secret_value(), self.secret_key.get_secret_value())

    @property
    def _region(self) -> str:
        found = _REGION.search(urlsplit(self.base).hostname or "")
        return (found[1] or found[2]) if found else "us-east-1"


def bucket_url(endpoint: str, bucket: str | None) -> str:
    """The URL of a bucket, without a slash at its end.

    The bucket's name may be in the endpoint already, as the first part of its host or of its path;
    otherwise it is added to the path.

    Raises:
        ValueError: no URL of storage, or the bucket's name is in neither.
    """
    if not (parts := _ENDPOINT.fullmatch(endpoint)) or int(parts[2] or 0) >= 2**16:
        raise ValueError("not the URL of S3 storage, such as https://s3.eu-west-1.amazonaws.com")
    host, path = parts[1], parts[3]
    base = endpoint.rstrip("/")
    if bucket is None:
        if path or _BUCKET_IN_HOST.fullmatch(host):
            return base
        raise ValueError("without the bucket's name; add it to its path, or give the name apart")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError("with a bucket's name that is not valid")
    named = host.startswith(f"{bucket}.") or path.split("/")[1:2] == [bucket]
    return base if named else f"{base}/{bucket}"
