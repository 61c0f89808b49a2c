"""Paths of the endpoints whose requests a prefix can steer, with their protocols."""

from trimtab.engine.protocols.completions import ChatProtocol, CompletionsProtocol
from trimtab.engine.protocols.errors import MESSAGES_PATH, RESPONSES_PATH
from trimtab.engine.protocols.messages import MessagesProtocol
from trimtab.engine.protocols.protocol import Protocol
from trimtab.engine.protocols.responses import ResponsesProtocol

CHAT_PATH = "/v1/chat/completions"
PROTOCOLS: dict[str, Protocol] = {
    CHAT_PATH: ChatProtocol(),
    "/v1/completions": CompletionsProtocol(),
    RESPONSES_PATH: ResponsesProtocol(),
    MESSAGES_PATH: MessagesProtocol(),
}
FEEDBACK_PATH = "/v1/feedback"
COUNT_PATH = f"{MESSAGES_PATH}/count_tokens"
