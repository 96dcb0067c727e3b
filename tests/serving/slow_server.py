"""A server of an engine that takes two seconds for an image; run as a module."""

import sys

from diffopt.serving import server
from diffopt.serving.app import Service
from diffopt.serving.settings import Settings
from tests.serving.fake_engine import FakeEngine

if __name__ == "__main__":
    engine = FakeEngine(None, seconds=2.0, steps=20)
    with server.listen("127.0.0.1", 0) as listener:
        print(f"on http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        server.run(Service({"slow": engine}, Settings()), listener)
