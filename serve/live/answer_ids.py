"""Request ids that prove which API key sent a request, so that any replica can check the owner without a lookup."""

import hmac
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass

from trimtab.util.remote_paths import Folder, wrap_storage_errors

FILE = "secret"
# Hexadecimal digits of an id that are random, and those of its tag.
RANDOM_DIGITS, TAG_DIGITS = 20, 12
FORM = re.compile(f"[0-9a-f]{{{RANDOM_DIGITS + TAG_DIGITS}}}")


@dataclass(frozen=True)
class AnswerIds:
    """Signer of request ids.

    Attributes:
        secret: secret of all replicas that store answers in one folder.
    """

    secret: bytes

    def sign_id(self, random_id: str, key: str | None) -> str:
        """Return a request id with the tag of an API key.

        Args:
            random_id: random hexadecimal digits, at least RANDOM_DIGITS.
            key: name of the key; None for a server without keys.
        """
        start = random_id[:RANDOM_DIGITS]
        return start + self._compute_tag(start, key)

    def is_owner(self, request_id: str, key: str | None) -> bool:
        """Return whether a key sent the request with this id."""
        start, tag = request_id[:RANDOM_DIGITS], request_id[RANDOM_DIGITS:]
        return hmac.compare_digest(tag, self._compute_tag(start, key))

    def _compute_tag(self, start: str, key: str | None) -> str:
        # A key can have any name, so that None must differ from all of them.
        owner = "" if key is None else f"key {key}"
        return hmac.digest(self.secret, f"{start} {owner}".encode(), "sha256").hex()[:TAG_DIGITS]


def open_answer_ids(folder: Folder) -> AnswerIds:
    """Read the secret of a folder of answers; create it if there is none.

    Raises:
        ArtifactError: if the storage cannot be reached.
        OSError: if a local folder cannot be written.
    """
    path = folder / FILE
    with wrap_storage_errors(folder):
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # Of several replicas that start at the same time, one creates the file.
            with suppress(FileExistsError), path.open("x") as file:
                file.write(secrets.token_hex(32))
        return AnswerIds(bytes.fromhex(path.read_text()))
