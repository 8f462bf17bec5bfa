"""The browser app: `ui` puts it together, `panel` is its left side, each tab stands in the file of its name.

`handlers` does what the buttons say, `cards` reads the pictures, `engine` draws for all users, `studio` is what the
tabs share.
"""

import os
import tempfile
from pathlib import Path

# Gradio reads these when it is imported: no telemetry, and no record of runs unless a user asks for it.
for _name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
    os.environ.setdefault(_name, "False")
# A folder of its own, since what is old there is deleted.
os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(tempfile.gettempdir(), "vilex-app")))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
