"""The browser app: `ui` lays it out, `handlers` does what its buttons say, `budget` draws the prompt's slots."""

import os

# Gradio reads these when it is imported: no telemetry, and no record of runs unless a user asks for it.
for _name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
    os.environ.setdefault(_name, "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
