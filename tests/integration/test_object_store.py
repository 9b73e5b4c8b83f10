"""A server whose contents lie in an object store: a stand-in for S3, over real connections."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import grpc
import pytest
from tests.builders import World, quick_folder
from tests.integration.test_cli import fail, run, serving, succeed
from tests.integration.test_file_service import (
    MISSING,
    PHOTO,
    PRESENT,
    SMALL,
    Client,
    cut,
    messages,
    reference,
    refused,
)
from tests.object_stores import Bucket, refusing, s3_options, s3_stand_in

from tidelog._limits import FILE_CHUNK_BYTES
from tidelog.cli import ExitCode
from tidelog_server import Application, ObjectStoreContents, Server, _object_store_contents

CHUNKS: Final = 2 * FILE_CHUNK_BYTES


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Run the stand-in."""
    with s3_stand_in() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Make a bucket, for contents of several pieces."""
    monkeypatch.setattr(_object_store_contents, "PIECE_BYTES", FILE_CHUNK_BYTES)
    return Bucket(s3)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def world(folder: Path, bucket: Bucket) -> Iterator[World]:
    """Give a server with its contents in the bucket."""
    with World(folder, contents=ObjectStoreContents(bucket.url, **bucket.options)) as opened:
        yield opened


def test_a_content_goes_up_and_comes_down(world: World, bucket: Bucket) -> None:
    """What was uploaded is in the bucket, once, and comes back through the object that refers to it."""
    client = Client(world)
    client.upload(PHOTO)
    client.upload(SMALL)

    assert client.create(photo=reference(PHOTO), small=reference(SMALL)) == ["APPLIED"]
    assert client.download(PHOTO) == PHOTO
    assert client.download(PHOTO, offset=CHUNKS - 1, length=5) == PHOTO[CHUNKS - 1 : CHUNKS + 4]
    assert client.download(SMALL) == SMALL
    assert len(bucket.objects()) == 2
    assert not (world.folder / "server" / "files").exists()


def test_an_upload_goes_on_with_another_server(world: World, bucket: Bucket) -> None:
    """What was cut off is known to a server that only shares the bucket, and the rest makes the content whole."""
    cut(Client(world), messages(PHOTO, until=CHUNKS))

    world._contents = ObjectStoreContents(bucket.url, **bucket.options)
    world.deploy(Application())

    client = Client(world)
    assert client.stat(PHOTO) == [(MISSING, CHUNKS)]
    client.upload(PHOTO, CHUNKS)
    client.create(photo=reference(PHOTO))
    assert client.download(PHOTO) == PHOTO
    assert len(bucket.objects()) == 1


def test_another_hash_leaves_nothing(world: World, bucket: Bucket) -> None:
    """What is not what it was said to be is refused, and the bucket is as it was."""
    client = Client(world)

    assert refused(lambda: client.upload(PHOTO, sha256=b"x" * 32)) == (grpc.StatusCode.DATA_LOSS, "FILE_CORRUPT")

    assert bucket.objects() == []
    assert bucket.unfinished_uploads() == []


def test_a_content_that_was_lost(world: World, bucket: Bucket) -> None:
    """A content that is gone from the bucket is said to be lost, and comes back once somebody uploads it."""
    client = Client(world)
    client.upload(PHOTO)
    client.create(photo=reference(PHOTO))
    contents = ObjectStoreContents(bucket.url, **bucket.options)
    (found,) = contents.contents("default")
    contents.delete("default", found.sha256, found.copy)

    assert refused(lambda: client.download(PHOTO)) == (grpc.StatusCode.DATA_LOSS, "FILE_LOST")
    assert client.stat(PHOTO) == [(MISSING, 0)]
    client.upload(PHOTO)
    assert client.download(PHOTO) == PHOTO


def test_a_store_that_fails_loses_nothing(world: World, bucket: Bucket) -> None:
    """Meanwhile files can be neither had nor given, and the rest goes on; afterwards all is there."""
    client = Client(world)
    client.upload(PHOTO)
    client.create(photo=reference(PHOTO))

    with refusing(403, "AccessDenied") as endpoint:
        world._contents = ObjectStoreContents(bucket.url, **s3_options(endpoint))
        world.deploy(Application())
        apart = Client(world, seq=client.seq)
        for call in (
            lambda: apart.stat(PHOTO),
            lambda: apart.upload(SMALL),
            lambda: apart.download(PHOTO),
        ):
            assert refused(call) == (grpc.StatusCode.UNAVAILABLE, "STORE_FAILED")
        assert apart.create("t2", title="without a photo") == ["APPLIED"]

    world._contents = ObjectStoreContents(bucket.url, **bucket.options)
    world.deploy(Application())
    again = Client(world)
    assert again.stat(PHOTO) == [(PRESENT, 0)]
    assert again.download(PHOTO) == PHOTO


def test_what_nothing_refers_to_is_collected(folder: Path, bucket: Bucket) -> None:
    """Contents that were never referred to leave the bucket, and so do parts; others stay."""
    with World(folder, contents=ObjectStoreContents(bucket.url, **bucket.options)) as world:
        client = Client(world)
        client.upload(PHOTO)
        client.upload(SMALL)
        client.create(small=reference(SMALL))
        cut(client, messages(b"part" * CHUNKS, until=CHUNKS))

    contents = ObjectStoreContents(bucket.url, **bucket.options)
    # Times in S3 are those of whole seconds, cut off: all of it is older than now.
    with Server(Application(), store=folder / "server", contents=contents, file_grace=timedelta(0)) as server:
        server.collect()

    assert len(bucket.objects()) == 1


@pytest.fixture
def environment(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say by the environment where S3 is, and who asks."""
    settings = {
        "ENDPOINT_URL": s3,
        "ALLOW_HTTP": "true",
        "REGION": "us-east-1",
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
class TestCommand:
    def test_serves_from_an_object_store(self, folder: Path, bucket: Bucket) -> None:
        """`tidelog serve --contents` keeps contents where it is told, and credentials come from the environment."""
        with (
            serving("--contents", bucket.url, cwd=folder, data="data") as address,
            grpc.insecure_channel(address) as channel,
        ):
            client = Client(cast("Any", SimpleNamespace(channel=lambda: channel)))
            client.upload(PHOTO)
            client.create(photo=reference(PHOTO))
            assert client.download(PHOTO) == PHOTO

        assert len(bucket.objects()) == 1
        assert not (folder / "data" / "files").exists()

        succeed("verify", "--data", "data", "--contents", bucket.url, cwd=folder)
        contents = ObjectStoreContents(bucket.url, **bucket.options)
        (found,) = contents.contents("default")
        contents.delete("default", found.sha256, found.copy)
        succeed("verify", "--data", "data", cwd=folder)
        verified = run("verify", "--data", "data", "--contents", bucket.url, cwd=folder)
        assert verified.returncode == ExitCode.STORAGE
        assert "content_lost" in verified.stdout

    @pytest.mark.parametrize(
        ("url", "code", "message"),
        [
            ("s3://no-such-bucket/prefix", ExitCode.STORAGE, "NoSuchBucket"),
            ("nonsense", ExitCode.USAGE, "nonsense: "),
        ],
    )
    def test_refuses_to_serve_from_what_is_not_there(
        self, folder: Path, url: str, code: ExitCode, message: str
    ) -> None:
        """A bucket that cannot be used is told at the start, before anything is made."""
        options = ("--data", "data", "--listen", "127.0.0.1:0", "--contents", url)

        assert message in fail("serve", *options, cwd=folder, code=code)
        assert not (folder / "data").exists()
