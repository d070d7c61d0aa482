"""The commands in the documents."""

import re


def commands(text: str) -> list[str]:
    """The commands of every console block, without their comments."""
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [line.strip()[2:].split("  #")[0].strip() for block in blocks for line in block.splitlines()
            if line.strip().startswith(("$ ", "# "))]  # fmt: skip
