"""Talking to a model: from Python, in the terminal, over HTTP and in the browser."""

from mmit.chat.chat import Chat

__all__ = ["Chat"]
