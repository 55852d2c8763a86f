"""A model behind the OpenAI API: mlx-lm's own server, on 127.0.0.1, with one model and an optional bearer token.

It is mlx-lm's `main` in this process, so that the device and the BLAS are the ones that training has. What is kept from
its clients: other models (a request's `model` may otherwise name any file or hub id) and pages of other origins.
"""

import hmac
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.resources import DeviceSettings


def serve_model(model: Path, port: int, token: str | None, device: DeviceSettings) -> None:
    """Serve until interrupted. Raises what loading does, before the port is opened."""
    from mlx_ops.backend import prepare

    prepare(device.device)
    from mlx_lm import server

    from mlx_ops.model import load_policy

    load_policy(model)
    logging.getLogger().setLevel(logging.INFO)
    server.ModelProvider.load = one_model_only(server.ModelProvider.load)
    if token is not None:
        for method in ("do_GET", "do_POST"):
            setattr(server.APIHandler, method, authorised(getattr(server.APIHandler, method), token))
    origin = f"http://127.0.0.1:{port}"
    words = "with a bearer token" if token else "to whoever is on this machine"
    print(f"{model}\nanswers at {origin}/v1 {words}; stop with Ctrl-C", flush=True)
    options = {"model": model, "host": "127.0.0.1", "port": port, "allowed-origins": origin}
    sys.argv = ["mlx_lm.server", *(f"--{name}={value}" for name, value in options.items())]
    server.main()


def one_model_only(load: Callable[..., Any]) -> Callable[..., Any]:
    """The server's own model, whatever a request names."""

    def load_default(self: Any, *_: Any) -> Any:
        return load(self, "default_model", None, "default_model")

    return load_default


def authorised(answer: Callable[[Any], None], token: str) -> Callable[[Any], None]:
    """Answers requests that carry the token; others get 401 and learn nothing."""
    expected = f"Bearer {token}".encode()

    def guarded(self: Any) -> None:
        got = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if hmac.compare_digest(got, expected):
            answer(self)
            return
        self.send_response(401)
        self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    return guarded
