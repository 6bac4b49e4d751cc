"""Files of measurements, written so that a stopped run leaves a whole one."""

import json
import os
import re
from pathlib import Path
from typing import Any


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a file in one step; what a list or a dict without further ones holds stands on one line."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda inner: json.dumps(json.loads(inner[0])), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
