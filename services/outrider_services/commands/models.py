"""`outrider pull` and `outrider ls`: model files in the caches."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from outrider_services.models import catalogue
from outrider_services.options import Parser
from outrider_services.table import Settings
from outrider_services.terminal import progress_reporter, show


def pull_flags(parser: Parser) -> None:
    help = "hf://user/repo[:quant]; default: the default pair"
    parser.add_argument("model", nargs="?", help=help)


def pull(settings: Settings, parsed: Any) -> int:
    """Fetch what is missing, and print the paths."""
    offline = settings.pipeline.offline
    with progress_reporter() as progress:
        if parsed.model:
            paths = [
                catalogue.resolve(parsed.model, fetch=True, offline=offline, progress=progress)
            ]
        else:
            paths = list(catalogue.default_pair(fetch=True, offline=offline, progress=progress))
    for path in paths:
        print(path)
    return 0


def ls(settings: Settings, parsed: Any) -> int:
    table = Table("model", "GiB", "file", box=None)
    for model in catalogue.local_models():
        table.add_row(model.name, f"{model.bytes / 2**30:.2f}", str(model.path))
    show(table)
    return 0
