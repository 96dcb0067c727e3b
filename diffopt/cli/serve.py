"""`diffopt serve`: engines behind HTTP."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from diffopt import optional
from diffopt.cli import output as show
from diffopt.cli.flags import ServeFlags
from diffopt.engine import engine
from diffopt.errors import DiffoptError
from diffopt.serving.served_engine import Servable
from diffopt.serving.settings import Settings

VARIABLE = "DIFFOPT_TOKEN"


def run(flags: ServeFlags) -> None:
    """Serve engines until a signal; or print what would be served."""
    optional.check("fastapi", "uvicorn", "prometheus_client", "python_multipart", extra="serve")
    from diffopt.serving import engine_thread, server
    from diffopt.serving.app import Service

    names = names_of(flags.engines)
    settings = Settings(**{name: getattr(flags, name) for name in asdict(Settings())})
    token = read_token(flags.token_file)
    engines: dict[str, Servable] = {}
    for name, path in names.items():
        with show.progress(f"loading {path}"):
            engines[name] = engine_thread.call(
                engine.load, path, target=flags.target, trusted_keys=flags.trusted_key
            )
    service = Service(engines, settings, engine_thread.call)
    if flags.dry_run:
        models = {name: served.about() for name, served in service.engines.items()}
        where = {"host": flags.host, "port": flags.port, "token": token is not None}
        show.print_json({**where, "settings": asdict(settings), "models": models})
        return
    with server.listen(flags.host, flags.port) as listener:
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        show.stderr().print(f"serving {', '.join(names)} on {address}", markup=False)
        if token is None and not ipaddress.ip_address(host).is_loopback:
            show.stderr().print(f"whoever reaches it may use it: there is no token in {VARIABLE}")
        server.run(service, listener, token)


def names_of(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the engine files by the names that requests call them by."""
    names: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise DiffoptError(f"there is no file {path}")
        if path.suffix != ".engine":
            raise DiffoptError(f"{path}: is no .engine file; `diffopt optimize` makes one")
        if path.stem in names:
            raise DiffoptError(
                f"{names[path.stem]} and {path} would both be called '{path.stem}'; rename one"
            )
        names[path.stem] = path
    return names


def read_token(file: Path | None) -> str | None:
    """Return the token of the file or the environment; None where there is none."""
    variable = os.environ.get(VARIABLE)
    if file is None:
        source, token = VARIABLE, variable
    elif variable is not None:
        raise DiffoptError(
            f"there is a token in --token-file and in {VARIABLE}: give one of the two"
        )
    else:
        source = str(file)
        try:
            token = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is no plain text"
            raise DiffoptError(f"{file}: {reason}") from None
    if token is not None and not (token and token.isascii() and token.isprintable()):
        raise DiffoptError(f"{source}: the token must be one line of ASCII letters, and not empty")
    return token
