"""Files of measurements, written so that a stopped run leaves a whole one."""

import json
import os
import re
from pathlib import Path
from typing import Any

#: a string, which may hold brackets, or a list or dict of plain values
_STRING = r'"(?:[^"\\]|\\.)*"'
_FLAT = re.compile(rf"{_STRING}|[\[{{](?:{_STRING}|[^\[\]{{}}\"])*[\]}}]")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a file in one step; what a list or a dict without further ones holds stands on one line."""
    text = json.dumps(content, indent=1)
    text = _FLAT.sub(lambda found: found[0] if found[0][0] == '"' else json.dumps(json.loads(found[0])), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
