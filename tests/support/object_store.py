"""S3 server on loopback that tests can stop and start."""

import boto3
from moto.server import ThreadedMotoServer

from trimtab.util import ports


class ObjectStore:
    """S3 server in a thread. A stopped server keeps its port and its objects."""

    def __init__(self) -> None:
        self.port = ports.find_free_ports()[0]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    def create_bucket(self, name: str) -> str:
        """Create a bucket and return its URI."""
        client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
        )
        client.create_bucket(Bucket=name)
        return f"s3://{name}"


def list_keys() -> list[str]:
    """Return the keys in the test bucket. Server and credentials come from the environment."""
    objects = boto3.client("s3").list_objects_v2(Bucket="trimtab-tests").get("Contents", [])
    return [entry["Key"] for entry in objects]
