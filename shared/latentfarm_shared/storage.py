"""The object store: S3 through boto3, with its errors translated here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from latentfarm_shared.errors import FarmError, Unavailable
from latentfarm_shared.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CopySourceTypeDef, ObjectIdentifierTypeDef

_DENIED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "403"}
_MISSING = {"NoSuchKey", "404", "NotFound"}
_EXISTS = {"PreconditionFailed", "412"}
_UNCONDITIONAL = {"NotImplemented", "501"}


class MissingObject(FarmError):
    """There is no object at `key`."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"there is no object {self.key!r} in the store"


class ObjectConflict(FarmError):
    """The object at `key` holds something else than what was to be written."""

    code = "OBJECT_CONFLICT"

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"{self.key!r} already holds another content"


class Store(Protocol):
    """What workers and tables need of a store."""

    def put_once(self, key: str, data: bytes, content_type: str, content_id: str) -> bool:
        """Write an object unless it is there."""
        ...

    def content_id(self, key: str) -> str | None:
        """Return the content id an object was written with; None if there is no object."""
        ...

    def copy(self, source: str, target: str, content_id: str) -> bool:
        """Copy an object of this content id; false if it is not there."""
        ...

    def get(self, key: str) -> bytes:
        """Read an object."""
        ...


class NoStore:
    """Takes everything and keeps nothing, to measure a farm without its store."""

    def put_once(self, _key: str, _data: bytes, _content_type: str, _content_id: str) -> bool:
        """Drop an object."""
        return True

    def content_id(self, _key: str) -> str | None:
        """Have none."""
        return None

    def copy(self, _source: str, _target: str, _content_id: str) -> bool:
        """Have none."""
        return False

    def get(self, key: str) -> bytes:
        """Have none."""
        raise MissingObject(key)


