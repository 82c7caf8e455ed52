"""S3 servers for tests: moto's in a thread, and versitygw, a real one, as a process. Each with one bucket."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

ACCESS, SECRET, REGION, BUCKET = "conformance", "conformance-secret", "us-east-1", "conformance"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET}


def make_bucket(endpoint: str) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=ACCESS,
        aws_secret_access_key=SECRET,
        config=Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket=BUCKET)


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """Serve; give the endpoint."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        make_bucket(endpoint)
        yield endpoint
    finally:
        server.stop()


@contextlib.contextmanager
def versitygw(program: str, folder: Path) -> Iterator[str]:
    """Serve from `folder`, which is removed at the end; give the endpoint."""
    for name in ("data", "sidecar"):
        (folder / name).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The sidecar holds what other file systems keep in extended attributes, which not every /tmp has.
    command = [program, "--port", f"127.0.0.1:{port}", "--access", ACCESS, "--secret", SECRET, "--region", REGION]
    command += ["--quiet", "posix", "--sidecar", str(folder / "sidecar"), str(folder / "data")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for_port(port, server, folder / "log")
        make_bucket(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_port(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"the server does not listen: {log.read_text()}")
