"""Reading from S3 over HTTP, with a server that throttles and connections that break."""

import os
import random
import threading

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from bigbatch.configs.errors import UserError
from bigbatch.data import retry, staging
from bigbatch.data.index import open_index
from bigbatch.data.remote import open_remote
from bigbatch.data.remote_index import build_remote_index
from bigbatch.data.staging import Cache, Remote
from bigbatch.data.writing.shard import shard
from tests.data.test_remote import GB, order_of
from tests.helpers import micro_batches
from tests.helpers.servers import Proxy

THROTTLED = b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Short pauses, ours only; connections of an earlier test are not used again."""
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def use(monkeypatch):
    """Have this process, and those that it starts, take a local port for S3."""

    def use(port):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        fsspec.get_filesystem_class("s3").clear_instance_cache()

    return use


@pytest.fixture(scope="module")
def bucket(server, tmp_path_factory):
    """Digits in the bucket `digits`, and where the same shards lie on the disk."""
    dest = tmp_path_factory.mktemp("shards") / "digits"
    shard("digits", dest, samples_per_shard=60)
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{server}",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket="digits")
    for path in dest.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "digits", f"v1/{path.relative_to(dest)}")
    return dest, client


def batches_of(index, lanes, workers):
    sizes = {"global_batch": 128, "micro_batch": 16, "image_size": 8, "channels": 1, "threads": 2}
    order = order_of(index, lanes)
    for batch in micro_batches.batches_of(
        index, order=order, stop_step=10, workers=workers, **sizes
    ):
        yield batch.samples.tolist(), batch.pixels.numpy().tobytes()


@pytest.mark.parametrize(("lanes", "workers"), [(0, 1), (8, 0)])
def test_batches_from_a_bucket(bucket, server, use, tmp_path, lanes, workers):
    use(server)
    index = open_remote(Remote("s3://digits/v1/train", str(tmp_path), GB))
    local = open_index(bucket[0] / "train")
    assert list(batches_of(index, lanes, workers)) == list(batches_of(local, lanes, 0))


def test_throttling_and_dropped_connections(bucket, server, use, tmp_path):
    """Two of five connections fail, in one way or another: eight in a row hardly ever do."""
    chosen, lock = random.Random(1), threading.Lock()
    failed = []

    def plan(number):
        with lock:
            what = chosen.choice([None, None, None, "answer", "drop"])
            if what is None:
                return None
            failed.append(what)
            return what, THROTTLED if what == "answer" else chosen.randrange(60_000)

    with Proxy(server, plan) as proxy:
        use(proxy.port)
        index = open_remote(Remote("s3://digits/v1/train", str(tmp_path), GB))
        found = list(batches_of(index, 8, 0))
    assert found == list(batches_of(open_index(bucket[0] / "train"), 8, 0))
    assert len(failed) > 5
    assert set(failed) == {"answer", "drop"}


def test_a_large_file_in_pieces_over_bad_connections(bucket, server, use, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "PIECE", 256 << 10)
    data = random.Random(0).randbytes(5_000_000)
    bucket[1].put_object(Bucket="digits", Key="large", Body=data)
    # Each connection breaks somewhere in its first megabyte: no whole file gets through.
    with Proxy(server, lambda number: ("drop", 200_000 + number * 77_777 % 800_000)) as proxy:
        use(proxy.port)
        handle = Cache(tmp_path, GB).open("s3://digits/large")
    assert os.pread(handle, len(data) + 1, 0) == data
    os.close(handle)
    assert proxy.connections > 5


def test_a_version_is_its_etag(bucket, server, use, tmp_path):
    use(server)
    found = []
    for body in (b"first", b"other"):
        bucket[1].put_object(Bucket="digits", Key="changing", Body=body)
        handle = Cache(tmp_path, GB).open("s3://digits/changing")
        found.append(os.pread(handle, 100, 0))
        os.close(handle)
    assert found == [b"first", b"other"]


def test_what_may_not_be_read(bucket, server, use, tmp_path):
    use(server)
    cache = Cache(tmp_path, GB)
    with pytest.raises(UserError, match="does not exist; check"):
        cache.open("s3://digits/v1/nothing.tar")
    with pytest.raises(UserError, match="does not exist"):
        cache.open("s3://no-such-bucket/x.tar")
    denied = THROTTLED.replace(b"503 Slow Down", b"403 Forbidden")
    with Proxy(server, lambda number: ("answer", denied)) as proxy:
        use(proxy.port)
        with pytest.raises(UserError, match="give this machine credentials"):
            cache.open("s3://digits/v1/train/000000.tar")
        assert proxy.connections < 5  # not tried again


def test_tars_in_a_bucket_are_indexed(bucket, server, use, tmp_path):
    use(server)
    dest, client = bucket
    for path in (dest / "train").glob("*.tar"):
        client.upload_file(str(path), "digits", f"v2/train/{path.name}")
    client.upload_file(str(dest / "classes.txt"), "digits", "v2/classes.txt")
    remote = Remote("s3://digits/v2/train", str(tmp_path), GB)
    with pytest.raises(UserError, match="no index at"):
        open_remote(remote)
    made, local = build_remote_index(remote, workers=2), open_index(dest / "train")
    assert made.hash == local.hash
    assert made.place == remote.url
    assert made.keys() == local.keys()
    assert list(batches_of(made, 8, 0)) == list(batches_of(local, 8, 0))
    client.put_object(Bucket="digits", Key="v2/train/000003.tar", Body=b"x" * 2048)
    with pytest.raises(UserError, match=r"000003.tar at byte 0: invalid header"):
        build_remote_index(remote)
    assert open_remote(remote).hash == local.hash
    with pytest.raises(UserError, match=r"holds no \*.tar"):
        build_remote_index(remote._replace(url="s3://digits/v2"))
    with pytest.raises(UserError, match="can be read only"):
        build_remote_index(remote._replace(url="https://example.org/train"))