class ObjectStore:
    """One bucket of an S3-compatible store. Safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        """Prepare a client; nothing is sent yet."""
        self.bucket = settings.s3_bucket
        self._client: S3Client = boto3.client(
            "s3",
            endpoint_url=settings.s3_endpoint,
            aws_access_key_id=settings.s3_access_key,
            aws_secret_access_key=settings.s3_secret_key,
            region_name=settings.s3_region,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                retries={"mode": "standard", "max_attempts": 4},
                connect_timeout=3,
                read_timeout=30,
                max_pool_connections=32,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def url(self, key: str) -> str:
        """Return the `s3://` address of an object."""
        return f"s3://{self.bucket}/{key}"

    def check(self) -> None:
        """Make sure the bucket is there and we may use it.

        Raises:
            Unavailable: no answer, wrong credentials, or no such bucket.
        """
        with self._translated(self.bucket):
            self._client.head_bucket(Bucket=self.bucket)

    def create_bucket(self) -> None:
        """Create the bucket unless it exists."""
        with self._translated(self.bucket):
            names = [bucket["Name"] for bucket in self._client.list_buckets()["Buckets"]]
            if self.bucket not in names:
                self._client.create_bucket(Bucket=self.bucket)

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        """Write an object, replacing what was there."""
        with self._translated(key):
            self._client.put_object(Bucket=self.bucket, Key=key, Body=data, ContentType=content_type)

    def put_once(self, key: str, data: bytes, content_type: str, content_id: str) -> bool:
        """Write an object unless it is there; tell whether this call wrote it.

        An object already there must carry the same `content_id`: then the write happened before. A store that refuses
        conditions is looked at first: what two writers of one content id race for is the same picture.

        Raises:
            ObjectConflict: it carries another.
        """
        written = self._put_if_none(key, data, content_type, content_id)
        if written is None:
            found = self.content_id(key)
            if found is None:
                with self._translated(key):
                    self._put(key, data, content_type, content_id)
                return True
        elif written:
            return True
        else:
            found = self.content_id(key)
        if found != content_id:
            raise ObjectConflict(key)
        return False

    def _put_if_none(self, key: str, data: bytes, content_type: str, content_id: str) -> bool | None:
        """Tell whether an object was written, for there was none; None if the store knows no conditions."""
        try:
            self._put(key, data, content_type, content_id, IfNoneMatch="*")
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in _EXISTS:
                return False
            if code in _UNCONDITIONAL:
                return None
            raise _translate(error, key, self.bucket) from error
        except BotoCoreError as error:
            raise _translate(error, key, self.bucket) from error
        return True

    def _put(self, key: str, data: bytes, content_type: str, content_id: str, **conditions: Any) -> None:
        self._client.put_object(
            Bucket=self.bucket,
            Key=key,
            Body=data,
            ContentType=content_type,
            Metadata={"content-id": content_id},
            **conditions,
        )

    def copy(self, source: str, target: str, content_id: str) -> bool:
        """Copy an object inside the store; false if there is none of this content id at `source`."""
        if self.content_id(source) != content_id:
            return False
        try:
            with self._translated(source):
                origin: CopySourceTypeDef = {"Bucket": self.bucket, "Key": source}
                self._client.copy_object(Bucket=self.bucket, Key=target, CopySource=origin, MetadataDirective="COPY")
        except MissingObject:
            return False
        return True

    def delete_all(self, prefix: str) -> int:
        """Delete every object whose key starts with `prefix`; return how many."""
        with self._translated(prefix):
            deleted = 0
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                keys: list[ObjectIdentifierTypeDef] = [{"Key": item["Key"]} for item in page.get("Contents", [])]
                if keys:
                    self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})
                deleted += len(keys)
        return deleted

    def put_new(self, key: str, data: bytes, content_id: str) -> bool:
        """Write a JSON object unless there is one at `key`; tell whether it is this one that is there."""
        try:
            self.put_once(key, data, "application/json", content_id)
        except ObjectConflict:
            return False
        return True

    def content_id(self, key: str) -> str | None:
        """Return the content id an object was written with; None if there is no object."""
        try:
            with self._translated(key):
                return self._client.head_object(Bucket=self.bucket, Key=key)["Metadata"].get("content-id", "")
        except MissingObject:
            return None

    def get(self, key: str) -> bytes:
        """Read an object.

        Raises:
            MissingObject: there is none.
        """
        with self._translated(key):
            return self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def get_part(self, key: str, start: int, length: int) -> bytes:
        """Read `length` bytes of an object from `start` on.

        Raises:
            MissingObject: there is none.
        """
        with self._translated(key):
            part = f"bytes={start}-{start + length - 1}"
            return self._client.get_object(Bucket=self.bucket, Key=key, Range=part)["Body"].read()

    def link(self, key: str, seconds: int) -> str:
        """Return an address where an object can be read for so many seconds, by whoever has it."""
        address = self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self.bucket, "Key": key}, ExpiresIn=seconds
        )
        return str(address)

    def upload(self, key: str, path: Path) -> None:
        """Write a file of any size as an object."""
        with self._translated(key):
            self._client.upload_file(str(path), self.bucket, key)

    def download(self, key: str, path: Path, on_progress: Callable[[], None] = lambda: None) -> None:
        """Read an object of any size into a file, which appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._translated(key):
            self._client.download_file(self.bucket, key, str(path), Callback=lambda _bytes: on_progress())

    def exists(self, key: str) -> bool:
        """Tell whether there is an object at `key`."""
        return self.content_id(key) is not None

    def keys(self, prefix: str) -> list[str]:
        """List the keys that start with `prefix`."""
        with self._translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return [item["Key"] for page in pages for item in page.get("Contents", [])]

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise _translate(error, key, self.bucket) from error


def _translate(error: ClientError | BotoCoreError | Boto3Error, key: str, bucket: str) -> FarmError:
    if not isinstance(error, ClientError):
        return Unavailable("S3", f"no answer ({type(error).__name__})", "check LATENTFARM_S3_ENDPOINT")
    code = error.response.get("Error", {}).get("Code", "")
    if code in _DENIED:
        return Unavailable("S3", "access denied", "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if code == "NoSuchBucket" or (code in _MISSING and key == bucket):
        return Unavailable("S3", f"there is no bucket {bucket!r}", "create it or set LATENTFARM_S3_BUCKET")
    if code in _MISSING:
        return MissingObject(key)
    return Unavailable("S3", f"{code or 'error'} at {key!r}")
